"""Where a MetaImage (.mha, .mhd) keeps its voxels, by the rules of the MetaIO library that ITK reads it with.

MetaIO does not look whether a compressed stream gives as much as the image needs: what is missing keeps whatever the
memory held before. Nor does it notice a list of files that is too short. The rules below were found by experiments with
SimpleITK, and ``tests/preprocessing/test_reading.py`` has a row for each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.headers import Header, Layout, is_plain, stored_spacing
from nnunet_lowmem.volumes.stored_parts import MOST_FILES, Encoding, Part, numbered_names, whole_number

_HEADER_LIMIT_BYTES = 2**24
_LAST_FIELD = "ElementDataFile"
_REAL = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*[=:][\s=:]*")
_PER_AXIS = ("DimSize", "ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation")
_PER_TWO_AXES = ("TransformMatrix", "Rotation", "Orientation")
_NUMBERS = {
    "ElementMin": 1, "ElementMax": 1, "Color": 4,
    "ElementToIntensityFunctionSlope": 1, "ElementToIntensityFunctionOffset": 1,
}  # fmt: skip
_MOST_AXES, _LONGEST_NAME, _SHOWN = 10, 255, 40
_PATTERN_WORDS = 4


class Raw(NamedTuple):
    """The fields of a header, where it ends (after ElementDataFile), and whether each is in a line of its own."""

    fields: dict[str, str]
    end: int
    is_known: bool


def raw_header(path: Path) -> Raw:
    """Return the header as it is stored.

    Raises
    ------
    DamagedFileError
        If it has no end, or a field at which MetaIO ends the process or never returns.
    OSError
        If it cannot be read.
    """
    fields: dict[str, str] = {}
    is_known = True
    with path.open("rb") as file:
        while file.tell() < _HEADER_LIMIT_BYTES and (line := file.readline(_HEADER_LIMIT_BYTES)):
            key, found, value = map(
                str.strip, _SEPARATOR.sub("=", line.decode("utf-8", "surrogateescape"), count=1).partition("=")
            )
            if found:
                _check_field(key, value)
                fields[key] = value
            elif key.startswith("CompressedData"):
                raise DamagedFileError(
                    "its header has a line CompressedData without a value: MetaIO takes one elsewhere"
                )
            elif key:
                is_known = False  # MetaIO takes the name of a field from one line and its value from another
            if key == _LAST_FIELD:
                return Raw({_LAST_FIELD: "", **fields}, file.tell(), is_known)
    raise DamagedFileError(f"{path.name} ends within its header")


def _check_field(key: str, value: str) -> None:
    if key == "NDims" and not 0 <= _number(value) <= _MOST_AXES:
        raise DamagedFileError(f"its header says NDims = {value[:_SHOWN]}; {_MOST_AXES} are the most")
    if key == "Name" and len(value) > _LONGEST_NAME:
        raise DamagedFileError(f"its header has a Name of {len(value)} letters; {_LONGEST_NAME} are the most")


def layout(path: Path, raw: Raw, header: Header) -> Layout:
    """Return where MetaIO looks for the voxels.

    Raises
    ------
    DamagedFileError
        If the header names too few files, or names them in a way that MetaIO does not read.
    OSError
        If a list of files cannot be read.
    """
    fields, end, is_known = raw
    axes = len(header.shape)
    due = _NUMBERS | dict.fromkeys(_PER_AXIS, axes) | dict.fromkeys(_PER_TWO_AXES, axes * axes)
    counts = {key: len(fields[key].split()) for key in fields.keys() & due.keys()}
    # where numbers are missing, MetaIO looks for them in the next line, and that field is lost
    for key, below in pairwise(fields) if _is_true(fields.get("CompressedData", "")) else ():
        if below.startswith("CompressedData") and key in counts and counts[key] < due[key]:
            told = f"its {key} has {counts[key]} of {due[key]} numbers"
            raise DamagedFileError(f"{told}: MetaIO does not find {below} below, and loses compressed bytes")
    has_all = all(count == due[key] for key, count in counts.items())
    is_known = is_known and is_plain(fields) and has_all and _is_true(fields.get("BinaryData", "True"))
    is_swapped = _is_true(fields.get("BinaryDataByteOrderMSB") or fields.get("ElementByteOrderMSB", ""))
    spacing = fields.get("ElementSpacing") or fields.get("ElementSize") or ""
    return Layout(
        tuple(_parts(path, fields, end, header)),
        header.dtype.newbyteorder(">" if is_swapped else "<") if is_known else None,
        stored_spacing(spacing.split()),
    )


def _parts(path: Path, fields: dict[str, str], end: int, header: Header) -> list[Part]:
    where, sizes = fields[_LAST_FIELD], header.shape[::-1]
    whole_bytes = header.needed_bytes
    if where in ("LOCAL", "Local", "local"):
        return [_part(path, end, whole_bytes, fields)]
    if where.startswith("LIST"):  # LISTE.raw, too
        names, needed = _listed(path, end, where, sizes)
    elif "%" in where:
        names, needed = _numbered(where, sizes)
    else:
        names, needed = [where], 1
    if len(names) < needed:
        raise DamagedFileError(f"its header names {len(names)} of {needed} files with its voxels")
    return [_part(path.parent / name, 0, whole_bytes // needed, fields) for name in names[:needed]]


def _part(path: Path, start: int, needed_bytes: int, fields: dict[str, str]) -> Part:
    """One file: a positive HeaderSize counts from its beginning, −1 says that the voxels are its last bytes."""
    skip, is_packed = whole_number(fields.get("HeaderSize", "")), _is_true(fields.get("CompressedData", ""))
    if 0 < skip < start:
        raise DamagedFileError(f"its HeaderSize is {skip:,}, within the {start:,} bytes of its header")
    if skip > 0:
        start = skip
    elif skip == -1 and path.is_file():
        # what is cut lacks bytes at its end, and takes none of its header; a stream is not found from there
        start = max(0 if is_packed else start, path.stat().st_size - needed_bytes)
    if not _is_true(fields.get("BinaryData", "True")):
        return Part(path, start, needed_bytes, Encoding.TEXT)
    if not is_packed:
        return Part(path, start, needed_bytes)
    stored_bytes = whole_number(fields.get("CompressedDataSize", ""))
    if stored_bytes:
        return Part(path, start, needed_bytes, Encoding.DEFLATE, stored_bytes)
    if start:
        raise DamagedFileError(
            "its header lacks CompressedDataSize, without which its compressed voxels are not found after byte "
            f"{start:,} of {path.name}"
        )
    return Part(path, 0, needed_bytes, Encoding.DEFLATE)


def _listed(path: Path, end: int, where: str, sizes: Sequence[int]) -> tuple[list[str], int]:
    """Names that follow the header, one a line, each for so many axes as the number after LIST says."""
    axes = whole_number(" ".join(where.split()[1:2]))
    if axes == 0 or axes > len(sizes):
        axes = len(sizes) - 1
    if axes == len(sizes):
        raise DamagedFileError(f"its header says {where}, a list of files that ITK does not read")
    needed = _countable(math.prod(sizes[axes:]))
    with path.open("rb") as file:
        file.seek(end)
        # MetaIO forgets a last line that nothing ends
        lines = [line for line in islice(file, needed) if line.endswith(b"\n")]
    return [line.decode("utf-8", "surrogateescape").rstrip() for line in lines], needed


def _numbered(where: str, sizes: Sequence[int]) -> tuple[list[str], int]:
    """Names by a pattern, the first number, the last and the step."""
    needed, words = _countable(sizes[-1]), where.split()
    numbers = [whole_number(word) for word in words[1:]]
    first = numbers[0] if numbers else 1
    last = numbers[1] if len(numbers) > 1 else first + needed - 1
    step = numbers[2] if len(numbers) > 2 else (last - first) // needed if len(numbers) > 1 else 1
    if step < 1 or len(words) > _PATTERN_WORDS:
        raise DamagedFileError(f"its header names its data by {where!r}, which ITK cannot read")
    return numbered_names(words[0], range(first, last + 1, step)[:needed]), needed


def _countable(files: int) -> int:
    if files > MOST_FILES:
        raise DamagedFileError(
            f"its header says that its voxels are in {files:,} files, and {MOST_FILES:,} are the most"
        )
    return files


def _is_true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")


def _number(text: str) -> float:
    """As C reads it; without digits it is 0."""
    found = _REAL.match(text)
    return float(found[0]) if found else 0
