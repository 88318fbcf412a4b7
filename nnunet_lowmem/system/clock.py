"""Time and progress per stage of one case, and who is told of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_lowmem.system import signals
from nnunet_lowmem.system.memory_held import PeakSampler

#: Environment variable naming a file to which the span of every stage is appended as a JSON line.
TRACE_VARIABLE = "nnUNet_lowmem_trace"


@dataclass(frozen=True)
class Progress:
    """How far one case is.

    Attributes
    ----------
    stage, case : str
    done, total : int
        Steps of this stage: tiles of all folds in "prediction", planes of the label map in "export" (heads, once per
        pass, where they are needed as a whole); a stage without steps is one.
    memory_bytes : int
        What the process tree holds; 0 where nobody measures.
    worker : str
        Of a cluster, which has the case; empty in this process.
    """

    stage: str
    case: str
    done: int
    total: int
    memory_bytes: int = 0
    worker: str = ""

    @property
    def where(self) -> str:
        """The case, and the worker that has it."""
        return f"{self.case} on {self.worker}" if self.worker else self.case


@dataclass
class StageClock:
    """Seconds and steps per stage of one case; stages may nest, the inner one's time is not counted for the outer.

    Attributes
    ----------
    case : str
    listeners : sequence of callable
        Called, in the thread that works, with the `Progress` whenever a stage is entered or returned to, and after
        its steps. What they raise ends the run.
    sampler : PeakSampler or None
        Gets to know the stages, and tells what memory is held.
    seconds : dict
        Seconds per stage so far.
    failed_stage : str
        The innermost stage that an exception has left; empty if none has.
    """

    case: str
    listeners: Sequence[Callable[[Progress], object]] = ()
    sampler: PeakSampler | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed_stage: str = ""
    _foreign_error: Exception | None = None
    _done: dict[str, int] = field(default_factory=dict)
    _totals: dict[str, int] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Iterator[None]:
        """Count the time of the block for stage `name`, which has so many steps; without, leaving it is its only one.

        A stage that is entered again goes on with the steps that were done.
        """
        self._switch()
        self._stack.append(name)
        self._totals[name] = steps or 1
        self._tell(name)
        try:
            with self.failing_in(name):
                yield
                if steps is None:
                    self.advance()
        finally:
            self._switch()
            self._stack.pop()
        if self._stack:
            self._tell(self._stack[-1])

    @contextmanager
    def failing_in(self, name: str) -> Iterator[None]:
        """Count what fails in the block as of stage `name`, which it belongs to and does not begin."""
        try:
            yield
        except Exception:
            self.failed_stage = self.failed_stage or name
            raise

    def advance(self, steps: int = 1) -> None:
        """Note that steps of the present stage are done."""
        stage = self._stack[-1]
        self._done[stage] = min(self._totals[stage], self._done.get(stage, 0) + steps)
        self._tell(stage)

    def blame_others(self, error: Exception | None) -> None:
        """Note that a listener, or other code that is not ours, has raised it; None forgets: its frames hold this."""
        self._foreign_error = error

    def foreign_cause(self, error: Exception) -> Exception | None:
        """Return what somebody else has raised, if that is the error or has led to it."""
        link: BaseException | None = error
        while link is not None and link is not self._foreign_error:
            link = link.__cause__
        return None if link is None else self._foreign_error

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            stage, seconds = self._stack[-1], now - self._since
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            trace(stage, seconds, case=self.case)
        self._since = now

    def _tell(self, stage: str) -> None:
        signals.check()
        if self.sampler is not None:
            self.sampler.mark(stage)
        for listener in self.listeners:
            held_bytes = 0 if self.sampler is None else self.sampler.held_bytes
            progress = Progress(stage, self.case, self._done.get(stage, 0), self._totals[stage], held_bytes)
            try:
                listener(progress)
            except Exception as error:
                self.blame_others(error)
                raise


def trace(stage: str, seconds: float, **facts: int | str) -> None:
    """Append to the trace file, if one is asked for, that `stage` went on for so many seconds until now."""
    path = os.environ.get(TRACE_VARIABLE)
    if path:
        stop_s = time.time()
        with Path(path).open("a") as file:
            file.write(json.dumps({"stage": stage, "start_s": stop_s - seconds, "stop_s": stop_s, **facts}) + "\n")
