"""Finished logits outside the window: in RAM, or spilled to a file that is read and written plane by plane.

Used for the running sum over folds and wherever a whole head is needed at once. The file is never mapped, so its pages
belong to the system's cache and not to this process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.types import Shape3
from nnunet_lowmem.volumes.mapped import told_of_spilling


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
        with told_of_spilling(self._folder):
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
