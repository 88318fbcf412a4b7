"""Everybody who follows a run, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.predict.listeners import Callbacks, Listener, ProgressBars, Records, Watched, on_terminal
from nnunet_lowmem.predict.outcomes import RunReport
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.report.page import HtmlReport, facts_of
from nnunet_lowmem.system.owned_folders import temporary_folder
from nnunet_lowmem.system.stalls import WorkerLimits

#: Seconds between two plain lines where no terminal shows bars.
LINE_S = 10.0


def audience(setup: Setup) -> list[Listener]:
    """Return bars, if they would be seen, and the client's callbacks."""
    bars = [ProgressBars()] if setup.allow_tqdm and on_terminal() else []
    return [*bars, Callbacks(setup.options)]


@contextmanager
def following(setup: Setup, report: RunReport, target: str | list[str] | None = None) -> Iterator[list[Listener]]:
    """Give all who follow a run; the page among them if it is wanted and there is a folder for it.

    Parameters
    ----------
    setup : Setup
    report : RunReport
        Filled by whoever runs the cases.
    target : str, list of str, or None
        Output folder, or outputs.
    """
    options, pages = setup.options, []
    with ExitStack() as stack:
        if options.report and target is not None:
            folder = stack.enter_context(temporary_folder(options.tmp_dir))
            page = HtmlReport(adapter.output_folder(target), folder, facts_of(setup), report)
            pages.append(stack.enter_context(page))
        line_s = LINE_S if setup.allow_tqdm and not on_terminal() else 0
        watched = Watched(WorkerLimits(stall_s=options.worker_timeout_s), str(setup.device), line_s)
        stack.enter_context(watched.watch)
        yield [Records(), watched, *pages, *audience(setup)]
