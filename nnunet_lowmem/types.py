"""Plain data that rooms hand to each other; no torch, no nnU-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Shape3 = tuple[int, int, int]
#: A slice with a start and a stop along each axis.
Box = tuple[slice, slice, slice]
#: Start and stop along the three axes of a file; None is the volume's own end.
BBox = tuple[tuple[int | None, int | None], ...]
#: What a case gives: its segmentation, with probabilities where they are returned; None where all is in files.
Result = NDArray[Any] | tuple[NDArray[Any], NDArray[np.float32]] | None


def shape3(sizes: Iterable[int]) -> Shape3:
    """Return three sizes, numpy's or torch's perhaps, as plain data."""
    z, y, x = map(int, sizes)
    return z, y, x


#: Calls what it is given and returns what that returns. The operation may take memory and changes nothing when it
#: fails, so it may be called more than once.
Attempt = Callable[[Callable[[], Any]], Any]


def once(operation: Callable[[], Any]) -> Any:
    """Attempt an operation a single time."""
    return operation()


#: Makes an array of a shape and a type: in RAM, or in a file.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]


class NetworkImage(Protocol):
    """What tiles are cut out of, float32: an array, or what is made of the input whenever it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, z, y, x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what a part is returned as."""

    @property
    def nbytes(self) -> int:
        """Of what is kept."""

    def __getitem__(self, key: tuple[slice, ...], /) -> Any:
        """Return a part as an array, by one slice an axis."""


class Place(Enum):
    """Where an array lives."""

    RAM = "RAM"
    VRAM = "VRAM"
    DISK = "disk"


@dataclass(frozen=True)
class SlabLimits:
    """How much is labelled at a time; the labels do not depend on it.

    Attributes
    ----------
    planes : int or None
        Network planes; None takes all that are final.
    block_bytes : int
        Working memory of the torch path on a device.
    """

    planes: int | None = None
    block_bytes: int = 1 << 28


@dataclass(frozen=True)
class NextStage:
    """A later stage of a cascade that wants the labels of a case in its own grid.

    Attributes
    ----------
    shape : int, 3
        Network grid of that stage.
    write : callable
        Stores the labels: integers, shape (z, y, x).
    """

    shape: Shape3
    write: Callable[[NDArray[Any]], None]


@dataclass(frozen=True)
class Wanted:
    """What is asked for of a case, where that is not all of it; axes of the network.

    Attributes
    ----------
    box : 3 slices
        Of the original grid: the result has its shape.
    mask : bool, shape (z, y, x), or None
        Of the whole original grid: labels are wanted where it is set, and 0 elsewhere.
    """

    box: Box
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class PreprocessedCase:
    """One case as the network takes it.

    Attributes
    ----------
    image : NetworkImage, shape (channels, z, y, x)
        In network space (transposed, cropped, normalised, resampled), bit-equal to stock nnU-Net's. An array, perhaps
        backed by a file, but where it was allowed not to be kept.
    previous_stage : ndarray of integers, shape (z, y, x), or None
        Labels of the previous stage of a cascade in network space, -1 outside the nonzero mask.
    properties : dict
        nnU-Net's own properties of the case (spacing, crop, shapes, what the writer needs). Read, never changed.
    next_stages : tuple of NextStage
        Which labels are wanted beside those in the original grid.
    wanted : Wanted or None
        What is asked for of the original grid; None is all of it.
    """

    image: NetworkImage
    previous_stage: NDArray[np.integer[Any]] | None
    properties: dict[str, Any]
    next_stages: tuple[NextStage, ...] = ()
    wanted: Wanted | None = None
