"""The header of a volume that is an array with axes, a type and perhaps a length of its voxels: zarr, HDF5, TIFF."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.volumes.headers import SLICE_THICKNESS_FACTOR, Header, Layout, Library
from nnunet_lowmem.volumes.ome import MILLIMETRE, checked_order
from nnunet_lowmem.volumes.selection import Selection
from nnunet_lowmem.volumes.stored_parts import Box4, Chunked, Part, Shape4

_logger = logging.getLogger(__name__)
_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
_SHOWN = 8
_IN_ORDER = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}


@dataclass(frozen=True)
class Place:
    """Where the voxels of an array lie.

    Attributes
    ----------
    spacing : (float, float, float) or None
        Of z, y and x, mm; None where nothing says it.
    origin : (float, float, float)
        Of the first voxel's middle, likewise.
    unit : str
        In which the file says them, by NGFF's names.
    version : str
        Of NGFF; empty for other files.
    """

    spacing: tuple[float, ...] | None
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    unit: str = ""
    version: str = ""


class Axes:
    """Which axes an array has, some of ``tczyx``, and how it is an array of channels, z, y, x.

    Parameters
    ----------
    axes : str
        Empty takes those that arrays with so many axes have as a rule.
    shape : sequence of int

    Raises
    ------
    UsageError
        If it is no volume, or has several points in time.
    """

    def __init__(self, axes: str, shape: Sequence[int]) -> None:
        self.letters = axes or _IN_ORDER.get(len(shape), "")
        if len(self.letters) != len(shape):
            raise UsageError(f"it has {len(shape)} axes, {list(shape)}; a volume has 2 to 5: {_IN_ORDER[5]}")
        checked_order(self.letters, ", ".join(self.letters))
        sizes = dict(zip(self.letters, shape, strict=True))
        if sizes.get("t", 1) != 1:
            raise UsageError(f"it has {sizes['t']} points in time; store each as a volume of its own")
        self.shape = self.of_four(shape)

    def of_four(self, values: Sequence[int]) -> Shape4:
        """Return what belongs to channels, z, y, x of a value for each axis; 1 where there is no such axis."""
        known = dict(zip(self.letters, values, strict=True))
        c, z, y, x = (known.get(axis, 1) for axis in "czyx")
        return int(c), int(z), int(y), int(x)

    def selection(self, box: Box4) -> tuple[slice, ...]:
        """Return the part of the array that a box of channels, z, y, x is."""
        known = dict(zip("czyx", box, strict=True))
        return tuple(known.get(axis, slice(0, 1)) for axis in self.letters)

    def chunk(self, number: Shape4) -> tuple[int, ...]:
        """Return the place of a chunk in the array's own grid of them."""
        known = dict(zip("czyx", number, strict=True))
        return tuple(known.get(axis, 0) for axis in self.letters)


def refuse_selection(path: Path | str, kind: str, selection: Selection, *fields: str) -> None:
    """Refuse what is selected where there is nothing to select from.

    Raises
    ------
    UsageError
    """
    for name in fields:
        if (value := getattr(selection, name)) != getattr(Selection, name):
            raise UsageError(f"{path} is {kind}, for which there is no --{name}: {value} is asked for")


def some(names: Sequence[str]) -> str:
    """Return the first of several names, for messages."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def array_header(
    path: Path,
    axes: Axes,
    dtype: np.dtype[Any],
    place: Place,
    *,
    spacing: Sequence[float] | None,
    chunked: Chunked | None = None,
    parts: tuple[Part, ...] = (),
    beside: tuple[Path, ...] = (),
) -> Header:
    """Return the header of an array, of which either the chunks are known or where the voxels lie as they are.

    Parameters
    ----------
    path : Path
        What is asked for.
    axes : Axes
    dtype : numpy dtype
    place : Place
    spacing : (float, float, float) or None
        In the place of what the file says.
    chunked : Chunked, optional
    parts : tuple of Part
    beside : tuple of Path
        Files that say where the voxels are.

    Raises
    ------
    UsageError
        If the values are no real numbers.
    DamagedFileError
        If a length is none.
    """
    if dtype.kind not in "buif":
        raise UsageError(f"{path}: holds values of type {dtype}; real numbers are needed")
    steps = [*(spacing or place.spacing or (1.0, 1.0, 1.0))]
    if len(steps) != 3 or not all(0 < step < math.inf for step in steps):
        raise DamagedFileError(f"its voxels are {tuple(steps)} mm large; mend it, or give --spacing Z Y X")
    if spacing is None and place.spacing is None:
        _logger.warning("%s says no spacing: 1 mm is assumed; give it with --spacing Z Y X", path)
    if "z" not in axes.letters and spacing is None:  # as nnU-Net has pictures
        steps[0] = SLICE_THICKNESS_FACTOR * max(steps[1:])
    shape = axes.shape if axes.shape[0] > 1 or "c" in axes.letters else axes.shape[1:]
    layout = Layout(parts, dtype, beside=beside, chunked=chunked)
    where = {"spacing": tuple(steps[::-1]), "origin": tuple(place.origin[::-1]), "direction": _DIRECTION}
    about = {"unit": place.unit or MILLIMETRE, "version": place.version, "is_flat": "z" not in axes.letters}
    return Header(
        path,
        Library.OWN,
        shape,
        (1.0, *steps)[-len(shape) :],
        1,
        dtype.newbyteorder("="),
        where,
        layout,
        {**about, "is_said": spacing is None and place.spacing is not None},
    )
