"""The files of labels that are kept before their case is finished: a line, then boxes of the label map.

Chunks are appended, each a box with a checksum, so that what a kill or a power cut has torn is the last one and shows
itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import common, joined
from nnunet_lowmem.types import Box, Shape3

# start and stop along three axes, bytes, and a checksum of these and of what follows
_CHUNK = struct.Struct("<7QI")


@dataclass(frozen=True)
class Key:
    """What labels can be continued by.

    Attributes
    ----------
    made_with : str
        Checksum of model, options, input and torch.
    shape : int, 3
        Of the label map, axes of the network.
    dtype : str
    arithmetic : str
        In which the network was run.
    """

    made_with: str
    shape: Shape3
    dtype: str
    arithmetic: str

    @property
    def line(self) -> bytes:
        """With which a file begins."""
        return json.dumps([vars(self)[name] for name in Key.__annotations__]).encode() + b"\n"


def joined_boxes(boxes: Iterable[Box]) -> list[Box]:
    """Return boxes of which those are one that follow each other by planes."""
    made: list[Box] = []
    for box in boxes:
        append(made, box, by_planes=True)
    return made


def append(boxes: list[Box], box: Box, by_planes: bool = False) -> None:
    """Add a box that holds a voxel to those before, which it may make longer; or by planes alone, in their order."""
    if not voxels([box]):
        return
    fits = bool(boxes) and (not by_planes or boxes[-1][1:] == box[1:])
    longer = joined(boxes[-1], box) if fits else None
    boxes[-1:] = [longer] if longer is not None else [*boxes[-1:], box]


def voxels(boxes: Sequence[Box]) -> int:
    """Return how many voxels boxes hold."""
    return sum(math.prod(part.stop - part.start for part in box) for box in boxes)


def some_mib(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box into such of some MiB."""
    planes, rows, columns = box
    depth = max(1, 2**22 // (voxels([(slice(0, 1), rows, columns)]) * itemsize))
    for start in range(planes.start, planes.stop, depth):
        yield slice(start, min(start + depth, planes.stop)), rows, columns


def packed(box: Box, labels: NDArray[Any]) -> bytes:
    """Return a chunk of a file."""
    data = zlib.compress(labels.tobytes(), 1)
    return _CHUNK.pack(*_head(box, data), _checksum(box, data)) + data


def _head(box: Box, data: bytes) -> list[int]:
    return [*(end for part in box for end in (part.start, part.stop)), len(data)]


def _checksum(box: Box, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_CHUNK.pack(*_head(box, data), 0)))


class Chunk(NamedTuple):
    """Labels of a box, and where in the file they end."""

    box: Box
    values: NDArray[Any]
    stop: int


@dataclass(frozen=True)
class Earlier:
    """What a file of an earlier run holds: boxes, in its first `size_bytes`."""

    file: Path
    boxes: list[Box]
    size_bytes: int


def kept(files: Iterable[Path], key: Key) -> list[Earlier]:
    """Return the files by which a case can be continued, those that hold most, as far as they hold different voxels."""
    earlier = [found for file in files if (found := _found_in(file, key)) is not None]
    taken: list[Earlier] = []
    for found in sorted(earlier, key=lambda found: -voxels(found.boxes)):
        if not any(common(box, other) for box in found.boxes for one in taken for other in one.boxes):
            taken.append(found)
    return sorted(taken, key=lambda found: [part.start for part in found.boxes[0]])


def _found_in(file: Path, key: Key) -> Earlier | None:
    boxes: list[Box] = []
    for chunk in chunks(file, key):
        append(boxes, chunk.box, by_planes=True)
    return Earlier(file, boxes, chunk.stop) if boxes else None


def copy(earlier: Earlier, file: BinaryIO, start: int) -> None:
    """Append what a file of others holds from a byte on.

    Raises
    ------
    OSError
        If it is not all there any more.
    """
    left = earlier.size_bytes - start
    with earlier.file.open("rb") as source:
        source.seek(start)
        while left and (data := source.read(min(left, 2**22))):
            left -= file.write(data)
    if left:
        raise OSError(f"{earlier.file} has been cut")


def chunks(file: Path, key: Key, stop: int | None = None) -> Iterator[Chunk]:
    """Give the whole chunks of a file up to a byte, and where each ends; nothing of one with another key."""
    itemsize = np.dtype(key.dtype).itemsize
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.readline(len(key.line)) != key.line:
            return
        while stream.tell() != stop and len(head := stream.read(_CHUNK.size)) == _CHUNK.size:
            *ends, size, checksum = _CHUNK.unpack(head)
            box = slice(*ends[:2]), slice(*ends[2:4]), slice(*ends[4:])
            inside = all(part.start < part.stop <= full for part, full in zip(box, key.shape, strict=True))
            data = stream.read(size) if inside and size <= 2 * voxels([box]) * itemsize + 2**10 else b""
            if not data or len(data) != size or _checksum(box, data) != checksum:
                return
            shape = [part.stop - part.start for part in box]
            yield Chunk(box, np.frombuffer(zlib.decompress(data), key.dtype).reshape(shape), stream.tell())
