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

#: Environment variable naming a file to which the span of every stage is appended as a JSON line.
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
            if self._stack:
                self._enter(self._stack[-1])

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            stage, seconds = self._stack[-1], now - self._since
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            trace(stage, seconds)
        self._since = now

    def _enter(self, name: str) -> None:
        interruption.check()
        for listener in self.listeners:
            listener(name)


def trace(stage: str, seconds: float, **facts: int) -> None:
    """Append to the trace file, if one is asked for, that `stage` went on for so many seconds until now."""
    path = os.environ.get(TRACE_VARIABLE)
    if path:
        stop_s = time.time()
        with Path(path).open("a") as file:
            file.write(json.dumps({"stage": stage, "start_s": stop_s - seconds, "stop_s": stop_s, **facts}) + "\n")
