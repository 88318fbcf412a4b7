"""When work counts as stalled: a clock that knows the limits and is told of progress; it neither sleeps nor looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnunet_lowmem.errors import UsageError

#: Longest time between two looks at something that is being waited for.
LOOK_S = 1.0


@dataclass(frozen=True)
class WorkerLimits:
    """How long a worker may take.

    Attributes
    ----------
    stall_s : float
        Seconds without progress (a report, or CPU time that grows) after which it is ended; 0 turns the limit off.
    stage_s : float
        Seconds that one stage may take however busy the worker is; 0 turns the limit off.

    Raises
    ------
    UsageError
        If one is negative, infinite or NaN.
    """

    stall_s: float = 600.0
    stage_s: float = 0.0

    def __post_init__(self) -> None:
        for limit_s in (self.stall_s, self.stage_s):
            if not 0 <= limit_s < math.inf:
                raise UsageError(f"a time limit is 0 (off) or more seconds, not {limit_s}")


class ProgressClock:
    """Time since the last progress, and since the stage began.

    Only time that is looked at counts: between two looks, no more than a fifth of a limit. Whoever was suspended
    together with the work, or was busy elsewhere, does not take the pause for a stall.

    Parameters
    ----------
    limits : WorkerLimits
        What `overdue` compares with.
    now : float
        Seconds of `time.monotonic`, as in all methods.
    """

    def __init__(self, limits: WorkerLimits, now: float) -> None:
        self._limits = limits
        self._progress = self._stage_began = self._looked = now
        self._cpu_s = 0.0
        # far above what threads take that only wake up now and then, far below a job that waits for a slow disk
        self._cpu_step_s = max(0.02, limits.stall_s / 1000)
        self.look_s = min([LOOK_S, *(limit_s / 10 for limit_s in (limits.stall_s, limits.stage_s) if limit_s)])

    def look(self, now: float, cpu_s: float | None) -> None:
        """Take the time, and the CPU seconds spent so far, for progress if they have grown enough.

        None counts as progress: where it is not told, what works cannot be told from what waits, and is not ended.
        """
        gap_s = now - self._looked
        self._looked = now
        self._progress = min(now, self._progress + max(0.0, gap_s - self._limits.stall_s / 5))
        self._stage_began = min(now, self._stage_began + max(0.0, gap_s - self._limits.stage_s / 5))
        if cpu_s is None:
            self._progress = now
            return
        if cpu_s >= self._cpu_s + self._cpu_step_s:
            self._progress = now
            self._cpu_s = cpu_s
        # less than before when a descendant has ended that nobody waited for
        self._cpu_s = min(self._cpu_s, cpu_s)

    def report(self, now: float, *, new_stage: bool) -> None:
        """Note a sign of progress, which may begin a stage."""
        self._progress = now
        if new_stage:
            self._stage_began = now

    def overdue(self) -> str:
        """Return which limit was passed at the last look, with both numbers; empty if none was."""
        still_s, stage_s = self._looked - self._progress, self._looked - self._stage_began
        if 0 < self._limits.stall_s < still_s:
            return f"made no progress for {still_s:.1f} s (limit {self._limits.stall_s:g} s)"
        if 0 < self._limits.stage_s < stage_s:
            return f"was busy for {stage_s:.1f} s without an end (limit {self._limits.stage_s:g} s per stage)"
        return ""
