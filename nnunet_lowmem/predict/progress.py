"""Who follows a case: bars where a terminal is there, callbacks, the report; what nnU-Net prints becomes messages."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_lowmem.budget.planner import Plan
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.clock import Progress, StageClock
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.types import PreprocessedCase

logger = logging.getLogger(__name__)

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Listener(Protocol):
    """Follows a run and keeps what it is told: the report does."""

    def case(self, clock: StageClock, sampler: PeakSampler) -> AbstractContextManager[None]:
        """Take part in one case."""

    def plan(self, plan: Plan) -> None:
        """Take note of the plan of a case."""

    def draw(
        self,
        output: str,
        case: PreprocessedCase,
        labels: NDArray[Any],
        transpose_forward: Sequence[int],
        names: Mapping[int, str],
    ) -> None:
        """Keep what shows the labels, in the axes of the file, of the case that was written to `output`."""


def on_terminal() -> bool:
    """Tell whether bars would be seen: they go to stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressBars:
    """One bar per stage of a case that has several steps; a context manager."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, progress: Progress) -> None:
        """Move the bar of this stage."""
        if progress.total == 1:
            return
        if progress.stage not in self._bars:
            name = f"{progress.case} {progress.stage}"
            self._bars[progress.stage] = tqdm(total=progress.total, desc=name, bar_format=_FORMAT)
        bar = self._bars[progress.stage]
        if progress.memory_bytes:
            bar.set_postfix_str(format_gib(progress.memory_bytes), refresh=False)
        bar.update(progress.done - bar.n)


@contextmanager
def observed(
    clock: StageClock,
    bars: bool,
    measures: bool,
    on_progress: Callable[[Progress], None] | None,
    page: Callable[[StageClock, PeakSampler], AbstractContextManager[None]] | None,
) -> Iterator[PeakSampler | None]:
    """Let everybody who wants to know follow one case.

    Parameters
    ----------
    clock : StageClock
    bars : bool
        Show bars if a terminal is there.
    measures : bool
        Give the sampler although nobody else here needs it.
    on_progress : callable or None
        Told last, when memory is known.
    page : callable or None
        Takes clock and sampler, and gives what the report does around the case.
    """
    with ExitStack() as stack:
        sampler = None
        if measures or page is not None:
            sampler = PeakSampler(stage="preprocessing")
            if page is not None:
                stack.enter_context(page(clock, sampler))
            stack.enter_context(sampler)
            clock.measure(sampler)
        if bars and on_terminal():
            clock.listeners.append(stack.enter_context(ProgressBars()).show)
        if on_progress is not None:
            clock.listeners.append(on_progress)
        yield sampler


@contextmanager
def logging_prints(level: int = logging.INFO) -> Iterator[None]:
    """Log what nnU-Net prints in the block: who uses a library decides whether it is heard."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.log(level, "%s", line)
