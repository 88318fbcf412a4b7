"""Cases in pieces: which are cut, what follows when a piece is done, and what becomes of the case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from nnunet_lowmem.cluster.attempts import Task, Whole
from nnunet_lowmem.cluster.tasks import Cutting
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.predict.outcomes import CaseReport, FailedCase, RunReport
from nnunet_lowmem.predict.prepared import Cut
from nnunet_lowmem.types import Place

#: Tiles, of all folds, of a case that is worth more than one worker where others would have nothing to do.
LONG_TILES = 64


class Splitting:
    """Decides about each case of a command.

    Parameters
    ----------
    asked : str
        "auto", "never", or into how many boxes each case is cut.

    Raises
    ------
    UsageError
        If it is nothing of that.
    """

    def __init__(self, asked: str) -> None:
        self._count: int | None = None
        if asked in ("auto", "never"):
            self._count = None if asked == "auto" else 1
        elif asked.isdecimal() and int(asked):
            self._count = int(asked)
        else:
            raise UsageError(f"--split is auto, never or a number of parts, and not {asked!r}")

    def cutting(self, task: Task, cases: int, workers: int) -> Cutting | None:
        """Return how a case is cut, None where it is left whole or is a piece by now.

        Parameters
        ----------
        task : Task
        cases : int
            That wait or are being predicted, this one among them.
        workers : int
        """
        if task.whole is not None or not task.may_be_cut:
            return None
        count = self._count
        if count is None:
            count = min(task.most_parts, workers // cases) if task.size >= LONG_TILES else 1
        return Cutting(count, self._count is not None) if count > 1 else None

    @staticmethod
    def pieces(task: Task, cut: Cut) -> list[Task]:
        """Return what is to be done of a case that has been prepared."""
        whole = Whole(task.job, cut, max(1, len(cut.boxes)))
        if cut.piece is None:
            return [replace(task, whole=whole)]
        return [_part(whole, number) for number in range(whole.left)]

    @staticmethod
    def heard(task: Task, report: RunReport, waiting: list[Task]) -> RunReport | None:
        """Take the report of a task; return that of its case, None while others are to come.

        Parameters
        ----------
        task : Task
        report : RunReport
            With what is done or failed.
        waiting : list of Task
            Gets what follows, and loses what nobody needs any more.
        """
        whole = task.whole
        if whole is None:
            return report
        if report.failed:
            waiting[:] = [other for other in waiting if other.whole is not whole]
            whole.forget(is_done=False)
            return RunReport(failed=[_of_case(whole, failed) for failed in report.failed])
        whole.reports += report.done
        whole.left -= 1
        if whole.left:
            return None
        if task.writes:
            whole.forget(is_done=True)
            return RunReport(done=[joined(whole.reports, whole.cut)])
        whole.left = 1
        waiting.insert(0, Task(replace(whole.job, piece=whole.cut.piece), 0, whole=whole))
        return None


def _part(whole: Whole, number: int) -> Task:
    job, cut = whole.job, whole.cut
    assert cut.piece is not None, "it has been cut"
    name = f"{job.name}, part {number + 1} of {len(cut.boxes)}"
    piece = replace(cut.piece, box=cut.boxes[number])
    part = replace(job, name=name, output=None, continues=False, piece=piece)
    return Task(part, cut.tiles[number], whole=whole)


def joined(reports: Sequence[CaseReport], cut: Cut) -> CaseReport:
    """Return the report of a case of those of its pieces, the last of which has written it, with the time of all.

    Its plan is that of the piece which takes most.
    """
    seconds, peaks = Counter(cut.seconds), dict(cut.measured_bytes)
    for report in reports:
        seconds.update(report.seconds)
        for stage, peak in report.measured_bytes.items():
            peaks[stage] = max(peak, peaks.get(stage, 0))
    largest, last = max(reports, key=lambda report: report.plan.projected_bytes(Place.RAM)), reports[-1]
    return replace(
        last,
        seconds=dict(seconds),
        plan=replace(largest.plan, case=last.case),
        measured_bytes=peaks,
        reused_tiles=sum(report.reused_tiles for report in reports),
        tiles=sum(report.tiles for report in reports),
    )


def _of_case(whole: Whole, failed: FailedCase) -> FailedCase:
    case = whole.job.name
    piece = failed.case.removeprefix(f"{case}, ")
    if piece == failed.case:
        return failed
    reason = failed.reason.removeprefix(f"case {failed.case}").lstrip(" ,:")
    return replace(failed, case=case, reason=f"{piece}: {reason}")
