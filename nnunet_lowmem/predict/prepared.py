"""A case that several processes label: preprocessed once, and cut into boxes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nnunet_lowmem.boxes import along_last, bounds, without
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.errors import WriteError, because
from nnunet_lowmem.labels import rules
from nnunet_lowmem.labels.parts import cut
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.predict.case import CaseRun
from nnunet_lowmem.predict.jobs import Job, Piece
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.loading import load
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.stored import store
from nnunet_lowmem.predict.unfinished import checksums, token, unfinished_of
from nnunet_lowmem.predict.volume_jobs import setup_for
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.owned_folders import temporary_folder
from nnunet_lowmem.types import Box, PreprocessedCase, Shape3
from nnunet_lowmem.window.tiling import TileGrid

logger = logging.getLogger(__name__)

# of all tiles that may be computed twice
_SHARE = 0.25


@dataclass(frozen=True)
class Cut:
    """A case that is prepared, and what others may label of it.

    Attributes
    ----------
    piece : Piece or None
        Joins what they label; None where the case is better left whole.
    boxes : tuple of boxes
        Of what is asked for, axes of the network.
    tiles : tuple of int
        Of all folds, for each box.
    seconds, measured_bytes : dict
        What that took, by stages.
    """

    piece: Piece | None = None
    boxes: tuple[Box, ...] = ()
    tiles: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    measured_bytes: dict[str, int] = field(default_factory=dict)


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
        If it cannot be kept, and the cut was asked for.
    """
    setup = setup_for(setup, job)
    with temporary_folder(setup.options.tmp_dir) as scratch, clock.stage("preprocessing"):
        run = CaseRun(setup, job, clock, scratch, probabilities, listeners, lambda _: None)
        run.check()
        planning = run.planning(0, None)
        planning.check()
        if job.recipe is None or job.files is None:
            return Cut()
        sums = checksums(setup, job.recipe, job.files.images)  # of what is read now
        case = run.preprocessed(load, planning)
        boxes, tiles, shape = _cut(run, case, planning, count, is_asked_for)
        made = Cut(Piece(*sums, token(), shape), boxes, tiles) if len(boxes) > 1 else Cut()
        if made.piece is not None:
            try:
                made = replace(made, piece=replace(made.piece, stored=store(case, folder)))
            except (OSError, WriteError) as error:
                if is_asked_for:
                    raise because(WriteError, f"the preprocessed case cannot be kept: {error}", error) from error
                logger.warning("case %s is left whole: the preprocessed case cannot be kept: %s", job.name, error)
                made = Cut()
    peaks = clock.sampler.peaks_bytes() if clock.sampler is not None else {}
    return replace(made, seconds=clock.seconds, measured_bytes=peaks)


def most_parts(grid: TileGrid) -> int:
    """Return into how many parts a case is cut at most where nobody asks for more: few of its tiles are in two."""
    axis = grid.roll_axis
    return 1 + int(_SHARE * len(grid.starts[axis]) / max(1, grid.again(axis)))


def _cut(
    run: CaseRun, case: PreprocessedCase, planning: CasePlanning, count: int, is_asked_for: bool
) -> tuple[tuple[Box, ...], tuple[int, ...], Shape3]:
    """Return boxes, tiles for each, and the shape of what is asked for; no box where all is needed as a whole."""
    rule, setup = run.label_rule(), run.setup
    geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
    as_a_whole = rule is None or not run.is_ours(case)
    part_of = partial(planning.sizes.part, geometry, case.properties["spacing"], case.wanted, as_a_whole)
    part = part_of()
    if as_a_whole or rule is None or not rules.streams(part.resampling, rule, run.probabilities):
        return (), (), part.shape
    keeper = unfinished_of(setup, run.job, part, rule.dtype)
    found = [] if keeper is None else keeper.found
    axis, counts = part.grid.roll_axis, [1, 1, 1]
    rest = without(part.crop, found, along_last(axis))
    left = part_of(bounds(rest)).along(axis) if found else part
    counts[axis] = count if is_asked_for else min(count, most_parts(left.grid))
    boxes = cut(left, (counts[0], counts[1], counts[2]), rest, evenly=True)
    tiles = tuple(setup.weights.folds * part_of(box).grid.tile_count for box in boxes)
    return tuple(boxes), tiles, part.shape
