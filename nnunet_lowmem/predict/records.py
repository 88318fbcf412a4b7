"""Done-records: what was made from what, so that a run can be continued without trusting that a file exists.

After an output has got its name, one line of JSON in ``lowmem_run-<id>.jsonl`` beside it notes size and checksum of
what was written, size and time of what it was made from, a fingerprint of model and options, and when. Every process
appends to a file of its own, so processes that share a folder need no lock, and a line that a power cut has torn is
the last one of its file. Readers take all files; the last line about an output wins, among those that are about the
bytes that are there. A file is removed once its process has ended and others say more of all its outputs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.system.owned_folders import is_left_over, owned_name
from nnunet_lowmem.system.placing import flush
from nnunet_lowmem.volumes.selection import SIGNS, TIFF, ending_of
from nnunet_lowmem.volumes.verifying import DamagedFileError, verify_whole

logger = logging.getLogger(__name__)

#: Of the lines that are written: told in docs/records.md. Lines before 2 say no version, and less.
SCHEMA = 2
_KIND, _ENDING = "lowmem_run", ".jsonl"
#: Of the files of records, one of each process.
RECORD_FILES = f"{_KIND}-*{_ENDING}"
# with the process id, which a restarted container gives again and a forked process does not share
_UNIQUE = secrets.token_hex(4)
#: Where versions before this one kept a file per output; read, never written.
FORMER_FOLDER = ".nnunet_lowmem"
_CHUNK_BYTES = 2**20
# what a run is continued by; all else is kept for people
_FOR_RUNS = ("outputs", "inputs", "made_with", "arithmetic", "time_ns")
_SECRET = re.compile(r"licen[cs]e|token|passw|secret|credential", re.IGNORECASE)
_OF_ADDRESS = re.compile(r"(?<=://)[^/@]*@|\?.*$")


class Standing(Enum):
    """What is there of a case that may have been predicted before; the value says why."""

    ABSENT = "not predicted yet"
    DAMAGED = "its output is damaged"
    CHANGED_INPUT = "its input has changed since"
    DONE = "done before"
    UNRECORDED = "there is a whole file that this package has not recorded"
    OTHER_MODEL = "done before by another model or with other options"

    @property
    def keeps(self) -> bool:
        """Whether the case is skipped when a run is continued."""
        return self in (Standing.DONE, Standing.UNRECORDED, Standing.OTHER_MODEL)


class Records:
    """What is recorded of outputs; each folder is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[dict[str, Any]]]] = {}

    def of(self, output: Path) -> Iterator[dict[str, Any]]:
        """Give the records of an output, the latest first."""
        if output.parent not in self._folders:
            known = self._folders[output.parent] = {}
            for _, record in _in_order(_files_in(output.parent)):
                for name in record["outputs"]:
                    known.setdefault(name, []).append(record)
        yield from reversed(self._folders[output.parent].get(output.name, []))
        with contextlib.suppress(OSError):
            former = record_in((output.parent / FORMER_FOLDER / f"{output.name}.json").read_bytes())
            if former is not None:
                yield former


@dataclass(frozen=True)
class Recipe:
    """One output and what it is made from.

    Attributes
    ----------
    outputs : tuple of Path
        The segmentation first, then the probabilities where they are asked for.
    inputs : tuple of Path
        Images, and the segmentation of a previous stage.
    made_with : str
        Fingerprint of model and options.
    command : tuple of str
        What was called, where the run was begun.
    """

    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...]
    made_with: str
    command: tuple[str, ...] = field(default_factory=lambda: _command())

    def write_record(
        self, inputs: list[list[str | int]], arithmetic: Arithmetic, told: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Note that the outputs are done, once they have their names; where that cannot be noted, a warning says so.

        Parameters
        ----------
        inputs : list
            The `states` of what was read.
        arithmetic : Arithmetic
            In which the network was run.
        told : callable
            Returns what else a reader may want to know; a case is not lost where that cannot be told.
        """
        now_ns = time.time_ns()
        try:
            more = told()
        except Exception as error:  # of models and clients of whatever kind; the output is there
            logger.warning("%s: its record does not tell how it was made: %s", self.outputs[0].name, error)
            more = {}
        folder = self.outputs[0].parent
        try:
            _append(folder / f"{owned_name(_KIND, _UNIQUE)}{_ENDING}", {
                "schema": SCHEMA,
                "time": datetime.fromtimestamp(now_ns // 10**9, timezone.utc).isoformat(),
                "time_ns": now_ns,
                "command": list(self.command),
                "outputs": {path.name: content(path) for path in self.outputs},
                "inputs": inputs,
                "made_with": self.made_with,
                "arithmetic": arithmetic.value,
                **more,
            })  # fmt: skip
        except OSError as error:
            logger.warning("%s is whole, but that could not be recorded in %s: %s", self.outputs[0].name, folder, error)

    def standing(self, records: Records | None = None) -> Standing:
        """Judge what is there; files without a record of their own are decoded to their end."""
        if not all(path.exists() for path in self.outputs):
            return Standing.ABSENT
        records = records or Records()
        record = self._record(records)
        if record is None:
            # what is missing of a store is not seen by looking at what is left
            if self.outputs[0].is_dir() and any(records.of(self.outputs[0])):
                return Standing.DAMAGED
            return Standing.UNRECORDED if all(map(_is_whole, self.outputs)) else Standing.DAMAGED
        if record.get("inputs") != states(self.inputs):
            return Standing.CHANGED_INPUT
        return Standing.DONE if record.get("made_with") == self.made_with else Standing.OTHER_MODEL

    def is_recorded(self) -> bool:
        """Whether a record is about the files that are there now."""
        return self._record(Records()) is not None

    def _record(self, records: Records) -> dict[str, Any] | None:
        """Return the latest record of the files that are there now."""
        contents: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError):
            for record in records.of(self.outputs[0]):
                contents = contents or {path.name: content(path) for path in self.outputs if path.exists()}
                if all(record["outputs"].get(name) == content for name, content in contents.items()):
                    return record
        return None


def _command() -> tuple[str, ...]:
    """Return what was called, without what a flag says that is a secret by its name; empty in programs that embed."""
    program, *words = getattr(sys, "argv", None) or [""]
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        flag, is_joined, _ = word.partition("=")
        if is_joined and _SECRET.search(flag):
            words[number] = f"{flag}=***"
        elif before.startswith("-") and "=" not in before and _SECRET.search(before):
            words[number] = "***"
        else:
            words[number] = without_secrets(word)
    return os.path.basename(program), *words


def without_secrets(address: str) -> str:
    """Return an address without user, password and query, which may hold a signature; what is none as it is."""
    return _OF_ADDRESS.sub("", address) if "://" in address else address


def fingerprint(description: Any, weights: Iterable[bytes]) -> str:
    """Return a checksum of JSON-like data and of bytes: of the options a model is used with, and of its weights."""
    text = json.dumps(description, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for part in weights:
        digest.update(part)
    return digest.hexdigest()


def latest_arithmetic(recipe: Recipe) -> Arithmetic | None:
    """Return in which arithmetic the latest file in the folder of an output was made, by the same model and options."""
    folder = recipe.outputs[0].parent
    made = [record for _, record in _in_order(_files_in(folder)) if record.get("made_with") == recipe.made_with]
    with contextlib.suppress(ValueError):  # of a version that kept none
        return Arithmetic(made[-1].get("arithmetic")) if made else None
    return None


# -- files of records --------------------------------------------------------------------------------------------------


def _append(file: Path, record: dict[str, Any]) -> None:
    """Append one line; opened anew for each, so that a file that was taken away meanwhile is made again."""
    is_new = not file.exists()
    line = (b"\n" if _is_torn(file) else b"") + json.dumps(record, default=_plain).encode() + b"\n"
    with file.open("ab", buffering=0) as stream:
        if stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    flush(file)
    if is_new:
        flush(file.parent)
        _tidy(file.parent, file)


def _plain(value: Any) -> Any:
    """Return a number of numpy's as one of Python's, and all else that JSON does not know as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _is_torn(file: Path) -> bool:
    """Whether the last line has no end: the disk was full, or another thread is writing it right now.

    After the one that is being written, the newline that ends it twice leaves an empty line, which is no record.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:  # missing or empty
        return False


def lines_of(file: Path) -> Iterator[bytes]:
    """Give the lines of a file of records, without their ends.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with file.open("rb") as stream:
        for line in stream:
            yield line.rstrip(b"\n")


def _files_in(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    """Return the records of every file that can be read, without what no run needs to go on."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob(RECORD_FILES)):
        with contextlib.suppress(OSError):
            records = filter(None, map(record_in, lines_of(file)))
            files[file] = [{key: record[key] for key in _FOR_RUNS if key in record} for record in records]
    return files


def _in_order(files: Mapping[Path, list[dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Return file and content of all records, as they were made; a clock set back changes nothing within a file."""
    found = []
    for file, records in files.items():
        times_ns = accumulate((record["time_ns"] for record in records), max)
        found += [(time_ns, file, record) for time_ns, record in zip(times_ns, records, strict=True)]
    return [(file, record) for _, file, record in sorted(found, key=lambda entry: entry[0])]


def record_in(text: bytes) -> dict[str, Any] | None:
    """Return the record that a line, or a file of former versions, holds; None if it is none, or a part of one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("outputs"), dict):
        return None
    return record if isinstance(record.setdefault("time_ns", 0), int) else None


def _tidy(folder: Path, own: Path) -> None:
    """Remove files of ended processes about whose outputs, those that are there, others say what is new."""
    files = _files_in(folder)
    latest = {folder / name: file for file, record in _in_order(files) for name in record["outputs"]}
    needed = {own, *(file for output, file in latest.items() if output.exists())}
    for file in files.keys() - needed:
        if is_left_over(file, file.name.removesuffix(_ENDING), (_KIND,)):
            with contextlib.suppress(OSError):
                file.unlink()


# -- states of files ---------------------------------------------------------------------------------------------------


def states(paths: Iterable[Path]) -> list[list[str | int]]:
    """Return what tells inputs from changed ones.

    Raises
    ------
    OSError
        If one is there and cannot be asked.
    """
    return list(map(_state, paths))


def stated(paths: Sequence[Path]) -> list[list[str | int]]:
    """Return the `states` of files; none where one cannot be asked, which no later look will find the same."""
    try:
        return states(paths)
    except OSError:
        return []


def _state(path: Path) -> list[str | int]:
    """Name, size and time of change of an input; its name alone where it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return [path.name]
    return [path.name, status.st_size, status.st_mtime_ns] if not path.is_dir() else [path.name, *_state_of_store(path)]


def _state_of_store(path: Path) -> tuple[int, str]:
    """Return how many folders it has, and a checksum of their times, and of those of metadata and pictures in them.

    A chunk that is written anew changes the folder that it is in, where it is renamed, as zarr does.
    """
    digest, count = hashlib.blake2b(digest_size=16), 0
    for folder, folders, files in os.walk(path):
        folders.sort()
        count += 1
        known = [name for name in sorted(files) if name in SIGNS or ending_of(name, TIFF)]
        for each in (Path(folder), *(Path(folder, name) for name in known)):
            told = [each.relative_to(path).as_posix(), each.stat().st_mtime_ns]
            digest.update(json.dumps(told).encode())
    return count, digest.hexdigest()


def content(path: Path) -> list[int | str]:
    """Size and checksum (BLAKE2b, 128 bits) of an output; of a store, of all its files and their names."""
    digest, size_bytes = hashlib.blake2b(digest_size=16), 0
    is_store = path.is_dir()
    for each in sorted(file for file in path.rglob("*") if file.is_file()) if is_store else [path]:
        if is_store:
            digest.update(each.relative_to(path).as_posix().encode())
        with each.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        size_bytes += each.stat().st_size
    return [size_bytes, digest.hexdigest()]


def _is_whole(path: Path) -> bool:
    try:
        verify_whole(path)
    except (DamagedFileError, OSError):
        return False
    return True
