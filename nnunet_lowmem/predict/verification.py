"""Whether files are still what was written, by the records beside them (docs/records.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.predict.records import RECORD_FILES, SCHEMA, content, lines_of, record_in
from nnunet_lowmem.volumes.selection import PICTURES, ending_of


class Verdict(Enum):
    """What is found of a file; the value says it."""

    AS_WRITTEN = "as written"
    CHANGED = "changed"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    UNRECORDED = "no record"


@dataclass(frozen=True)
class Verified:
    """One output, or one file that looks like one.

    Attributes
    ----------
    name : str
    verdict : Verdict
    record : dict or None
        The record that it agrees with; where it agrees with none, the latest about it.
    seen : str
        What is there instead of what was written; empty where it is that.
    """

    name: str
    verdict: Verdict
    record: dict[str, Any] | None = None
    seen: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"name": self.name, "verdict": self.verdict.value, "seen": self.seen, "record": self.record}


@dataclass(frozen=True)
class Verification:
    """What is found of a folder.

    Attributes
    ----------
    files : tuple of Verified
        By their names.
    notes : tuple of str
        What is odd in the records themselves.
    """

    files: tuple[Verified, ...]
    notes: tuple[str, ...]

    @property
    def is_as_written(self) -> bool:
        """Whether every file is recorded, and still what was written."""
        return all(file.verdict is Verdict.AS_WRITTEN for file in self.files)


def verify(path: Path) -> Verification:
    """Compare a folder of outputs, or one output, with what the records beside it say; all of it is read.

    Raises
    ------
    UsageError
        If there is no such folder, it cannot be listed, or no record is in it.
    """
    is_output = not path.is_dir() or (ending_of(path.name) != "" and not list(path.glob(RECORD_FILES)))
    folder = path.parent if is_output else path
    if not folder.is_dir() or (is_output and not path.exists() and not list(folder.glob(RECORD_FILES))):
        raise UsageError(f"verify: {shown(str(path))} does not exist")
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UsageError(f"verify: {shown(str(folder))} cannot be listed: {error.strerror}") from error
    records, notes = _read(folder)
    if not records:
        told = f"; {notes[0]}" if notes else ""
        raise UsageError(f"verify: {shown(str(folder))} holds no record ({RECORD_FILES}) of what was written{told}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for name in record["outputs"]:
            by_name.setdefault(name, []).append(record)
    if is_output:
        return Verification((_verified(folder, path.name, by_name.get(path.name, [])),), tuple(notes))
    files = [_verified(folder, name, found) for name, found in by_name.items()]
    files += [Verified(name, Verdict.UNRECORDED) for name in _unrecorded(names, by_name)]
    return Verification(tuple(sorted(files, key=lambda file: file.name)), tuple(notes))


def state_of(file: Path, size_bytes: int | None, checksum: str | None) -> str:
    """Tell in words whether a file that was read is still there, and the same."""
    try:
        if not file.is_file():
            return "not there now"
        if file.stat().st_size != size_bytes:
            return "changed since"
        if checksum is None:
            return "same size"
        return "the same now" if content(file) == [size_bytes, checksum] else "changed since"
    except OSError as error:
        return f"cannot be read now: {error.strerror}"


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all records of a folder, as they were made, and what is odd in the files that hold them."""
    records, notes = [], list[str]()
    for file in sorted(folder.glob(RECORD_FILES)):
        try:
            for number, line in enumerate(lines_of(file), 1):
                record, note = _record(line)
                records += [] if record is None else [record]
                notes += [f"{shown(file.name)}, line {number}: {note}"] if note else []
        except OSError as error:
            notes.append(f"{shown(file.name)} cannot be read: {error.strerror}")
    return sorted(records, key=lambda record: int(record["time_ns"])), notes


def _record(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the record that a line holds, if any, and what is odd about it."""
    if not line:
        return None, ""
    record = record_in(line)
    if record is None:
        return None, f"damaged, or no record that version {SCHEMA} knows"
    # records are about files beside them, and nothing that they say leads elsewhere
    if any(name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name for name in record["outputs"]):
        return None, "names what is no file beside it"
    if not isinstance(schema := record.get("schema", 1), int) or schema > SCHEMA:
        told = f"of a newer version ({schema}, here {SCHEMA})"
        return record, f"{told}; sizes and checksums are looked at, not what else it may say"
    return record, ""


def _verified(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> Verified:
    """Compare an output with the records about it, of which the latest that agrees counts."""
    latest, path = records[-1] if records else None, folder / name
    if not path.exists():
        return Verified(name, Verdict.MISSING, latest)
    if latest is None:
        return Verified(name, Verdict.UNRECORDED)
    if not path.is_file() and not path.is_dir():
        return Verified(name, Verdict.UNREADABLE, latest, "neither a file nor a folder")
    try:
        found = content(path)
    except OSError as error:
        return Verified(name, Verdict.UNREADABLE, latest, str(error.strerror or error))
    for record in reversed(records):
        if record["outputs"][name] == found:
            return Verified(name, Verdict.AS_WRITTEN, record)
    written = latest["outputs"][name]
    return Verified(name, Verdict.CHANGED, latest, f"{_in_words(written)} were written, there are {_in_words(found)}")


def _in_words(told: Any) -> str:
    match told:
        case [int(size), str(checksum)]:
            return f"{size:,} bytes {checksum[:8]}..."
    return "others"


def _unrecorded(names: Sequence[str], by_name: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Return names without a record that end as label maps do, but for those of images beside them."""
    records = [record for found in by_name.values() for record in found]
    inputs = [record["inputs"] for record in records if isinstance(record.get("inputs"), list)]
    read = {entry[0] for found in inputs for entry in found if isinstance(entry, list) and entry}
    endings = tuple({ending for name in by_name if (ending := ending_of(name) or ending_of(name, PICTURES))})
    return [name for name in names if name.endswith(endings) and name not in by_name and name not in read]
