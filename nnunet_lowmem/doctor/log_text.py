"""A log as lines of text: from a file or a pipe, in whichever encoding, however long."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nnunet_lowmem.errors import UsageError, because, twin
from nnunet_lowmem.names import shown

STANDARD_INPUT = "-"

_READ_BYTES = 2**20
# a line is cut here: bars that are drawn over one another, or no text at all
_LONGEST = 2**12
# of the beginning, by which the encoding is told
_JUDGED_BYTES = 2**16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# of a log that was emptied while it was written
_ZEROS = bytes(16)
_PACKED = {
    b"\x1f\x8b": "zcat",
    b"BZh": "bzcat",
    b"\xfd7zXZ": "xzcat",
    b"\x28\xb5\x2f\xfd": "zstdcat",
    b"PK\x03\x04": "unzip -p",
}
# of what is no text: control characters but for tab, ends of lines, backspace and escape
_CONTROL = re.compile(rb"[\x00-\x07\x0b\x0e-\x1a\x1c-\x1f]")
_MOST_CONTROL = 0.02
_BAR = re.compile(r"^.*(?<!\d)\d{1,3}%\|[^\]]*\]?")
_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")


@dataclass(frozen=True)
class Block:
    """Some lines that follow each other.

    Attributes
    ----------
    lines : list of (int, str)
        With the number of each, from 1; what was drawn over one another in one line are several of one number.
    """

    lines: list[tuple[int, str]]


def blocks(path: str) -> Iterator[Block]:
    """Read a log, some lines at a time; `path` may be ``-``, for standard input.

    Raises
    ------
    UsageError
        If there is no such file, it cannot be read, is empty, packed, or holds no text.
    """
    name = "standard input" if path == STANDARD_INPUT else shown(path)
    with ExitStack() as opened:
        file = _open(path, opened)
        try:
            yield from _lines_of(file, name)
        except OSError as error:  # a share that has gone
            raise because(UsageError, f"{name} cannot be read to its end: {error.strerror or error}", error) from error


def _open(path: str, opened: ExitStack) -> BinaryIO:
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise UsageError("standard input is closed; give the file that the run's messages went to")
        return sys.stdin.buffer
    try:
        if not path or Path(path).is_dir():
            raise UsageError(f"{shown(path)} is a folder; give the file that the run's messages went to")
        return opened.enter_context(open(path, "rb"))
    except OSError as error:
        raise twin(UsageError, type(error))(f"{shown(path)} cannot be read: {error.strerror or error}") from None


def _lines_of(file: BinaryIO, name: str) -> Iterator[Block]:
    start = file.read(_JUDGED_BYTES)
    while start.startswith(_ZEROS):
        start = start.lstrip(b"\0") or file.read(_JUDGED_BYTES)
    decoder = codecs.getincrementaldecoder(_encoding(start, name))(errors="replace")
    number, rest, piece = 1, "", start
    while piece:
        text = rest + decoder.decode(piece)
        *whole, rest = text.split("\n")
        lines: list[tuple[int, str]] = []
        for line in whole:
            if _is_plain(line):
                lines.append((number, line))
            else:
                lines += ((number, part) for part in _parts(line))
            number += 1
        if len(rest) > _LONGEST:
            *parts, rest = _parts(rest) or [""]
            lines += [(number, part) for part in parts]
        if lines:
            yield Block(lines)
        piece = file.read(_READ_BYTES)
    if rest := rest + decoder.decode(b"", final=True):
        yield Block([(number, part) for part in _parts(rest)])


def _is_plain(line: str) -> bool:
    return len(line) <= _LONGEST and not any(sign in line for sign in ("\r", "\x1b", "%|"))


def _parts(line: str) -> list[str]:
    """Return what was drawn over one another in one line, without progress bars and colours."""
    drawn = _COLOURS.sub("", line).split("\r")
    parts = [part[start : start + _LONGEST] for part in drawn for start in range(0, len(part), _LONGEST)]
    return [_BAR.sub("", part) for part in parts]


def _encoding(start: bytes, name: str) -> str:
    """Tell the encoding by a mark, or by the zeros that UTF-16 has beside every Latin letter."""
    if not start.strip():
        raise UsageError(
            f"{name} is empty. Python keeps what it prints into a file back until there is some of it, and a process "
            "that is killed loses that: run the command once more with PYTHONUNBUFFERED=1, and 2>&1 before the file"
        )
    for mark, unpack in _PACKED.items():
        if start.startswith(mark):
            raise UsageError(f"{name} is packed: {unpack} LOG | nnunet-lowmem doctor -")
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    half = len(start) // 2 * 2
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if half and start[offset:half:2].count(0) > 0.8 * half / 2 and start[1 - offset : half : 2].count(0) == 0:
            return encoding
    if len(_CONTROL.findall(start)) > _MOST_CONTROL * len(start):
        raise UsageError(f"{name} holds no text; give what the run printed: COMMAND > log.txt 2>&1")
    return "utf-8"
