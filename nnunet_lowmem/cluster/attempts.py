"""Cases on their way to workers, and how often that was tried."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from nnunet_lowmem.cluster.members import Member
from nnunet_lowmem.errors import WorkerError
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.outcomes import CaseReport, FailedCase, RunReport, Turn
from nnunet_lowmem.predict.prepared import Cut
from nnunet_lowmem.predict.stored import forget_stored
from nnunet_lowmem.predict.unfinished import forget_pieces


@dataclass(eq=False)
class Whole:
    """A case that is made in pieces.

    Attributes
    ----------
    job : Job
        As it was to begin with.
    cut : Cut
        Perhaps into nothing: then it is left whole.
    left : int
        Pieces that are not done yet; the last one, which joins them, comes when they are.
    reports : list of CaseReport
        Of those that are.
    """

    job: Job
    cut: Cut
    left: int
    reports: list[CaseReport] = field(default_factory=list)

    def forget(self, *, is_done: bool) -> None:
        """Remove what is kept of the case; labels only when its file is there."""
        piece, recipe = self.cut.piece, self.job.recipe
        if piece is not None and piece.stored is not None:
            forget_stored(piece.stored)
        if piece is not None and recipe is not None and is_done:
            forget_pieces(recipe.outputs[0])


@dataclass(eq=False)
class Task:
    """One case on its way, or a piece of it.

    Attributes
    ----------
    job : Job
    size : int
        Tiles of all folds: what decides who comes first; 0 where they are not known.
    may_be_cut : bool
    most_parts : int
        Into how many, where nobody asks for more.
    lost_with : list of Member
        Workers that have gone while they had it.
    starts, misread : int
        How often it was given to a worker, and to one that could not read the model.
    too_small : float or None
        Bytes of the largest worker on which it did not fit.
    refused : FailedCase or None
        What that worker said.
    whole : Whole or None
        Of what it is a piece.
    """

    job: Job
    size: int
    may_be_cut: bool = False
    most_parts: int = 1
    lost_with: list[Member] = field(default_factory=list)
    starts: int = 0
    misread: int = 0
    too_small: float | None = None
    refused: FailedCase | None = None
    whole: Whole | None = None

    @property
    def writes(self) -> bool:
        """Whether the files of the case are there when it is done."""
        return self.job.piece is None or self.job.piece.box is None

    @property
    def suffix(self) -> str:
        """Say behind its name what it does of its case, as far as the name does not."""
        return ", finished" if self.job.piece is not None and self.writes else ""

    def may_run_on(self, member: Member) -> bool:
        """Whether a worker has more memory than one that was too small, and is not one that has gone with it."""
        is_larger = self.too_small is None or member.limit > self.too_small
        return is_larger and all(member.key != lost.key for lost in self.lost_with)


@dataclass
class Attempt:
    """A case that a worker has.

    Attributes
    ----------
    task : Task
    member : Member
    name : str
        Of the file without which the worker leaves the case.
    what : str
        The case, and what of it.
    began_s : float
        When it was sent, by a clock that only goes on.
    began_at_s : float
        The same in seconds since the epoch.
    followed : ExitStack
        Listeners that take part.
    is_heard : bool
        The worker has said something of it.
    unfetched : int
        How often its report could not be fetched.
    """

    task: Task
    member: Member
    name: str
    what: str
    began_s: float
    began_at_s: float
    followed: ExitStack
    is_heard: bool = False
    unfetched: int = 0

    def turn(self, *, is_done: bool) -> Turn:
        """Return what the worker has done, which has just ended."""
        return Turn(self.member.name, self.what, self.began_at_s, time.time(), is_done)


def failed(task: Task, error: WorkerError) -> RunReport:
    """Return the report of a case that fails by what became of its workers."""
    return RunReport(failed=[FailedCase.of(task.job.name, "prediction", error)])
