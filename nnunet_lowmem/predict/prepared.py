"""A case that several processes label: preprocessed once, and cut into boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nnunet_lowmem.boxes import along_last, without
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.errors import WriteError
from nnunet_lowmem.labels import rules
from nnunet_lowmem.labels.parts import cut
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.predict.case import CaseRun
from nnunet_lowmem.predict.jobs import Job, Piece
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.loading import load
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.stored import store
from nnunet_lowmem.predict.unfinished import SHARE_OF_CUTS, unfinished_of
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.owned_folders import temporary_folder
from nnunet_lowmem.types import Box, PreprocessedCase


@dataclass(frozen=True)
class Cut:
    """A case that is prepared, and what others may label of it.

    Attributes
    ----------
    piece : Piece
        Joins what they label, or labels all.
    boxes : tuple of boxes
        Of what is asked for, axes of the network; none where the case is better left whole.
    tiles : tuple of int
        Of all folds, for each box.
    """

    piece: Piece
    boxes: tuple[Box, ...] = ()
    tiles: tuple[int, ...] = ()


def prepare(
    setup: Setup,
    job: Job,
    probabilities: bool,
    count: int,
    folder: Path,
    clock: StageClock,
    listeners: Sequence[Listener],
    *,
    is_asked_for: bool,
) -> Cut:
    """Preprocess a case, and say how it is cut.

    Parameters
    ----------
    setup, job, probabilities, clock, listeners
        As a case that is predicted has them.
    count : int
        Into how many boxes it may be cut, all along the axis that the window rolls along.
    folder : Path
        Where the preprocessed case is kept.
    is_asked_for : bool
        It is cut whatever that costs; else only as far as few tiles are computed twice.

    Raises
    ------
    WriteError
        If it cannot be kept.
    """
    with temporary_folder(setup.options.tmp_dir) as scratch, clock.stage("preprocessing"):
        run = CaseRun(setup, job, clock, scratch, probabilities, listeners, lambda _: None)
        run.check()
        planning = run.planning(0, None)
        planning.check()
        case = run.preprocessed(load, planning)
        made = _cut(run, case, planning, count, is_asked_for)
        try:
            return replace(made, piece=replace(made.piece, stored=store(case, folder)))
        except OSError as error:
            raise WriteError(f"the preprocessed case cannot be kept in {folder}: {error}") from error


def _cut(run: CaseRun, case: PreprocessedCase, planning: CasePlanning, count: int, is_asked_for: bool) -> Cut:
    rule, setup = run.label_rule(), run.setup
    geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
    as_a_whole = rule is None or not run.is_ours(case)
    part_of = partial(planning.sizes.part, geometry, case.properties["spacing"], case.wanted, as_a_whole)
    part = part_of()
    axis = part.grid.roll_axis
    if as_a_whole or rule is None or not rules.streams(part.resampling, rule, run.probabilities):
        return Cut(Piece(None, part.shape))
    keeper = unfinished_of(setup, run.job, part, rule.dtype)
    if keeper is None:
        return Cut(Piece(None, part.shape))
    again = math.ceil(1 / setup.tile_step_size)  # rows that reach across a cut
    most = 1 + int(SHARE_OF_CUTS * len(part.grid.starts[axis]) / again)
    counts = [1, 1, 1]
    counts[axis] = count if is_asked_for else min(count, most)
    boxes = cut(part, (counts[0], counts[1], counts[2]), without(part.crop, keeper.found, along_last(axis)))
    piece = Piece(keeper.made_with, part.shape)
    if len(boxes) < 2:
        return Cut(piece)
    tiles = tuple(setup.weights.folds * part_of(box).grid.tile_count for box in boxes)
    return Cut(piece, tuple(boxes), tiles)
