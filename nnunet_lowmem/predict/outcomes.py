"""What is known of cases once a run is over: done with times and memory; failed with stage and reason; skipped."""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.errors import BudgetError, LowMemError, without_frames
from nnunet_lowmem.names import shown
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.system.atomic_files import atomic_output

FAILURES_FILE = "lowmem_failures.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelVolume:
    """How much of a label map has one label.

    Attributes
    ----------
    value : int
    name : str
        Of the class, or of the region that is written with that value.
    voxels : int
    ml : float or None
        None of pictures, which have no spacing.
    """

    value: int
    name: str
    voxels: int
    ml: float | None


@dataclass(frozen=True)
class CaseReport:
    """One finished case.

    Attributes
    ----------
    case : str
    output : str or None
        File that was written.
    seconds : dict
        Seconds per stage.
    plan : Plan
    measured_bytes : dict
        Peak RAM of the process tree per stage.
    reused_tiles : int
        Constant tiles, of all folds, that the network did not see: one that was the same, bit by bit, told of them.
    arithmetic : str
        In which the network was run: "exact", "float32" or "bfloat16".
    tiles, tiles_of_case : int
        Of all folds: tiles that were needed, and those of the whole case; fewer where a part is asked for.
    labels : tuple of LabelVolume
        Those but 0 that the label map holds.
    """

    case: str
    output: str | None
    seconds: dict[str, float]
    plan: Plan
    measured_bytes: dict[str, int]
    reused_tiles: int = 0
    arithmetic: str = Arithmetic.EXACT.value
    tiles: int = 0
    tiles_of_case: int = 0
    labels: tuple[LabelVolume, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Peak RAM over all stages."""
        return max(self.measured_bytes.values(), default=0)


@dataclass(frozen=True)
class FailedCase:
    """One case that failed.

    Attributes
    ----------
    case, stage, reason, traceback_text : str
    exit_code : int
        That of the error's class.
    error : Exception or None
        What was raised, without its frames, which hold the arrays of the case; it is not pickled.
    """

    case: str
    stage: str
    reason: str
    traceback_text: str
    exit_code: int
    error: Exception | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "error": None}

    def in_words(self) -> str:
        """Return case, stage and reason in one line."""
        named = self.reason.startswith(f"case {self.case}")
        return self.reason if named else f"case {self.case}, {self.stage}: {self.reason}"

    @staticmethod
    def of(case: str, stage: str, error: Exception) -> FailedCase:
        """Put an exception into words, and let go of its frames."""
        text = "".join(traceback.format_exception(error))
        known = isinstance(error, LowMemError)
        reason = shown(str(error) if known else f"{type(error).__name__}: {error}")
        without_frames(error)
        return FailedCase(case, stage, reason, text, error.exit_code if isinstance(error, LowMemError) else 1, error)


@dataclass(frozen=True)
class SkippedCase:
    """One case that was left as it is, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Turn:
    """What a worker of a cluster has done for a time.

    Attributes
    ----------
    worker : str
    task : str
        A case, or what of it.
    began_s, ended_s : float
        Seconds since the epoch, by the clock of who gave it.
    is_done : bool
        It had a result; else the task was given to another worker, or its case has failed.
    """

    worker: str
    task: str
    began_s: float
    ended_s: float
    is_done: bool


@dataclass
class RunReport:
    """All cases of one run.

    Attributes
    ----------
    done : list of CaseReport
    failed : list of FailedCase
    skipped : list of SkippedCase
    turns : list of Turn
        Of the workers of a cluster.
    """

    done: list[CaseReport] = field(default_factory=list)
    failed: list[FailedCase] = field(default_factory=list)
    skipped: list[SkippedCase] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if nothing failed; that of `BudgetError` if that was the only cause; else 1."""
        codes = {case.exit_code for case in self.failed}
        return 0 if not codes else BudgetError.exit_code if codes == {BudgetError.exit_code} else 1

    def failures_in_words(self) -> str:
        """Return one line: how many of how many, and each with case, stage and reason."""
        told = "; ".join(case.in_words() for case in self.failed)
        return f"{self.failed_of_all()}: {told}"

    def failed_of_all(self) -> str:
        """Return how many of the cases that were tried have failed."""
        return f"{len(self.failed)} of {len(self.failed) + len(self.done)} cases failed"

    def write_failures(self, folder: Path) -> None:
        """Write what failed into `folder`; where nothing did, remove what an earlier run has written there.

        A run that was refused as a whole changes nothing. Where the folder lets neither be done the log says so: what
        becomes of the run does not depend on it.
        """
        path = folder / FAILURES_FILE
        if not (self.done or self.failed or self.skipped):
            return
        try:
            if self.failed:
                self._write_failures(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.error("%s does not tell of this run: %s", FAILURES_FILE, error)

    def _write_failures(self, path: Path) -> None:
        content: dict[str, Any] = {
            "failed": [
                {"case": case.case, "stage": case.stage, "reason": case.reason, "traceback": case.traceback_text}
                for case in self.failed
            ],
            "skipped": [{"case": case.case, "reason": case.reason} for case in self.skipped],
            "done": [case.case for case in self.done],
        }
        with atomic_output(path) as partial_file:
            partial_file.write_text(json.dumps(content, indent=2))
