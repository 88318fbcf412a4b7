"""Pieces of files that hold voxels, decoded to their end in bounded memory.

An image may keep its voxels after its header, in another file, or slice by slice in many. Each piece is read here as
the library will read it: from the same place, as many bytes, by the same encoding.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError

GZIP_MAGIC = b"\x1f\x8b"
#: Into which an image can be cut: more planes than any volume has.
MOST_FILES = 2**17
_CHUNK_BYTES = 2**20
# what is left of a piece is copied at the end of every member
_STORED_CHUNK_BYTES = 2**16
# a stream of deflate grows at most by this factor when it is decoded
_INFLATION = 1032
# a digit and a space are two bytes, the longest number eight
_TEXT_INFLATION = 4
# more than deflate, LZW, JPEG or a scanner's black page come to
_PICTURE_INFLATION = 2**14
_ANY_DEFLATE = zlib.MAX_WBITS | 32  # zlib's header or gzip's, whichever is there
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}")
_NUMBERED = re.compile(r"[^%]*%0?[0-9]{0,2}[diu][^%]*")


class Contents(NamedTuple):
    """What a file holds: shape of its array, values of a voxel included, and their type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


#: Channels, z, y, x.
Box4 = tuple[slice, slice, slice, slice]
Shape4 = tuple[int, int, int, int]


class Chunked(Protocol):
    """An array in chunks: channels, z, y, x."""

    @property
    def shape(self) -> Shape4:
        """Of the array."""

    @property
    def chunks(self) -> Shape4:
        """Of a chunk; the last ones along an axis may be cut."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """In any byte order."""

    def read(self, box: Box4) -> NDArray[Any]:
        """Decode a box of whole chunks; what is wrong with them is raised as it comes."""

    def name_of(self, chunk: Shape4) -> str:
        """Return what a chunk is called, by its place in the grid of chunks."""


class Encoding(Enum):
    """How a piece holds its voxels."""

    RAW = "as they are"
    DEFLATE = "one stream of zlib or gzip"
    GZIP = "members of gzip, or as they are where there is none"
    TEXT = "in digits or by other means, of which the libraries notice themselves if they are too few"


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
    skipped_bytes : int
        Decoded, before those that the image takes.
    """

    path: Path
    start: int
    needed_bytes: int
    encoding: Encoding = Encoding.RAW
    stored_bytes: int | None = None
    skipped_bytes: int = 0

    @cached_property
    def is_raw(self) -> bool:
        """Whether the file holds these bytes as they are, one after the other."""
        if self.encoding is not Encoding.GZIP:
            return self.encoding is Encoding.RAW
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(len(GZIP_MAGIC)) != GZIP_MAGIC

    def largest_bytes(self) -> int:
        """Return how much of what is needed the piece can hold at most, by its size alone.

        Raises
        ------
        DamagedFileError
            If there is no such file.
        """
        size_bytes = self._size_bytes()
        factor = _TEXT_INFLATION if self.encoding is Encoding.TEXT else 1 if self.is_raw else _INFLATION
        return max(0, size_bytes * factor - self.skipped_bytes)

    def verify(self) -> None:
        """Read the piece to its end, its checksum included where it has one.

        Raises
        ------
        DamagedFileError
            If something is missing or changed.
        OSError
            If it cannot be read.
        """
        size_bytes = self._size_bytes()
        if self.encoding is Encoding.TEXT:
            return
        held_bytes = size_bytes if self.is_raw else sum(map(len, self._decoded()))
        self._check_count(held_bytes - self.skipped_bytes)

    def read_into(self, target: memoryview) -> None:
        """Verify the piece and keep what is needed of it.

        Parameters
        ----------
        target : memoryview of bytes
            `needed_bytes` long.

        Raises
        ------
        DamagedFileError
            If something is missing or changed.
        OSError
            If it cannot be read.
        """
        self._size_bytes()
        self._check_count(self._copy_into(target) if self.is_raw else self._decode_into(target))

    def _check_count(self, held_bytes: int) -> None:
        if held_bytes < self.needed_bytes:
            raise DamagedFileError(
                f"{self.path.name} ends after {max(0, held_bytes):,} of {self.needed_bytes:,} bytes of voxels"
            )

    def _size_bytes(self) -> int:
        if not self.path.is_file():
            raise DamagedFileError(f"its voxels should be in {self.path.name}, which is not there")
        size_bytes = max(0, self.path.stat().st_size - self.start)
        if self.stored_bytes is not None and self.stored_bytes > size_bytes:
            raise DamagedFileError(f"{self.path.name} holds {size_bytes:,} of {self.stored_bytes:,} compressed bytes")
        return size_bytes

    def _copy_into(self, target: memoryview) -> int:
        """Read what is needed and no more; return how much there is."""
        filled = 0
        with self.path.open("rb") as file:
            file.seek(self.start + self.skipped_bytes)
            while count := file.readinto(target[filled : filled + _CHUNK_BYTES]):
                filled += count
        return filled

    def _decode_into(self, target: memoryview) -> int:
        position = -self.skipped_bytes
        for piece in self._decoded():
            begin, end = max(0, position), min(position + len(piece), self.needed_bytes)
            if begin < end:
                target[begin:end] = piece[begin - position : end - position]
            position += len(piece)
        return position

    def _decoded(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            end = sys.maxsize if self.stored_bytes is None else self.start + self.stored_bytes

            def read(count: int) -> bytes:
                return file.read(max(0, min(count, end - file.tell())))

            needed_bytes = self.skipped_bytes + self.needed_bytes
            yield from _inflated(read, self.path.name, needed_bytes, self.encoding is Encoding.GZIP)


def _inflated(read: Callable[[int], bytes], name: str, needed_bytes: int, members: bool) -> Iterator[bytes]:
    """Decode a stream of zlib or gzip to its end, which checks its checksum.

    Parameters
    ----------
    read : callable
        Gives so many bytes at most, none at the end.
    name : str
    needed_bytes : int
        What follows the member that completes these is ignored, as libraries do.
    members : bool
        Go on where another member of gzip follows.

    Raises
    ------
    DamagedFileError
        If it ends too early or is changed.
    """
    held_bytes, stream = 0, zlib.decompressobj(_ANY_DEFLATE)
    waiting = b""
    while True:
        waiting = waiting or read(_STORED_CHUNK_BYTES)
        if not waiting:
            raise DamagedFileError(
                f"{name} ends within its compressed data (after {held_bytes:,} of {needed_bytes:,} bytes)"
            )
        try:
            piece = stream.decompress(waiting, _CHUNK_BYTES)
        except zlib.error as error:
            raise DamagedFileError(f"{name}: {error} (after {held_bytes:,} of {needed_bytes:,} bytes)") from error
        held_bytes += len(piece)
        yield piece
        waiting = stream.unconsumed_tail
        if stream.eof:
            if held_bytes >= needed_bytes:
                return
            waiting = stream.unused_data
            if len(waiting) < len(GZIP_MAGIC):
                waiting += read(_STORED_CHUNK_BYTES)
            if not (members and waiting.startswith(GZIP_MAGIC)):
                return
            stream = zlib.decompressobj(_ANY_DEFLATE)


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first decoded bytes, a header's, of a file that may be compressed.

    Raises
    ------
    DamagedFileError
        If it ends earlier, or is changed.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        held = file.read(count)
        if held.startswith(GZIP_MAGIC):
            file.seek(0)
            pieces, held = _inflated(file.read, path.name, count, members=True), b""
            while len(held) < count and (piece := next(pieces, None)) is not None:
                held += piece[: count - len(held)]
    if len(held) < count:
        raise DamagedFileError(f"it ends within its header, after {len(held)} of {count} bytes")
    return held


def check_promise(what: str, promised_bytes: int, file_bytes: int) -> None:
    """Refuse what a picture's file cannot hold however it is compressed, before memory is taken for it.

    Raises
    ------
    DamagedFileError
        With both numbers.
    """
    if promised_bytes > _PICTURE_INFLATION * file_bytes:
        raise DamagedFileError(
            f"{what} promises {promised_bytes:,} bytes, and a file of {file_bytes:,} bytes cannot hold them"
        )


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


def whole_number(text: str) -> int:
    """Read a number as C does: what follows the digits is ignored, and without any it is 0."""
    found = _NUMBER.match(text)
    return int(found[0]) if found else 0


def encoding_by_name(path: Path) -> Encoding:
    """Return GZIP for what is named so: libraries decode it, and find out themselves whether it is compressed."""
    return Encoding.GZIP if path.name.lower().endswith(".gz") else Encoding.RAW
