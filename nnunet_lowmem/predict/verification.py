"""Whether files are still what was written, by the records beside them (docs/records.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.predict.records import RECORD_FILES, SCHEMA, content, lines_in, record_in
from nnunet_lowmem.volumes.selection import ending_of


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
        If there is no such folder, or no record in it.
    """
    is_output = not path.is_dir() or (ending_of(path.name) != "" and not list(path.glob(RECORD_FILES)))
    folder = path.parent if is_output else path
    if not folder.is_dir() or (is_output and not path.exists() and not list(folder.glob(RECORD_FILES))):
        raise UsageError(f"verify: {shown(str(path))} does not exist")
    records, notes = _read(folder)
    if not records:
        told = f"; {notes[0]}" if notes else ""
        raise UsageError(
            f"verify: no record is in {shown(str(folder))} ({RECORD_FILES}), of whatever was written{told}"
        )
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for name in record["outputs"]:
            by_name.setdefault(name, []).append(record)
    if is_output:
        return Verification((_verified(path, by_name.get(path.name, [])),), tuple(notes))
    files = [_verified(folder / name, found) for name, found in by_name.items()]
    files += [Verified(name, Verdict.UNRECORDED) for name in _unrecorded(folder, by_name)]
    return Verification(tuple(sorted(files, key=lambda file: file.name)), tuple(notes))


def state_of(file: Path, size_bytes: int | None, checksum: str | None) -> str:
    """Tell in words whether a file that was read is still there, and the same."""
    try:
        found = content(file)
    except OSError:
        return "not there now"
    if checksum is None:
        return "same size" if found[0] == size_bytes else "changed since"
    return "the same now" if found == [size_bytes, checksum] else "changed since"


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all records of a folder, as they were made, and what is odd in the files that hold them."""
    records, notes = [], list[str]()
    for file, number, line in lines_in(folder):
        if not line:
            continue
        record = record_in(line)
        if record is None:
            notes.append(f"{shown(file.name)}, line {number}: damaged, or no record that version {SCHEMA} knows")
            continue
        if not isinstance(schema := record.get("schema", 1), int) or schema > SCHEMA:
            notes.append(
                f"{shown(file.name)}, line {number}: of a newer version ({schema}, here {SCHEMA}); sizes and checksums "
                "are looked at, not what else it may say"
            )
        records.append(record)
    return sorted(records, key=lambda record: int(record["time_ns"])), notes


def _verified(path: Path, records: Sequence[dict[str, Any]]) -> Verified:
    """Compare an output with the records about it, of which the latest that agrees counts."""
    latest = records[-1] if records else None
    if not path.exists():
        return Verified(path.name, Verdict.MISSING, latest)
    if latest is None:
        return Verified(path.name, Verdict.UNRECORDED)
    try:
        found = content(path)
    except OSError as error:
        return Verified(path.name, Verdict.UNREADABLE, latest, str(error.strerror or error))
    for record in reversed(records):
        if record["outputs"][path.name] == found:
            return Verified(path.name, Verdict.AS_WRITTEN, record)
    written = latest["outputs"][path.name]
    return Verified(
        path.name, Verdict.CHANGED, latest, f"{_in_words(written)} were written, there are {_in_words(found)}"
    )


def _in_words(told: Any) -> str:
    match told:
        case [int(size), str(checksum)]:
            return f"{size:,} bytes {checksum[:8]}..."
    return "others"


def _unrecorded(folder: Path, by_name: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return names without a record that end as outputs do."""
    endings = tuple({ending for name in by_name if (ending := ending_of(name) or Path(name).suffix)})
    return [path.name for path in folder.iterdir() if path.name.endswith(endings) and path.name not in by_name]
