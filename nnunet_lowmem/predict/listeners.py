"""Who follows a run: bars where a terminal is there, callbacks, the watch, the report, the records."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.options import Options
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.predict.provenance import Made
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.system.stalls import WorkerLimits
from nnunet_lowmem.system.watchdog import StallWatch
from nnunet_lowmem.types import PreprocessedCase

logger = logging.getLogger(__name__)

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Listener:
    """The protocol of whoever follows a run, who overrides what it wants to hear of.

    What a method raises ends the run, or costs the case, as what somebody else's code raises does.

    Attributes
    ----------
    measures : bool
        Whether memory has to be measured for it.
    draws : bool
        Whether it looks at labels.
    """

    measures: bool = False
    draws: bool = False

    def case(self, name: str, sampler: PeakSampler | None) -> AbstractContextManager[object]:
        """Take part in one case: what is returned is entered when it begins, and left when it ends, however it does."""
        return nullcontext()

    def progress(self, progress: Progress) -> None:
        """Take note of a stage that begins, is returned to, or gets on; in the thread that works."""

    def plan(self, plan: Plan) -> None:
        """Take note of the final plan of a case."""

    def written(self, made: Made) -> None:
        """Take note that the files of a case are there; in the thread that has written them."""

    def done(self, report: CaseReport) -> None:
        """Take note of a case that is done, its files included."""

    def draw(self, setup: Setup, job: Job, case: PreprocessedCase, labels: NDArray[Any]) -> None:
        """Keep what shows the labels, in the axes of the file, of a case that will be written."""


class Watched(Listener):
    """Tells a watch of progress.

    Attributes
    ----------
    watch : StallWatch
        To be entered by whoever owns this; the CPU time that measuring memory takes is no progress for it.
    """

    def __init__(self, limits: WorkerLimits, device: str, line_s: float) -> None:
        self._sampler: PeakSampler | None = None
        self.watch = StallWatch(limits, device, line_s, self._observed_s)

    def case(self, name: str, sampler: PeakSampler | None) -> AbstractContextManager[object]:
        """Keep the sampler of the case."""
        self._sampler = sampler
        return nullcontext()

    def progress(self, progress: Progress) -> None:
        """Tell the watch."""
        self.watch.note(progress)

    def _observed_s(self) -> float:
        return 0.0 if self._sampler is None else self._sampler.cpu_s


class Records(Listener):
    """Keeps a done-record of each case that says what it would be about."""

    measures = True

    def written(self, made: Made) -> None:
        """Write the record."""
        if made.job.recipe is not None:
            made.job.recipe.write_record(made.inputs, made.arithmetic, made.told)


class Callbacks(Listener):
    """The callables that a client has given among the options."""

    def __init__(self, options: Options) -> None:
        self.measures = options.on_case is not None or options.on_progress is not None
        self._options = options

    def progress(self, progress: Progress) -> None:
        """Tell the client."""
        if self._options.on_progress is not None:
            self._options.on_progress(progress)

    def plan(self, plan: Plan) -> None:
        """Tell the client."""
        if self._options.on_plan is not None:
            self._options.on_plan(plan)

    def done(self, report: CaseReport) -> None:
        """Tell the client."""
        if self._options.on_case is not None:
            self._options.on_case(report)


def on_terminal() -> bool:
    """Tell whether bars would be seen: they go to stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressBars(Listener):
    """One bar per stage of a case that has several steps."""

    def __init__(self) -> None:
        self._bars: dict[tuple[str, str], Any] = {}

    @contextmanager
    def case(self, name: str, sampler: PeakSampler | None) -> Iterator[None]:
        """Close the bars of the case when it ends."""
        try:
            yield
        finally:
            for key in [key for key in self._bars if key[0] == name]:
                self._bars.pop(key).close()

    def progress(self, progress: Progress) -> None:
        """Move the bar of this stage."""
        if progress.total == 1:
            return
        key = progress.case, progress.stage
        if key not in self._bars:
            name = f"{progress.where} {progress.stage}"
            self._bars[key] = tqdm(total=progress.total, desc=name, bar_format=_FORMAT)
        bar = self._bars[key]
        if progress.memory_bytes:
            bar.set_postfix_str(format_gib(progress.memory_bytes), refresh=False)
        bar.update(progress.done - bar.n)


@contextmanager
def logging_prints() -> Iterator[None]:
    """Log, for who debugs, what nnU-Net prints in the block: none of it tells what the caller does not know."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("%s", line)
