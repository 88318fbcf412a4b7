"""Label maps that go to their file box by box, below a header that the library wrote for a map of a few voxels.

SimpleITK takes a copy of the whole map to write it. What it puts into a header is geometry, type and how many voxels
there are; so it writes a few, the sizes in that header are changed, and the rest is the voxels. They may come while the
case is still being predicted.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import whole
from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.formats import format_of
from nnunet_lowmem.volumes.stored_parts import Encoding, Part, first_bytes
from nnunet_lowmem.volumes.voxel_files import Packed, Raw, VoxelFile, runs

# two tell that there are more than one, which a header may say in another way
_EXTENT = 2
# MetaIO skips spaces before a number
_STORED_BYTES = re.compile(rb"(?<=\nCompressedDataSize = )[0-9]+(?=\n)")
_LETTERS = 20


def _in_nifti(sizes: Sequence[int]) -> bytes:
    return struct.pack(f"={1 + len(sizes)}h", len(sizes), *sizes)


def _in_gipl(sizes: Sequence[int]) -> bytes:
    return struct.pack(f">{len(sizes)}H", *sizes)


def _in_nrrd(sizes: Sequence[int]) -> bytes:
    return b"\nsizes: %s\n" % _in_words(sizes)


def _in_meta_image(sizes: Sequence[int]) -> bytes:
    return b"\nDimSize = %s\n" % _in_words(sizes)


def _in_words(sizes: Sequence[int]) -> bytes:
    return " ".join(map(str, sizes)).encode()


class _Row(NamedTuple):
    """How a header says the sizes, fastest axis first; where, if that is fixed; and how hard ITK compresses."""

    sizes: Callable[[Sequence[int]], bytes]
    place: int | None
    level: int


_NIFTI = _Row(_in_nifti, 40, 6)
_ROWS = {
    ".nii": _NIFTI,
    ".nii.gz": _NIFTI,
    ".gipl": _Row(_in_gipl, 0, 6),
    ".nrrd": _Row(_in_nrrd, None, 2),
    ".mha": _Row(_in_meta_image, None, 2),
}
#: The endings of files that can be written so.
ENDINGS = tuple(_ROWS)
#: Those of files that are compressed, when nnU-Net's writer asks for it.
IN_ORDER = (".nii.gz", ".nrrd", ".mha")


def few_voxels(shape: Sequence[int], dtype: np.dtype[Any], label: int) -> NDArray[Any]:
    """Return a map of a few voxels that a library writes as it would one of this shape, but for the sizes.

    All values are the one label. By the largest of a map, writers choose a type.
    """
    return np.full([min(extent, _EXTENT) for extent in shape], label, dtype)


def largest_label(labels: NDArray[Any]) -> int:
    """Return the largest value of a map with one voxel or more, which may be mapped."""
    return int(max(labels[at].max() for _, at in runs(whole(labels.shape), labels.shape, labels)))


@dataclass(frozen=True)
class Frame:
    """All of a file but its voxels.

    Attributes
    ----------
    header : bytes
    is_encoded : bool
        The header is compressed along with the voxels, where those are.
    encoding : Encoding
    level : int
        zlib's.
    dtype : numpy dtype
        Of the voxels, byte order included.
    """

    header: bytes
    is_encoded: bool
    encoding: Encoding
    level: int
    dtype: np.dtype[Any]

    @staticmethod
    def of(file: Path, few: Sequence[int], shape: Sequence[int]) -> Frame:
        """Return what a library puts around a map, from the file that it wrote for one of a few voxels.

        Parameters
        ----------
        file : Path
            Its name has one of `ENDINGS`.
        few, shape : sequence of int
            Of the map in the file, and of the one to be written; slowest axis first.

        Raises
        ------
        DamagedFileError
            If the header is not as it is known here.
        struct.error
            If it has no room for the sizes.
        Exception
            Of libraries that cannot read the file.
        """
        axes, part, dtype = _voxels_in(file)
        row = next(row for ending, row in _ROWS.items() if file.name.endswith(ending))
        stored = first_bytes(file, part.skipped_bytes) if part.skipped_bytes else file.read_bytes()[: part.start]
        stored = _with_sizes(stored, row, few[-axes:][::-1], shape[-axes:][::-1])
        stored = _STORED_BYTES.sub(b" " * _LETTERS, stored)
        encoding = Encoding.RAW if part.is_raw else part.encoding
        return Frame(stored, part.skipped_bytes > 0, encoding, row.level, dtype)

    @property
    def in_order(self) -> bool:
        """Whether voxels have to come in the order of the file, slowest axis first."""
        return self.encoding is not Encoding.RAW

    def file_bytes(self, voxels: int) -> int:
        """Return the least that the file of a map can take."""
        return 0 if self.in_order else len(self.header) + voxels * self.dtype.itemsize

    @contextmanager
    def opened(self, path: Path, shape: Sequence[int]) -> Iterator[VoxelFile]:
        """Make the file of a map; what was not put into it by the end of the block is 0.

        Raises
        ------
        OSError
            If the disk is full, or there can be no such file.
        """
        outside, inside = (b"", self.header) if self.is_encoded else (self.header, b"")
        with path.open("w+b") as file:
            file.write(outside)
            stored = Packed(file, self.encoding, self.level, inside) if self.in_order else Raw(file, inside)
            yield VoxelFile(stored, self.dtype, tuple(shape))
            stored.finish(math.prod(shape) * self.dtype.itemsize)
            stored_bytes = file.seek(0, os.SEEK_END) - len(outside)
            place = outside.find(b"= " + b" " * _LETTERS)
            if place >= 0:
                file.seek(place + 2)
                file.write(b"%*d" % (_LETTERS, stored_bytes))

    def write(self, labels: NDArray[Any], path: Path) -> None:
        """Write a map, whose values may lie in memory in any order, in one pass.

        Raises
        ------
        OSError
            If the disk is full, or there can be no such file.
        """
        with self.opened(path, labels.shape) as voxels:
            voxels.put(whole(labels.shape), labels)


def _voxels_in(file: Path) -> tuple[int, Part, np.dtype[Any]]:
    """Return how many axes an image has, where its voxels lie, and as what."""
    row = format_of(file)
    assert row is not None, "the ending is one of ours"
    header = row.known_header(file)
    layout = header.layout
    if layout is None or layout.dtype is None or [part.path for part in layout.parts] != [file]:
        raise DamagedFileError(f"it is not known where {file.name} keeps its voxels")
    return len(header.shape), layout.parts[0], layout.dtype


def _with_sizes(header: bytes, row: _Row, old: Sequence[int], new: Sequence[int]) -> bytes:
    was, becomes = row.sizes(old), row.sizes(new)
    place = header.find(was) if row.place is None else row.place
    if place < 0 or not header.startswith(was, place):
        raise DamagedFileError(f"its header does not say the sizes {list(old)} as expected")
    return header[:place] + becomes + header[place + len(was) :]
