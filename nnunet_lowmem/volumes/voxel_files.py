"""The voxels of a file that is being written: put box by box, and read again.

In a file that is not compressed a box lies where it lies. One that is takes its boxes in order, and its stream can be
entered anew every few MiB.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.types import Box
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.volumes.stored_parts import Encoding

BLOCK_BYTES = 2**22
_WINDOW_BITS = {Encoding.DEFLATE: zlib.MAX_WBITS, Encoding.GZIP: zlib.MAX_WBITS | 16}


class VoxelFile:
    """The voxels of a file, as `Frame.opened` gives them."""

    def __init__(self, stored: Stored, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._stored, self._dtype, self._shape = stored, dtype, shape

    def put(self, box: Box, values: NDArray[Any]) -> None:
        """Write the labels of a box, axes of the file; where voxels come in order, it lies behind all before."""
        for voxel, at in runs(box, self._shape, values):
            run = np.ascontiguousarray(values[at], self._dtype).reshape(-1).view(np.uint8).data
            self._stored.write(voxel * self._dtype.itemsize, run)

    def read(self, box: Box) -> NDArray[Any]:
        """Return a box of what has been put."""
        found = np.empty([part.stop - part.start for part in box], self._dtype)
        with self._stored.reading() as read:
            for voxel, at in runs(box, self._shape, found):
                target = found[at]
                held = read(voxel * self._dtype.itemsize, target.nbytes)
                target[...] = np.frombuffer(held, self._dtype).reshape(target.shape)
        return found


#: Returns some bytes of the voxels, from a place on; those that follow are asked for later.
Read = Callable[[int, int], bytes]


class Stored(Protocol):
    """The bytes of all voxels, as they would lie in memory."""

    def write(self, start: int, data: memoryview) -> None:
        """Put bytes, from a place on."""

    def reading(self) -> AbstractContextManager[Read]:
        """Give what reads; nothing is written in the block."""

    def finish(self, size_bytes: int) -> None:
        """Make what was never put 0, up to that size."""


class Raw:
    """Bytes as they are, behind `first`."""

    def __init__(self, file: BinaryIO, first: bytes) -> None:
        file.write(first)
        self._file, self._origin = file, file.tell()

    def write(self, start: int, data: memoryview) -> None:
        """Put bytes anywhere."""
        self._file.seek(self._origin + start)
        self._file.write(data)

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """Give what reads; zeros behind the end."""
        yield self._read

    def _read(self, start: int, count: int) -> bytes:
        self._file.seek(self._origin + start)
        return self._file.read(count).ljust(count, b"\0")

    def finish(self, size_bytes: int) -> None:
        """Make the rest a hole of the file."""
        self._file.truncate(self._origin + size_bytes)


class Packed:
    """A deflate stream, `first` at its head, that can be entered where its dictionary was emptied."""

    def __init__(self, file: BinaryIO, encoding: Encoding, level: int, first: bytes) -> None:
        self._file = file
        self._stream = zlib.compressobj(level, zlib.DEFLATED, _WINDOW_BITS[encoding])
        file.write(self._stream.compress(first))
        self._stop = 0
        # of which bytes it is not known whether they are in the file
        self._failure: OSError | None = None
        # which byte begins where in the file
        self._entries: list[tuple[int, int]] = []
        self._enter()

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Fail once and for all: what has left the stream does not come again."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            self._failure = OSError(*error.args)  # that one holds the frames it came from
            raise

    def _enter(self) -> None:
        self._file.write(self._stream.flush(zlib.Z_FULL_FLUSH))
        self._entries.append((self._stop, self._file.tell()))

    def write(self, start: int, data: memoryview) -> None:
        """Put bytes behind all that are there; between them are zeros."""
        assert start >= self._stop, "boxes come in the order of the file"
        with self._noting_failures():
            self._fill(start)
            self._add(data)

    def _fill(self, stop: int) -> None:
        while self._stop < stop:
            self._add(memoryview(bytes(min(stop - self._stop, BLOCK_BYTES))))

    def _add(self, data: memoryview) -> None:
        self._file.write(self._stream.compress(data))
        self._stop += len(data)
        if self._stop >= self._entries[-1][0] + BLOCK_BYTES:
            self._enter()

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """Give what reads."""
        with self._noting_failures():
            if self._stop > self._entries[-1][0]:
                self._enter()  # until then the last bytes are in no file
            end, reader = self._file.tell(), _Inflated(self._file)
            try:
                yield lambda at, count: reader.read(at, count, self._entries) if at < self._stop else bytes(count)
            finally:
                self._file.seek(end)

    def finish(self, size_bytes: int) -> None:
        """Add zeros up to that size, and end the stream."""
        with self._noting_failures():
            self._fill(size_bytes)
            self._file.write(self._stream.flush())


class _Inflated:
    """Reads on in a stream whose pieces are asked for in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at, self._held = -1, b""
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, start: int, count: int, entries: Sequence[tuple[int, int]]) -> bytes:
        entry, place = entries[bisect_right(entries, start, key=lambda each: each[0]) - 1]
        if not self._at <= start or self._at < entry:
            self._file.seek(place)
            self._at, self._held, self._stream = entry, b"", zlib.decompressobj(-zlib.MAX_WBITS)
        while self._at < start:
            skipped = self._next(start - self._at)
            assert skipped, "what is read has been written"
            self._at += len(skipped)
        pieces, left = [], count
        while left and (piece := self._next(left)):
            pieces.append(piece)
            left -= len(piece)
        self._at += count
        return b"".join(pieces).ljust(count, b"\0")

    def _next(self, most: int) -> bytes:
        while True:
            held = self._held or self._file.read(2**16)
            piece = self._stream.decompress(held, min(most, BLOCK_BYTES))
            self._held = self._stream.unconsumed_tail
            if piece or not held:
                return piece


def runs(box: Box, shape: Sequence[int], values: NDArray[Any]) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
    """Cut a box into pieces of a few MiB whose voxels follow each other in the file.

    Gives the first voxel's number, and which part of `values`, those of the box, it is. What of these was mapped for
    one is given back.
    """
    (z, y, x), (_, rows, columns) = box, shape
    wide = x.stop - x.start
    tall = 1 if wide < columns else min(y.stop - y.start, max(1, BLOCK_BYTES // (columns * values.itemsize)))
    deep = 1 if tall < rows else max(1, BLOCK_BYTES // (rows * columns * values.itemsize))
    for plane in range(z.start, z.stop, deep):
        for row in range(y.start, y.stop, tall):
            at = slice(plane - z.start, plane - z.start + deep), slice(row - y.start, row - y.start + tall)
            yield (plane * rows + row) * columns + x.start, (*at, slice(None))
        give_back(values)
