"""Where an NRRD (.nrrd, .nhdr) keeps its voxels.

ITK's reader notices what is missing, but stops reading a gzip stream before its checksum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.headers import Header, Layout, is_plain, stored_spacing
from nnunet_lowmem.volumes.stored_parts import MOST_FILES, Encoding, Part, numbered_names, whole_number

_HEADER_LIMIT_BYTES, _CHUNK_BYTES = 2**24, 2**16
_END = re.compile(rb"\n\r?\n|\r\r")
_DIGITS = ("ascii", "text", "txt")
_ORDERS: dict[str, Literal["<", ">", "="]] = {"little": "<", "big": ">"}
_ENCODINGS = {"raw": Encoding.RAW, "gzip": Encoding.GZIP, "gz": Encoding.GZIP}
_DATA_FILE = "data file"
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\r|\n|$)")
_LONGEST_LINE, _SHOWN = 500, 40
_MAY_BE_LONG = re.compile(r"(?i)#|.*?:=|(content|labels|units|sample units|space units):")
_PATTERN = re.compile(r"%[0-9]*d\S*\s+\S")
_ALIASES = {"datafile": _DATA_FILE, "lineskip": "line skip", "byteskip": "byte skip"}


class Raw(NamedTuple):
    """The fields of a header, names in lower case, and where the voxels or the list of their files begin."""

    fields: dict[str, str]
    end: int


def raw_header(path: Path) -> Raw:
    """Return the header as it is stored.

    Raises
    ------
    DamagedFileError
        If it has no end, or a line at which ITK ends the process: too long for the message that it is none.
    OSError
        If it cannot be read.
    """
    fields: dict[str, str] = {}
    end = path.stat().st_size
    for line, line_end in _lines(path):
        if len(line) > _LONGEST_LINE and not _MAY_BE_LONG.match(line):
            raise DamagedFileError(f"its header has a line of {len(line)} letters, {line[:_SHOWN]!r}...")
        key, found, value = line.partition(":")
        # "key:=value" is somebody's note, and no field
        if found and not value.startswith("=") and not line.startswith("#"):
            fields[_ALIASES.get(key.strip().lower(), key.strip().lower())] = value.strip()
        if not line.strip() or fields.get(_DATA_FILE, "").startswith("LIST"):
            end = line_end
            break
    else:
        if _DATA_FILE not in fields:
            raise DamagedFileError(f"{path.name} ends within its header")
    data = path.parent / fields.get(_DATA_FILE, "")
    if data.exists() and not (data.is_file() or data.is_dir()):  # ITK would wait for a pipe
        raise DamagedFileError(f"its voxels should be in {data.name}, which is no file")
    return Raw(fields, end)


def layout(path: Path, raw: Raw, header: Header) -> Layout:
    """Return where ITK looks for the voxels.

    Raises
    ------
    DamagedFileError
        If the header does not say where they are.
    OSError, ValueError
        If it cannot be read.
    """
    fields, end = raw
    order = "=" if header.dtype.itemsize == 1 else _ORDERS.get(fields.get("endian", "").lower())
    parts, skipped = _parts(path, fields, end, header), whole_number(fields.get("byte skip", ""))
    if fields.get("encoding", "").lower() in _DIGITS:
        for part in parts:
            _check_digits(part, header.voxels * header.components // len(parts))
    # of compressed voxels, the last ones are found by the library alone
    is_found = skipped >= 0 or (skipped == -1 and all(part.is_raw for part in parts))
    is_known = is_found and is_plain(fields) and all(part.encoding is not Encoding.TEXT for part in parts)
    dtype = header.dtype.newbyteorder(order) if order and is_known else None
    return Layout(tuple(parts), dtype, _spacing(fields, len(header.shape)))


def _check_digits(part: Part, count: int) -> None:
    """Refuse words too long for ITK's message that they are no numbers: it ends the process."""
    held = b""
    with part.path.open("rb") as file:
        file.seek(part.start)
        while count > 0 and (piece := file.read(_CHUNK_BYTES)):
            *words, held = re.split(rb"[\s,]+", held + piece)
            count -= sum(map(bool, words))
            longest = max(map(len, [*words, held] if count > 0 else words), default=0)
            if longest > _LONGEST_LINE:
                raise DamagedFileError(f"{part.path.name} has a word of {longest} letters among its numbers")


def _spacing(fields: dict[str, str], axes: int) -> tuple[float, ...]:
    """Lengths of the axes' vectors, or the spacings; an axis of values has none, or NaN."""
    if "space directions" in fields:
        vectors = fields["space directions"].replace("none", " ").replace(")", " ").split("(")[1:]
        return tuple(math.hypot(*stored_spacing(vector.split(","))) for vector in vectors)
    steps = stored_spacing(fields.get("spacings", "").split())
    return steps if len(steps) <= axes else tuple(step for step in steps if not math.isnan(step))


def _parts(path: Path, fields: dict[str, str], end: int, header: Header) -> list[Part]:
    if _DATA_FILE not in fields:
        return [_part(path, end, header.needed_bytes, fields)]
    names = _names(path, end, fields[_DATA_FILE], math.prod(header.shape[:-1]))
    return [_part(path.parent / name, 0, header.needed_bytes // len(names), fields) for name in names]


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Lines of the header and where each ends, whatever ends it."""
    block = b""
    with path.open("rb") as file:
        while len(block) < _HEADER_LIMIT_BYTES and not _END.search(block) and (more := file.read(_CHUNK_BYTES)):
            block += more
    for line in _LINE.finditer(block):
        text = line[1].decode("utf-8", "surrogateescape")
        if line[0]:
            yield text, line.end()
        if not text.strip():
            return


def _names(path: Path, end: int, where: str, most: int) -> list[str]:
    """Names of files, a row of voxels or more in each."""
    if where.startswith("LIST"):
        with path.open("rb") as file:
            file.seek(end)
            lines = islice(file, MOST_FILES)
            names = [line.decode("utf-8", "surrogateescape").strip() for line in lines if line.strip()]
    elif _PATTERN.search(where):
        words = where.split()
        first, last, step = (int(word) for word in words[1:4])
        numbers = range(first, last + (1 if step > 0 else -1), step)
        names = numbered_names(words[0], numbers if len(numbers) <= min(most, MOST_FILES) else ())
    else:
        names = [where]
    if not names:
        raise DamagedFileError("its header names no file with its voxels")
    return names


def _part(path: Path, start: int, needed_bytes: int, fields: dict[str, str]) -> Part:
    """One file: lines are skipped as they are stored, bytes once they are decoded; −1 says that the last ones count."""
    encoding = _ENCODINGS.get(fields.get("encoding", "").lower(), Encoding.TEXT)
    lines, skipped = whole_number(fields.get("line skip", "")), whole_number(fields.get("byte skip", ""))
    if lines > 0 and path.is_file():
        with path.open("rb") as file:
            file.seek(start)
            while lines and file.readline():
                lines -= 1
            start = file.tell()
    part = Part(path, start, needed_bytes, encoding, skipped_bytes=max(0, skipped))
    if skipped == -1 and path.is_file() and part.is_raw:
        return replace(part, start=max(0, path.stat().st_size - needed_bytes))
    return part
