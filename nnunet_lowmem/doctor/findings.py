"""What is found of a machine or a model: a verdict, what was seen, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """How bad it is."""

    FINE = "fine"
    MIND = "mind this"
    FAILS = "this will fail"


@dataclass(frozen=True)
class Finding:
    """One line about one thing.

    Attributes
    ----------
    about : str
        The thing: "RAM", "/dev/shm", a variable.
    verdict : Verdict
    seen : str
        What it is here, with its numbers.
    advice : str
        What to do; empty where nothing is to be done.
    """

    about: str
    verdict: Verdict
    seen: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts."""
        return {"about": self.about, "verdict": self.verdict.value, "seen": self.seen, "advice": self.advice}
