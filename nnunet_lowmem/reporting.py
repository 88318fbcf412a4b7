"""What is known of a case once it is done: time per stage, the plan, projected and measured memory."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_lowmem.planner import Plan


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
        Peak RAM of the process tree per stage; empty where nobody asked for it.
    """

    case: str
    output: str | None
    seconds: dict[str, float]
    plan: Plan
    measured_bytes: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Peak RAM over all stages."""
        return max(self.measured_bytes.values(), default=0)
