"""Time per stage of one case, and where to tell of progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_lowmem import interruption

#: Environment variable naming a file to which every stage change is appended as a JSON line.
TRACE_VARIABLE = "nnUNet_lowmem_trace"


@dataclass
class StageClock:
    """Seconds per stage of one case; stages may nest, and the inner one's time is not counted for the outer.

    Attributes
    ----------
    case : str
    listeners : list of callable
        Called with the name of each stage that is entered or returned to.
    seconds : dict
        Seconds per stage so far.
    failed_stage : str
        The innermost stage that an exception has left; empty if none has.
    """

    case: str
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failed_stage: str = ""
    _stack: list[str] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for stage `name`."""
        self._switch()
        self._stack.append(name)
        self._enter(name)
        try:
            yield
        except Exception:
            self.failed_stage = self.failed_stage or name
            raise
        finally:
            self._switch()
            self._stack.pop()
            trace(f"{name}_end", self.case)
            if self._stack:
                self._enter(self._stack[-1])

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            stage = self._stack[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def _enter(self, name: str) -> None:
        trace(f"{name}_start", self.case)
        interruption.check()
        for listener in self.listeners:
            listener(name)


def trace(event: str, case: str, seconds: dict[str, float] | None = None) -> None:
    """Append an event, with the seconds per stage where they are known, to the trace file if one is asked for."""
    path = os.environ.get(TRACE_VARIABLE)
    if path:
        with Path(path).open("a") as file:
            line = {"time": time.time(), "event": event, "case": case, "seconds": seconds}
            file.write(json.dumps(line) + "\n")
