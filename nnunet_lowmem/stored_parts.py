"""Pieces of files that hold voxels, decoded to their end in bounded memory and counted.

An image may keep its voxels after its header, in another file, or slice by slice in many. Each piece is read here as
the library will read it: from the same place, as many bytes, by the same encoding.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from nnunet_lowmem.errors import DamagedFileError

GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 2**20
# a stream of deflate grows at most by this factor when it is decoded
INFLATION = 1032
_ANY_DEFLATE = zlib.MAX_WBITS | 32  # zlib's header or gzip's, whichever is there
_NUMBERED = re.compile(r"[^%]*%0?[0-9]{0,2}[diu][^%]*")


class Contents(NamedTuple):
    """What a file holds: shape of its array, values of a voxel included, and their type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Encoding(Enum):
    """How a piece holds its voxels."""

    RAW = "as they are"
    DEFLATE = "one stream of zlib or gzip"
    GZIP = "members of gzip, or as they are where there is none"
    TEXT = "in digits, of which the libraries notice themselves if they are too few"


@dataclass(frozen=True)
class Part:
    """One piece.

    Attributes
    ----------
    path : Path
    start : int
        First byte.
    needed_bytes : int
        Decoded, that the image takes from here.
    encoding : Encoding
    stored_bytes : int or None
        Encoded, where the header says so and no more is read.
    """

    path: Path
    start: int
    needed_bytes: int
    encoding: Encoding = Encoding.RAW
    stored_bytes: int | None = None

    def largest_bytes(self) -> int:
        """Return how much the piece can hold at most, by its size alone."""
        return self._size_bytes() * (1 if self.encoding is Encoding.RAW else INFLATION)

    def verify(self) -> None:
        """Read the piece to its end.

        Raises
        ------
        DamagedFileError
            If something is missing or changed.
        OSError
            If it cannot be read.
        """
        held_bytes = self._held_bytes()
        if held_bytes < self.needed_bytes:
            raise DamagedFileError(
                f"{self.path.name} ends after {held_bytes:,} of {self.needed_bytes:,} bytes of voxels"
            )

    def _size_bytes(self) -> int:
        if not self.path.is_file():
            raise DamagedFileError(f"its voxels should be in {self.path.name}, which is not there")
        return max(0, self.path.stat().st_size - self.start)

    def _held_bytes(self) -> int:
        size_bytes = self._size_bytes()
        if self.stored_bytes is not None and self.stored_bytes > size_bytes:
            raise DamagedFileError(f"{self.path.name} holds {size_bytes:,} of {self.stored_bytes:,} compressed bytes")
        if self.encoding is Encoding.RAW:
            return size_bytes
        if self.encoding is Encoding.TEXT:
            return self.needed_bytes
        with self.path.open("rb") as file:
            file.seek(self.start)
            return self._decoded_bytes(file)

    def _decoded_bytes(self, file: IO[bytes]) -> int:
        if self.encoding is Encoding.DEFLATE:
            return inflated_bytes(_limited(file, self.stored_bytes), self.path.name, self.needed_bytes)
        is_compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(self.start)
        if not is_compressed:
            return self._size_bytes()
        return inflated_bytes(file.read, self.path.name, self.needed_bytes, members=True)


def inflated_bytes(read: Callable[[int], bytes], name: str, needed_bytes: int, members: bool = False) -> int:
    """Decode a stream of zlib or gzip to its end, which checks its checksum, and count the bytes.

    Parameters
    ----------
    read : callable
        Gives so many bytes at most, none at the end.
    name : str
    needed_bytes : int
        For errors.
    members : bool
        Go on where another member of gzip follows. What else follows is ignored, as libraries do.

    Raises
    ------
    DamagedFileError
        If it ends too early or is changed.
    """
    held_bytes, stream = 0, zlib.decompressobj(_ANY_DEFLATE)
    waiting = b""
    while True:
        waiting = waiting or read(_CHUNK_BYTES)
        if not waiting:
            raise DamagedFileError(
                f"{name} ends within its compressed data (after {held_bytes:,} of {needed_bytes:,} bytes)"
            )
        try:
            held_bytes += len(stream.decompress(waiting, _CHUNK_BYTES))
        except zlib.error as error:
            raise DamagedFileError(f"{name}: {error} (after {held_bytes:,} of {needed_bytes:,} bytes)") from error
        waiting = stream.unconsumed_tail
        if stream.eof:
            waiting = stream.unused_data
            if len(waiting) < len(GZIP_MAGIC):
                waiting += read(_CHUNK_BYTES)
            if not (members and waiting.startswith(GZIP_MAGIC)):
                return held_bytes
            stream = zlib.decompressobj(_ANY_DEFLATE)


def numbered_names(pattern: str, numbers: Sequence[int]) -> list[str]:
    """Return the names that a pattern of printf makes of numbers.

    Raises
    ------
    DamagedFileError
        If it is no pattern for one number.
    """
    if not _NUMBERED.fullmatch(pattern):
        raise DamagedFileError(f"its header names its data by the pattern {pattern!r}, which is none for a number")
    return [pattern % number for number in numbers]


def _limited(file: IO[bytes], limit_bytes: int | None) -> Callable[[int], bytes]:
    """Return a function that reads no further than so many bytes."""
    if limit_bytes is None:
        return file.read
    end = file.tell() + limit_bytes
    return lambda count: file.read(max(0, min(count, end - file.tell())))
