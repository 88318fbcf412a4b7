"""The voxels of an array in chunks, each of which is decoded as a whole, and as seldom as there is room to keep it.

A pass over a volume, and tiles that overlap, ask for parts of a chunk again and again. So the chunks that were asked
for last are kept, decoded, as many as a slab of tiles reaches into: each is decoded once a pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError, because
from nnunet_lowmem.names import shown
from nnunet_lowmem.types import Allocate, Box
from nnunet_lowmem.volumes.file_volume import StoredVolume
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.volumes.stored_parts import Box4, Chunked, Shape4

# decoded at a time where chunks are small
_RUN_BYTES = 2**24


#: Along which axes of the file a volume is gone through, and how many planes at a time: all parts of these are asked
#: for before the next ones are.
Passes = Sequence[tuple[int, int]]


def native(array: Chunked) -> np.dtype[Any]:
    """Return the type of an array in the byte order of this machine."""
    return array.dtype.newbyteorder("=")


def _grid(array: Chunked) -> list[int]:
    return [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]


def slots_for(array: Chunked, passes: Passes) -> int:
    """Return how many chunks the largest slab reaches into that is asked for at a time, in all channels."""
    channels, *counts = _grid(array)
    most = 1
    for axis, depth in passes:
        layers = min(counts[axis], (depth - 1) // array.chunks[1 + axis] + 2)
        most = max(most, layers * math.prod(counts) // counts[axis])
    return channels * most


def kept_bytes(array: Chunked, passes: Passes) -> int:
    """Return what `Chunks` keeps for such passes."""
    return slots_for(array, passes) * math.prod(array.chunks) * array.dtype.itemsize


def decoding_bytes(array: Chunked) -> int:
    """Return what is held while chunks are decoded: encoded, decoded, and in the byte order of this machine."""
    return 3 * max(_RUN_BYTES, math.prod(array.chunks) * array.dtype.itemsize)


class Chunks:
    """An array with the chunks of it that were asked for last.

    Parameters
    ----------
    array : Chunked
    slots : int
        How many are kept.
    make : callable
        Makes what they are kept in: in a file, as a rule.
    """

    def __init__(self, array: Chunked, slots: int, make: Allocate) -> None:
        self.array = array
        self._voxels = make((slots, *array.chunks), native(array))
        self._free = list(range(slots))
        # which slot a chunk is in, the one that was asked for longest ago first
        self._slots: dict[Shape4, int] = {}
        self._lock = threading.Lock()

    def read(self, channel: int, box: Box) -> NDArray[Any]:
        """Return a box of a channel."""
        found = np.empty([part.stop - part.start for part in box], native(self.array))
        if not found.size:
            return found
        wanted: Box4 = (slice(channel, channel + 1), *box)
        of_axes = [range(part.start // size, -(-part.stop // size)) for part, size in self._by_axis(wanted)]
        with self._lock:
            for c, z, y in product(*of_axes[:3]):
                missing = []
                for x in of_axes[3]:
                    if (chunk := (c, z, y, x)) in self._slots:
                        self._take(chunk, wanted, found)
                    else:
                        missing.append(chunk)
                for run in self._runs(missing):
                    self._load(run)
                    for chunk in run:
                        self._take(chunk, wanted, found)
            give_back(self._voxels)
        return found

    def _by_axis(self, box: Box4) -> Iterator[tuple[slice, int]]:
        return zip(box, self.array.chunks, strict=True)

    def _runs(self, chunks: Sequence[Shape4]) -> Iterator[list[Shape4]]:
        """Cut chunks of a row into those that are decoded at a time, no more than there are slots."""
        most = min(_most(self.array), len(self._voxels))
        run: list[Shape4] = []
        for chunk in chunks:
            if run and (run[-1][3] + 1 != chunk[3] or len(run) == most):
                yield run
                run = []
            run.append(chunk)
        if run:
            yield run

    def _load(self, run: Sequence[Shape4]) -> None:
        voxels = decoded(self.array, run)
        for number, chunk in enumerate(run):
            slot = self._free.pop() if self._free else self._slots.pop(next(iter(self._slots)))
            part = voxels[..., number * self.array.chunks[3] : (number + 1) * self.array.chunks[3]]
            self._voxels[slot][tuple(map(slice, part.shape))] = part
            self._slots[chunk] = slot

    def _take(self, chunk: Shape4, wanted: Box4, found: NDArray[Any]) -> None:
        """Copy what is wanted of a chunk."""
        slot = self._slots[chunk] = self._slots.pop(chunk)
        here, there = [], []
        for number, (part, size) in zip(chunk, self._by_axis(wanted), strict=True):
            low, high = max(part.start, number * size), min(part.stop, (number + 1) * size)
            here.append(slice(low - number * size, high - number * size))
            there.append(slice(low - part.start, high - part.start))
        found[tuple(there[1:])] = self._voxels[slot][tuple(here)][0]


def _most(array: Chunked) -> int:
    """Return how many chunks of a row are decoded at a time."""
    return max(1, _RUN_BYTES // (math.prod(array.chunks) * array.dtype.itemsize))


def decoded(array: Chunked, run: Sequence[Shape4]) -> NDArray[Any]:
    """Decode chunks that follow each other along the last axis.

    Raises
    ------
    UsageError
        With the chunk that cannot be decoded.
    """
    try:
        return array.read(_box(array, run)).astype(native(array), copy=False)
    except MemoryError:
        raise
    except Exception as error:
        for chunk in run if len(run) > 1 else ():
            decoded(array, [chunk])
        told = shown(" ".join(str(error).split()) or type(error).__name__)
        raise because(UsageError, f"{array.name_of(run[0])} cannot be decoded: {told}", error) from error


def read_whole(array: Chunked, target: NDArray[Any]) -> None:
    """Decode all of an array into one of its shape."""
    for box, voxels in _pieces(array):
        target[box] = voxels
        give_back(target)


def verify_chunks(array: Chunked) -> None:
    """Decode all of an array and keep nothing of it.

    Raises
    ------
    UsageError
        With the chunk that cannot be decoded.
    """
    for _ in _pieces(array):
        pass


def _pieces(array: Chunked) -> Iterator[tuple[Box4, NDArray[Any]]]:
    """Decode each chunk once, some of a row at a time."""
    channels, planes, rows, columns = _grid(array)
    most = _most(array)
    for c, z, y, x in product(range(channels), range(planes), range(rows), range(0, columns, most)):
        run = [(c, z, y, number) for number in range(x, min(columns, x + most))]
        yield _box(array, run), decoded(array, run)


def _box(array: Chunked, run: Sequence[Shape4]) -> Box4:
    """Return the box of chunks that follow each other along the last axis."""
    ends = zip(run[0], run[-1], array.chunks, array.shape, strict=True)
    c, z, y, x = (slice(low * size, min((high + 1) * size, most)) for low, high, size, most in ends)
    return c, z, y, x


@dataclass(frozen=True)
class ChunkedVolume(StoredVolume):
    """One channel of an array in chunks.

    Attributes
    ----------
    chunks : Chunks
    channel : int
    """

    chunks: Chunks
    channel: int = 0

    def _read(self) -> NDArray[Any]:
        return self.chunks.read(self.channel, self.box)


def channels_of(array: Chunked, passes: Passes, make: Allocate) -> list[ChunkedVolume]:
    """Return the channels of an array, which share what is kept of its chunks.

    Parameters
    ----------
    array : Chunked
    passes : Passes
    make : callable
        Makes what chunks are kept in.
    """
    chunks = Chunks(array, slots_for(array, passes), make)
    channels, z, y, x = array.shape
    box = (slice(0, z), slice(0, y), slice(0, x))
    stored = native(array)
    return [ChunkedVolume(stored, (0, 1, 2), box, False, chunks, channel) for channel in range(channels)]
