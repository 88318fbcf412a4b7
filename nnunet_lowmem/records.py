"""Done-records: what was made from what, so that a run can be continued without trusting that a file exists.

After an output has got its name, a small JSON file in a hidden folder beside it notes size and checksum of what was
written, size and time of what it was made from, and a fingerprint of model and options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_lowmem.files import atomic_output
from nnunet_lowmem.verifying import DamagedFileError, verify_whole

RECORD_FOLDER = ".nnunet_lowmem"
_CHUNK_BYTES = 2**20


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
    """

    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...]
    made_with: str

    @property
    def record_file(self) -> Path:
        """Where the record lives."""
        segmentation = self.outputs[0]
        return segmentation.parent / RECORD_FOLDER / f"{segmentation.name}.json"

    def write_record(self) -> None:
        """Note that the outputs are done; call it once they have their names."""
        content = {
            "outputs": {path.name: [path.stat().st_size, _checksum(path)] for path in self.outputs},
            "inputs": _input_states(self.inputs),
            "made_with": self.made_with,
        }
        self.record_file.parent.mkdir(exist_ok=True)
        with atomic_output(self.record_file) as path:
            path.write_text(json.dumps(content, indent=1))

    def standing(self) -> Standing:
        """Judge what is there; files without a record of their own are decoded to their end."""
        if not all(path.is_file() for path in self.outputs):
            return Standing.ABSENT
        record = self._record()
        if record is None:
            return Standing.UNRECORDED if all(map(_is_whole, self.outputs)) else Standing.DAMAGED
        if record.get("inputs") != _input_states(self.inputs):
            return Standing.CHANGED_INPUT
        return Standing.DONE if record.get("made_with") == self.made_with else Standing.OTHER_MODEL

    def _record(self) -> dict[str, Any] | None:
        """Return the record, if there is one and it is of the files that are there now."""
        try:
            record = json.loads(self.record_file.read_text())
            noted = record["outputs"]
            same = all(noted[path.name] == [path.stat().st_size, _checksum(path)] for path in self.outputs)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if same else None


def fingerprint(description: Any, weights: Iterable[bytes]) -> str:
    """Return a checksum of JSON-like data and of bytes: of the options a model is used with, and of its weights."""
    text = json.dumps(description, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for part in weights:
        digest.update(part)
    return digest.hexdigest()


def _input_states(paths: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of change in the order of the inputs; a name alone where a file is missing."""
    return [_state(path) for path in paths]


def _state(path: Path) -> list[str | int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return [path.name]
    return [path.name, status.st_size, status.st_mtime_ns]


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        verify_whole(path)
    except (DamagedFileError, OSError):
        return False
    return True
