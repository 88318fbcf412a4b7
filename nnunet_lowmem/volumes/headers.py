"""What is known of an image file before any of its voxels is decoded.

Sizes, type and geometry are those of the library that reads the voxels afterwards, because nnU-Net goes by them. What a
library keeps to itself is read from the bytes: where the voxels lie and as what, and the spacing as it is stored
(SimpleITK makes 1 of 0 and NaN).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.names import check_utf8
from nnunet_lowmem.volumes.stored_parts import Chunked, Part

#: nnU-Net gives two-dimensional images a third axis of one slice, so thick that it is never resampled.
SLICE_THICKNESS_FACTOR = 999
# before the number of an error that happened earlier
_STALE = "Reason: "
# who speaks, and the address of an object
_PREAMBLE = re.compile(r"^(s?itk::ERROR|ITK ERROR): (\w+\(0x[0-9a-f]+\): )?")
UNSCALED = (1.0, 0.0)


class Library(Enum):
    """Who reads the voxels."""

    ITK = "SimpleITK"
    NIBABEL = "nibabel"
    OWN = "nnunet_lowmem"


@dataclass(frozen=True)
class Layout:
    """Where a file keeps its voxels, and as what.

    Attributes
    ----------
    parts : tuple of Part
        Pieces of files, which hold all values one after the other, fastest axis first.
    dtype : numpy dtype or None
        Of the values as stored, byte order included; None where only the library makes values of what is stored.
    spacing : tuple of float
        As stored, fastest axis first; empty where the header says none in a way that is known here.
    scale : (float, float)
        Slope and intercept by which the library makes its values of those that are stored.
    beside : tuple of Path
        Files that tell where the voxels are, beside the one that was asked for and those of the parts.
    loses_nan : bool
        Whether the library makes 0 of what is no number.
    chunked : Chunked or None
        What decodes the values where they are in chunks; there are no parts then.
    """

    parts: tuple[Part, ...]
    dtype: np.dtype[Any] | None
    spacing: tuple[float, ...] = ()
    scale: tuple[float, float] = UNSCALED
    beside: tuple[Path, ...] = ()
    loses_nan: bool = False
    chunked: Chunked | None = None


@dataclass(frozen=True)
class Header:
    """One file, as the library that reads it sees it.

    Attributes
    ----------
    path : Path
    read_with : Library
    shape : tuple of int
        Of the array, slowest axis first, without the values of a voxel.
    spacing : tuple of float
        Axes as in `shape`, mm.
    components : int
        Values per voxel.
    dtype : numpy dtype
        Of a value that the library gives.
    place : dict
        What says where the image lies, by nnU-Net's names: origin and direction, or affine.
    layout : Layout or None
        None where nothing is known of it: pictures, and formats without a row in the table.
    about : dict
        Of arrays that are read here: 'unit' of lengths, 'version' of NGFF, 'is_said' of the spacing.
    """

    path: Path
    read_with: Library
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    components: int
    dtype: np.dtype[Any]
    place: dict[str, Any]
    layout: Layout | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def needed_bytes(self) -> int:
        """Decoded bytes of all voxels, as stored where that is known."""
        if self.layout is not None and self.layout.parts:
            return sum(part.needed_bytes for part in self.layout.parts)
        return self.voxels * self.components * self.dtype.itemsize

    @property
    def is_read_in_place(self) -> bool:
        """Whether the stored values are the library's, bit by bit, but for their byte order."""
        layout = self.layout
        if layout is None or layout.dtype is None or layout.scale != UNSCALED or self.components != 1:
            return False
        return layout.dtype.newbyteorder("=") == self.dtype

    @property
    def is_taken_as_stored(self) -> bool:
        """Whether the stored values are those that nnU-Net works with; of complex numbers it takes the real parts."""
        return self.is_read_in_place and self.dtype.kind != "c"

    @property
    def beside_bytes(self) -> int:
        """What reading holds beside the array that it gives: the values as stored, and as the library has them."""
        if self.is_taken_as_stored:
            return 0
        library_bytes = self.voxels * self.components * self.dtype.itemsize if self.read_with is Library.ITK else 0
        return self.needed_bytes + library_bytes

    def check_size(self) -> None:
        """Refuse a header that promises nothing, or more than its files can hold, however well they are compressed.

        Raises
        ------
        DamagedFileError
            With both numbers.
        """
        if self.voxels < 1:
            raise DamagedFileError(f"its header says {len(self.shape)} dimensions of sizes {list(self.shape[::-1])}")
        for part in () if self.layout is None else self.layout.parts:
            held_bytes = part.largest_bytes()
            if held_bytes >= part.needed_bytes:
                continue
            promised = f"{part.needed_bytes:,} bytes of voxels in shape {self.shape}"
            if part.is_raw:
                raise DamagedFileError(f"{part.path.name} ends after {held_bytes:,} of {promised}")
            size = f"{part.path.stat().st_size:,} bytes"
            raise DamagedFileError(f"its header promises {promised}, and a file of {size} cannot hold them")

    def grid(self) -> tuple[list[int], list[float]]:
        """Return shape and spacing (mm), three entries each, in the axis order of nnU-Net's arrays.

        Raises
        ------
        UsageError
            If the image has neither two, three nor four dimensions.
        """
        shape, spacing = list(self.shape), list(self.spacing)
        if len(shape) == 2:
            return [1, *shape], [max(spacing) * SLICE_THICKNESS_FACTOR, *spacing]
        if len(shape) not in (3, 4):
            raise UsageError(f"{self.path} has {len(shape)} dimensions; nnU-Net takes 2 to 4")
        return shape[-3:], spacing[-3:]


def is_plain(fields: Mapping[str, str]) -> bool:
    """Whether fields are of letters that everybody reads alike; else ITK alone says what a file holds."""
    return all((key + value).isascii() and (key + value).isprintable() for key, value in fields.items())


def stored_spacing(words: Iterable[str]) -> tuple[float, ...]:
    """Return the lengths that words of a header say, without signs; nothing if one is no number: ITK will judge it."""
    try:
        return tuple(abs(float(word)) for word in words)
    except ValueError:
        return ()


def itk_information(path: Path) -> Any:
    """Return SimpleITK's reader of a file, of which only the header has been read.

    Raises
    ------
    DamagedFileError
        If SimpleITK reads no such file.
    UsageError
        If it takes no such name.
    """
    import SimpleITK

    check_utf8(path)
    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DamagedFileError(last_line(error)) from error
    return reader


def itk_header(path: Path) -> Header:
    """Return what SimpleITK makes of a header.

    Raises
    ------
    DamagedFileError
        If it is none, or no image can have its geometry.
    """
    import SimpleITK

    information = itk_information(path)
    voxel, components = _itk_voxel(information)
    dtype: np.dtype[Any] = SimpleITK.GetArrayFromImage(voxel).dtype
    return Header(
        path,
        Library.ITK,
        information.GetSize()[::-1],
        voxel.GetSpacing()[::-1],
        components,
        dtype,
        {"spacing": voxel.GetSpacing(), "origin": voxel.GetOrigin(), "direction": voxel.GetDirection()},
    )


def _itk_voxel(information: Any) -> tuple[Any, int]:
    """Make an image of one voxel where a file's image lies; and values of a voxel, of which a complex number is one."""
    import SimpleITK

    make_image: Any = SimpleITK.Image
    kind, components = information.GetPixelIDValue(), information.GetNumberOfComponents()
    is_complex = kind in (SimpleITK.sitkComplexFloat32, SimpleITK.sitkComplexFloat64)
    components = 1 if is_complex else components
    voxel = make_image([1] * information.GetDimension(), kind, components if components > 1 else 0)
    spacing, direction = _upright(information.GetSpacing(), information.GetDirection())
    try:
        voxel.SetSpacing(spacing)
        voxel.SetOrigin(information.GetOrigin())
        voxel.SetDirection(direction)
    except RuntimeError as error:
        raise DamagedFileError(f"no image has the spacing {spacing} and the directions {direction}") from error
    return voxel, components


def _upright(spacing: Sequence[float], direction: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Turn round axes of negative spacing, as ITK does when it makes an image of what is stored."""
    axes = len(spacing)
    turned = [-value if spacing[place % axes] < 0 else value for place, value in enumerate(direction)]
    return tuple(map(abs, spacing)), tuple(turned)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where SimpleITK says what is the matter; its type if there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_STALE)]
    return _PREAMBLE.sub("", lines[-1] if lines else type(error).__name__)
