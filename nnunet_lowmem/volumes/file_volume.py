"""The voxels of a file, read when they are asked for and never kept where they are not compressed.

Not mapped: what a mapping meets on a broken disk, or in a file that somebody cuts meanwhile, ends the process. What
cannot be read is an error of the case here, and so is a file that changed since it was opened.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError, because
from nnunet_lowmem.types import Box, Shape3
from nnunet_lowmem.volumes.headers import Header, last_line

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

Key = int | slice | tuple[int | slice, ...]


@dataclass(frozen=True)
class StoredVolume(ABC):
    """One channel; a view of a box of the stored volume, with its axes in an order of its own.

    Reading gives arrays: ``volume[planes, rows]`` and ``volume[plane]`` as of an array, by numbers from the first and
    slices of step 1.

    Attributes
    ----------
    stored : numpy dtype
        Byte order included.
    order : int, 3
        Which stored axis each axis of the view is.
    box : 3 slices
        Of the stored volume, stored axes.
    zeroes : bool
        NaN, infinity, and what float32 makes infinity of, are read as 0.
    """

    stored: np.dtype[Any]
    order: Shape3
    box: Box
    zeroes: bool

    @property
    def shape(self) -> Shape3:
        """Of the view."""
        z, y, x = (self.box[axis].stop - self.box[axis].start for axis in self.order)
        return z, y, x

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what reading gives: as stored, in the byte order of this machine."""
        return self.stored.newbyteorder("=")

    @property
    def size(self) -> int:
        """Number of voxels of the view."""
        z, y, x = self.shape
        return z * y * x

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: Any, copy: bool = True) -> NDArray[Any]:
        """Read everything, which is a copy."""
        return self[:].astype(dtype, copy=False)

    def transpose(self, order: tuple[int, ...] | list[int]) -> Self:
        """Return a view with its axes in another order."""
        z, y, x = (self.order[axis] for axis in order)
        return replace(self, order=(z, y, x))

    def within(self, box: tuple[slice, ...]) -> Self:
        """Return the view of a box, axes as those of this one."""
        cut = list(self.box)
        for axis, part in zip(self.order, box, strict=True):
            low, high, _ = part.indices(cut[axis].stop - cut[axis].start)
            cut[axis] = slice(cut[axis].start + low, cut[axis].start + max(low, high))
        return replace(self, box=(cut[0], cut[1], cut[2]))

    def __getitem__(self, key: Key) -> NDArray[Any]:
        """Read a part.

        Raises
        ------
        UsageError
            If it cannot be read or decoded, or the file is another by now.
        """
        keys = key if isinstance(key, tuple) else (key,)
        slices = [part if isinstance(part, slice) else slice(part, part + 1) for part in keys]
        assert all(part.step in (None, 1) and (part.start or 0) >= 0 for part in slices), "read in order"
        part = self.within((*slices, *[slice(None)] * (3 - len(slices))))
        voxels = part._numbers().transpose(self.order)
        return voxels[tuple(slice(None) if isinstance(part, slice) else 0 for part in keys)]

    def _numbers(self) -> NDArray[Any]:
        native = self._read().astype(self.dtype, copy=False)
        if self.zeroes and native.dtype.kind == "f":
            with np.errstate(over="ignore"):
                native[~np.isfinite(native.astype(np.float32, copy=False))] = 0
        return native

    @abstractmethod
    def _read(self) -> NDArray[Any]:
        """Return the box in stored axes, an array of its own."""


@dataclass(frozen=True)
class FileVolume(StoredVolume):
    """One channel whose voxels lie in a file as they are.

    Attributes
    ----------
    path : Path
    start : int
        First byte of the stored volume.
    whole : int, 3
        Shape as stored, slowest axis first.
    state : tuple
        What tells the file from one that has been changed.
    """

    path: Path
    start: int
    whole: Shape3
    state: tuple[int, ...]

    def _read(self) -> NDArray[Any]:
        """Return the box plane by plane, whole rows at a time."""
        planes, rows, columns = self.box
        shape = tuple(part.stop - part.start for part in self.box)
        voxels = np.empty(shape, self.stored)
        buffer = None if shape[2] == self.whole[2] else np.empty((shape[1], self.whole[2]), self.stored)
        try:
            with self.path.open("rb", buffering=0) as file:
                check_state(self.state, file)
                for plane, target in zip(range(planes.start, planes.stop), voxels, strict=True):
                    row = plane * self.whole[1] + rows.start
                    file.seek(self.start + row * self.whole[2] * self.stored.itemsize)
                    _fill(file, target if buffer is None else buffer)
                    if buffer is not None:
                        target[...] = buffer[:, columns]
                check_state(self.state, file)
        except OSError as error:
            raise because(UsageError, f"{self.path} cannot be read: {last_line(error)}", error) from error
        return voxels


def check_state(state: tuple[int, ...], file: Any) -> None:
    """Refuse an open file that is not what it was.

    Raises
    ------
    OSError
    """
    if state_of(file.fileno()) != state:
        raise OSError("it was changed while it was being read")


def _fill(file: Any, target: NDArray[Any]) -> None:
    view = target.reshape(-1).view(np.uint8).data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError(f"it ends {len(view):,} bytes too early")
        view = view[count:]


def state_of(descriptor: int) -> tuple[int, ...]:
    """Return what tells an open file from itself after a change."""
    found = os.fstat(descriptor)  # not its number, which some network file systems give anew
    return found.st_size, found.st_mtime_ns


def state_at(path: Path) -> tuple[int, ...]:
    """Return what `state_of` does, of a file that is not open."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def is_readable_by_parts(header: Header) -> bool:
    """Whether one file holds the library's values as they are, one after the other, or they are in chunks."""
    if header.layout is None or not header.is_taken_as_stored:
        return False
    parts = header.layout.parts
    return header.layout.chunked is not None or (len(parts) == 1 and parts[0].is_raw)


def channels_in(header: Header) -> list[FileVolume]:
    """Return the channels of a file that `is_readable_by_parts`; of a picture's two axes a volume of one plane.

    Raises
    ------
    OSError
        If it cannot be opened.
    """
    layout = header.layout
    assert layout is not None, "it is read in place"
    assert layout.dtype is not None, "it is read in place"
    (piece,) = layout.parts
    with piece.path.open("rb") as file:
        state = state_of(file.fileno())
    z, y, x = (1, *header.shape)[-3:]
    first, channel_bytes = piece.start + piece.skipped_bytes, z * y * x * layout.dtype.itemsize
    box = (slice(0, z), slice(0, y), slice(0, x))
    return [
        FileVolume(layout.dtype, (0, 1, 2), box, False, piece.path, first + number * channel_bytes, (z, y, x), state)
        for number in range(header.shape[0] if len(header.shape) == 4 else 1)
    ]
