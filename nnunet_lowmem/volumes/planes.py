"""Finished logits outside the window: in RAM, or spilled to a file that is read and written plane by plane.

Used for the running sum over folds and wherever a whole head is needed at once. The file is never mapped, so its pages
belong to the system's cache and not to this process.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.errors import WriteError
from nnunet_lowmem.system import platform
from nnunet_lowmem.system.atomic_files import require_free_bytes
from nnunet_lowmem.types import Shape3


class PlaneStore:
    """Half logits of shape (heads, z, y, x), stored plane by plane along one axis; a context manager.

    Parameters
    ----------
    heads : int
    shape : int, 3
        Network grid.
    axis : int
        The axis along which slabs arrive.
    folder : Path or None
        Where to spill. None keeps the planes in RAM.
    """

    def __init__(self, heads: int, shape: Shape3, axis: int, folder: Path | None) -> None:
        self.heads = heads
        self.axis = axis
        self._plane_shape = (heads, *(shape[a] for a in range(3) if a != axis))
        self._plane_bytes = 2 * int(np.prod(self._plane_shape))
        self._planes = shape[axis]
        self._folder = folder
        self._ram = np.empty((self._planes, *self._plane_shape), np.float16) if folder is None else None
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed in __exit__

    def __enter__(self) -> PlaneStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._ram = None
        if self._file is not None:
            self._file.close()

    def write_plane(self, position: int, plane: torch.Tensor) -> None:
        """Store one plane: half tensor, shape (heads, ...) without the slab axis."""
        values = plane.cpu().contiguous().numpy()
        if self._ram is not None:
            self._ram[position] = values
            return
        assert self._file is not None
        self._file.seek(position * self._plane_bytes)
        view = values.reshape(-1).view(np.uint8).data
        with _told(self._folder):
            while len(view):  # an unbuffered file may write less than asked
                view = view[self._file.write(view) :]

    def read_plane(self, position: int) -> torch.Tensor:
        """Return one plane as a half tensor, shape (heads, ...) without the slab axis."""
        if self._ram is not None:
            return torch.from_numpy(self._ram[position])
        values = np.empty(self._plane_shape, np.float16)
        self._read_into(values, position * self._plane_bytes)
        return torch.from_numpy(values)

    def read_heads(self, start: int, stop: int) -> NDArray[np.float16]:
        """Return heads [start, stop) of all planes, shape (heads, z, y, x), contiguous."""
        head_shape = self._plane_shape[1:]
        result = np.empty((self._planes, stop - start, *head_shape), np.float16)
        if self._ram is not None:
            result[...] = self._ram[:, start:stop]
        else:
            head_bytes = self._plane_bytes // self._plane_shape[0]
            for position in range(self._planes):
                self._read_into(result[position], position * self._plane_bytes + start * head_bytes)
        return np.ascontiguousarray(np.moveaxis(result, 0, self.axis + 1))

    def _read_into(self, target: NDArray[np.float16], offset: int) -> None:
        assert self._file is not None
        self._file.seek(offset)
        view = target.reshape(-1).view(np.uint8).data
        while len(view):
            count = self._file.readinto(view)
            assert count, "spill file is shorter than what was written"
            view = view[count:]


@contextmanager
def _told(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"arrays cannot be spilled to {folder}: {error.strerror or error}; make room there or choose another "
            "folder with --tmp_dir"
        ) from error


def spilled_array(shape: tuple[int, ...], dtype: np.dtype[np.generic], folder: Path) -> NDArray[np.generic]:
    """Return an array of zeros backed by a file in `folder`; the file has no name where the system allows it.

    Its pages are the system's cache: it writes them out and takes them back when memory is short.

    Raises
    ------
    WriteError
        If the folder has too little room.
    """
    size_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    require_free_bytes(folder, size_bytes, "make room there or choose another folder with --tmp_dir")
    with _told(folder), tempfile.TemporaryFile(dir=folder) as file:
        platform.reserve(file.fileno(), size_bytes)
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def give_back(array: NDArray[Any]) -> None:
    """Let the pages of a mapped file go that this process has touched, as far as the system knows how.

    What was written stays: in the system's cache, then in the file. Pages that are mapped count for whoever goes by the
    resident set of a process (Slurm, Dask), though no budget here and no kernel that is short of memory counts them.
    """
    base, is_shared = cast(Any, array), False
    while isinstance(base, np.ndarray):
        is_shared = is_shared or (isinstance(base, np.memmap) and base.mode != "c")  # of one's own pages nothing stays
        base = base.base
    if is_shared and isinstance(base, mmap.mmap):
        platform.give_back(base)


def why_unspillable(folder: Path) -> str:
    """Return what a folder does not do that `spilled_array` needs; empty if it does, or is not there or full."""
    try:
        if folder.is_dir():
            spilled_array((1,), np.dtype(np.uint8), folder)[:] = 1
    except WriteError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno not in platform.DISK_FULL:
            return f"takes no mapped files ({cause.strerror or cause})"
    return ""
