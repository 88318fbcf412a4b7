"""One case on its way: its plans, then from the preprocessed image to its segmentation and probabilities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import along_last, bounds, without
from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.budget.ladder import Recovery
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels import next_stages, rules
from nnunet_lowmem.labels.counting import LabelCounts
from nnunet_lowmem.labels.heads import Keeper, ResampledHeads, empty_label_map, label_heads, label_slabs
from nnunet_lowmem.labels.labeller import Labelling, LabelMap
from nnunet_lowmem.labels.parts import Part, cut
from nnunet_lowmem.labels.probabilities import ProbabilitySink, label_and_export, npz_sink
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet import adapter, model_keys
from nnunet_lowmem.nnunet.read_by import writer_of
from nnunet_lowmem.nnunet.rehearsing import rehearse
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.overrides.lookup import IN_WORKERS_BEFORE
from nnunet_lowmem.predict import parts
from nnunet_lowmem.predict.held_logits import HeldLogits, label_manager
from nnunet_lowmem.predict.jobs import Array, Files, Job
from nnunet_lowmem.predict.leaving import Leaving, leaving
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.loading import Load, facts_of_job
from nnunet_lowmem.predict.logits import FoldLogits, TileNetwork
from nnunet_lowmem.predict.pending_write import PendingWrite
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.unfinished import unfinished_of
from nnunet_lowmem.predict.warming import warm_up
from nnunet_lowmem.preprocessing.checks import check_headers
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Place, PreprocessedCase, Result
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs, store_slabs, whole_slab
from nnunet_lowmem.window.tiles import PredictedTiles

logger = logging.getLogger(__name__)


class Predicted(NamedTuple):
    """What has been made of a case.

    Attributes
    ----------
    result : Result
        In the axis order and grid of the file; None where the labels have left for theirs.
    plan : Plan
    case : PreprocessedCase
        The case that the result is of: of a part, a case of its own.
    tiles : dict
        Of all folds: "reused", constant tiles that no network saw; "computed", with them; "of_case", of the whole case.
    counts : LabelCounts or None
        Of the labels that have left for their file.
    """

    result: Result
    plan: Plan
    case: PreprocessedCase
    tiles: dict[str, int]
    counts: LabelCounts | None = None


@dataclass(frozen=True)
class CaseRun:
    """The steps of one case.

    Attributes
    ----------
    setup : Setup
    job : Job
    clock : StageClock
    folder : Path
        For arrays that do not fit RAM.
    probabilities : bool
        Are wanted, too.
    listeners : sequence of Listener
        Told of the plan.
    beside : callable
        Settles what else goes on while the case is predicted, and lets the planning know; called before the final plan.
    """

    setup: Setup
    job: Job
    clock: StageClock
    folder: Path
    probabilities: bool
    listeners: Sequence[Listener]
    beside: Callable[[CasePlanning], None]

    def check(self) -> None:
        """Refuse a model that cannot be followed, and files that cannot be believed, before anything is measured.

        Raises
        ------
        ModelError
        UsageError
            If the header is not to be believed: that comes first, or its size would be blamed.
        """
        setup, replaced = self.setup, self.setup.steps.replaced
        is_raw = isinstance(self.job.source, Files | Array)
        preprocesses = is_raw and not replaced(Step.READING, Step.PREPROCESSING)
        configuration = setup.configuration_manager.configuration
        model_keys.check_case(setup.plans_manager.plans, configuration, preprocesses, exports=not replaced(Step.EXPORT))
        if self.job.files is not None:
            check_headers(self.job.files.images, setup.plans_manager, setup.configuration_manager, setup.spacing)
        parts.check(setup, self.job)
        warm_up_kernels(setup)

    def planning(self, worker_bytes: int, pending: PendingWrite | None) -> CasePlanning:
        """Measure what is in use, and prepare to plan by the header.

        Parameters
        ----------
        worker_bytes : int
            Of a process that preprocesses the next case; where there is one, what children hold is not measured.
        pending : PendingWrite or None
            Files of the case before that are to be written meanwhile.
        """
        setup = self.setup
        # whatever the network has beside its weights is made now, and counts as in use
        model = TileNetwork(setup).facts(worker_bytes=worker_bytes)
        budget = setup.budget(with_children=worker_bytes == 0)
        sizes = case_sizes(setup, model)
        header, is_stored = None, self.job.piece is not None and self.job.piece.stored is not None
        if not is_stored and not setup.steps.replaced(Step.READING, Step.PREPROCESSING):
            with suppress(UsageError):  # the reader tells it better
                header = facts_of_job(sizes, self.job, self.probabilities)
        if header is not None and not self._may_leave:
            header = header.kept()
        further_bytes, pending_bytes = (0, 0) if pending is None else (pending.further_bytes, pending.all_bytes)
        budget = budget.with_in_use(further_bytes)
        return CasePlanning(sizes, model, budget, self.folder, header, setup.weights.move, pending_bytes)

    def preprocessed(self, load: Load, planning: CasePlanning) -> PreprocessedCase:
        """Return the preprocessed case, under the plan by the header."""
        others = self.setup.steps.replaced(Step.ADAPTER, Step.READING, *IN_WORKERS_BEFORE)
        with foreign(self.clock if others else None):
            mask = parts.read_mask(self.setup, self.job)
            case = planning.preprocessing(lambda: load(self.job, self.setup, planning))
        case = parts.with_wanted(case, mask, self.setup, of_file=not isinstance(self.job.source, Array))
        return parts.narrowed(case, None if self.job.piece is None else self.job.piece.box)

    def predicted(self, case: PreprocessedCase, planning: CasePlanning, output: ExitStack) -> Predicted:
        """Return what is predicted of a case; probabilities are written where the job has an output.

        Where labels leave for their file, it gets its name when `output` is closed, and there is no result.
        """
        setup, clock, rule = self.setup, self.clock, self.label_rule()
        geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
        as_a_whole = rule is None or not self.is_ours(case)
        part_of = partial(planning.sizes.part, geometry, case.properties["spacing"], case.wanted, as_a_whole)
        part = part_of()
        written = parts.as_case(case, part, setup)
        if self.job.output is not None and not setup.steps.replaced(Step.EXPORT):
            with clock.failing_in("writing"):
                self._rehearse_writing(self.job.output, written.properties, rule)
        keeper, way = (Keeper(), None) if as_a_whole else self._keeping(written.properties, part, rule)
        # planned as a whole, so that what is left of it is cut where it was cut before
        rest = without(part.crop, keeper.found, along_last(part.grid.roll_axis))
        axis = part.grid.roll_axis
        left = part_of(bounds(rest)).along(axis) if keeper.found else part
        logits = FoldLogits(setup, case, clock, left.grid)
        planned = partial(planning.plan, self.job.name, case, self.probabilities, part, way is not None)
        plan, folds = self._planned(planned, logits, planning)
        boxes = cut(part, keeper.counts(part, plan.placement.columns, logits.seconds(part.grid)), rest)
        turns = [part_of(box).along(axis) for box in boxes] if len(boxes) > 1 else [left]
        tiles, reused, result = setup.weights.folds * sum(turn.grid.tile_count for turn in turns), 0, None
        recovery = planning.recovery(plan)  # of all at once: a turn takes no more
        if plan.placement.label_map is None:
            assert way is not None, "it was planned with one"
            keeper.label_map(partial(output.enter_context, way.begun()))
        with RowThreads(plan.placement.threads) as threads, clock.stage("prediction", tiles):
            for turn in turns:
                if turn is not left:
                    logits, folds = self._turn(turn, case, planning)
                if self.is_ours(case):
                    slabs = logits.slabs(folds, threads, self.folder, recovery)
                    more = turn is not turns[-1]
                    result = self._labels(slabs, logits, turn, rule, threads, recovery, keeper, more)
                else:
                    result = self._labels_of_held(logits, turn, rule, threads, recovery)
                reused += logits.reused
            if self.job.piece is not None:
                with clock.stage("writing"):  # which asks whether somebody still waits for it
                    keeper.ended()
        if self.probabilities and self.job.output is not None and isinstance(result, np.ndarray):
            with clock.failing_in("export"):
                adapter.write_properties(written.properties, self.job.output + ".pkl")
        counted = {"computed": tiles, "of_case": setup.weights.folds * part.tiles_of_case, "reused": reused}
        return Predicted(result, plan, written, counted, None if way is None else way.counts)

    def _keeping(self, properties: dict[str, Any], part: Part, rule: LabelRule | None) -> tuple[Keeper, Leaving | None]:
        """Return who holds the labels that are found slab by slab, and how they may leave for their file."""
        if rule is None or not rules.streams(part.resampling, rule, self.probabilities):
            return Keeper(), None
        keeper = unfinished_of(self.setup, self.job, part, rule.dtype) or Keeper()
        if not self._may_leave:
            return keeper, None
        return keeper, leaving(self.setup, self.job, part, rule, properties, keeper.found, self.clock, self.folder)

    def _turn(
        self, turn: Part, case: PreprocessedCase, planning: CasePlanning
    ) -> tuple[FoldLogits, Iterator[PredictedTiles]]:
        """Begin with one of several parts, of which the first tile has been measured."""
        logits = FoldLogits(self.setup, case, self.clock, turn.grid)
        if planning.model.reused_bytes:  # there is room for what is kept
            logits.find_repeated()
        return logits, logits.folds()

    def _labels_of_held(
        self, logits: FoldLogits, part: Part, rule: LabelRule | None, threads: RowThreads, recovery: Recovery
    ) -> Result:
        """Label logits that somebody else makes, or takes part in making: all at once."""
        held = self._held.made(logits.case)
        if not self._held.are_plain(held, logits.grid.image_shape):
            return self._held.converted(held, logits.case, part)
        slab = whole_slab(held.contiguous())
        del held
        return self._labels(nullcontext(iter([slab])), logits, part, rule, threads, recovery, Keeper())

    def _rehearse_writing(self, output: str, properties: dict[str, Any], rule: LabelRule | None) -> None:
        """Refuse the case before it is computed if its label map has no writer."""
        plans = self.setup.plans_manager
        in_file = [int(properties["shape_before_cropping"][axis]) for axis in plans.transpose_backward]
        writer = type(writer_of(plans))
        rehearse(writer, output, self.setup.file_ending, properties, in_file, rule, self.folder)

    def _planned(
        self, planned: Callable[[], Plan], logits: FoldLogits, planning: CasePlanning
    ) -> tuple[Plan, Iterator[PredictedTiles]]:
        """Return the final plan of a case, and the tiles of its folds, of which the network may have seen the first."""
        folds = logits.folds()
        planned()
        if self.is_ours(logits.case) and logits.tile_count:
            with self.clock.stage("prediction", logits.tile_count):
                folds = self._tried(planned, folds, logits, planning)
        self.beside(planning)
        plan = planned()
        for listener in self.listeners:
            with foreign(self.clock):
                listener.plan(plan)
        return_freed_memory()
        return plan, folds

    def _tried(
        self,
        planned: Callable[[], Plan],
        folds: Iterator[PredictedTiles],
        logits: FoldLogits,
        planning: CasePlanning,
    ) -> Iterator[PredictedTiles]:
        """Let the planning know what a tile takes, in the arithmetic that is found to be the best here."""
        network, first, tried_bytes = logits.network, None, 0
        if network.ways.is_undecided or planning.model.unmeasured_bytes:
            first = next(folds)
            folds = chain([first], folds)
        if first is not None and network.ways.is_undecided:
            tried_bytes = network.ways.choose(first.middle, planning.recovery(planned()).run, planning.has_room)
            planning.learn(**network.tile_facts())
        output_bytes = network.output_bytes() if logits.find_repeated() else 0
        if output_bytes and not planning.keeps(output_bytes):
            logits.forget_repeated()
        if first is not None and planning.model.unmeasured_bytes:
            logits.reuse_in(first)
            network.measure(first, planning.recovery(planned()).run)
            planning.learn(**network.tile_facts())
        # what has been taken to compare is part of what this case takes, and of no other
        planning.learn(activation_bytes=max(planning.model.activation_bytes, tried_bytes))
        return folds

    def _labels(
        self,
        slabs: AbstractContextManager[Iterator[LogitsSlab]],
        logits: FoldLogits,
        part: Part,
        rule: LabelRule | None,
        threads: RowThreads,
        recovery: Recovery,
        keeper: Keeper,
        more: bool = False,
    ) -> Result:
        """Which way logits take: slab by slab, head by head, or all at once through nnU-Net's functions.

        Where more of the case follows, the keeper has the label map.
        """
        setup, case, grid = self.setup, logits.case, logits.grid
        if rule is None or not part.resampling.per_head:
            self._held.tell(rule)
            with slabs as made:
                whole = collect_slabs(made, setup.heads, grid.image_shape)
            return self._held.converted(whole.cpu(), case, part)
        targets = adapter.next_stage_targets(case, setup.plans_manager, setup.configuration_manager)
        how = Labelling(rule, threads, lambda: recovery.plan.placement.slab_limits, recovery.run)
        placement = recovery.plan.placement
        with ExitStack() as stack:
            with slabs as made:
                made = next_stages.label_along(made, targets, how, self.folder)
                if rules.streams(part.resampling, rule, self.probabilities):
                    folder = self.folder if placement.label_map is Place.DISK else None
                    make, crop = partial(_label_map, part, rule, folder), part.geometry.crop
                    labels = label_slabs(made, part.resampling, crop, how, self.clock, keeper, make, more)
                    return None if more or labels is None else self._to_file_axes(part.framed(labels))
                folder = self.folder if placement.planes is Place.DISK else None
                store = stack.enter_context(PlaneStore(setup.heads, grid.image_shape, grid.roll_axis, folder))
                store_slabs(made, store)
            return self._by_heads(store, part, rule, threads)

    def _by_heads(self, store: PlaneStore, part: Part, rule: LabelRule, threads: RowThreads) -> Result:
        by_softmax, geometry = rules.takes_softmax(rule, self.probabilities), part.geometry
        passes = 1 if not (by_softmax and rule.ranked) else 3 if self.probabilities else 2
        heads = ResampledHeads(store, part.resampling, geometry.cropped_shape, threads, self.clock.advance)
        with self.clock.stage("export", heads.heads * passes):
            if self.probabilities:
                return self._with_probabilities(heads, part, rule)
            labels = label_and_export(heads, geometry, rule, None) if by_softmax else label_heads(heads, geometry, rule)
            return self._to_file_axes(part.framed(labels))

    def _with_probabilities(self, heads: ResampledHeads, part: Part, rule: LabelRule) -> Result:
        """Return (segmentation, probabilities), or write the probabilities and return the segmentation."""
        backward, output = self.setup.plans_manager.transpose_backward, self.job.output

        def label(sink: ProbabilitySink) -> NDArray[Any]:
            outside = chain([float(rule.ranked)], repeat(0.0))
            given = label_and_export(heads, part.geometry, rule, lambda head: sink(part.framed(head, next(outside))))
            return self._to_file_axes(part.framed(given))

        if output is None:
            collected: list[NDArray[np.float32]] = []
            labels = label(lambda head: collected.append(head.copy()))
            return labels, np.stack(collected).transpose([0, *(axis + 1 for axis in backward)])
        shape = tuple(part.shape[axis] for axis in backward)
        dtype = np.dtype(self.setup.options.probabilities_dtype)
        with (
            atomic_output(Path(output + ".npz")) as path,
            npz_sink(path, heads.heads, shape, backward, dtype) as sink,
        ):
            return label(sink)

    def _to_file_axes(self, labels: NDArray[Any]) -> NDArray[Any]:
        return labels.transpose(self.setup.plans_manager.transpose_backward)

    @property
    def _held(self) -> HeldLogits:
        return HeldLogits(self.setup, self.job, self.clock, self.probabilities)

    def label_rule(self) -> LabelRule | None:
        """How logits become labels; None where nnU-Net's, or somebody's, functions have to be asked."""
        if self.setup.steps.replaced(Step.EXPORT):
            return None
        return adapter.label_rule(label_manager(self.setup, self.job))

    @property
    def _may_leave(self) -> bool:
        """Whether nobody asks for the label map but its file."""
        is_asked_for = any(listener.draws for listener in self.listeners) or self.setup.steps.replaced(Step.EXPORT)
        return self.job.output is not None and not is_asked_for

    def is_ours(self, case: PreprocessedCase) -> bool:
        """Whether nobody else takes part in making the logits, and the image is what our tiles are."""
        is_single = case.image.dtype == np.float32 or case.image.dtype.kind != "f"
        return is_single and not self.setup.steps.replaced(Step.LOGITS, Step.WINDOW)


def _label_map(part: Part, rule: LabelRule, folder: Path | None) -> LabelMap:
    return LabelMap(empty_label_map(part.geometry, rule, folder)[0])


def case_sizes(setup: Setup, model: Any) -> CaseSizes:
    """Return what finds the facts of cases for a predictor."""
    holds_logits = bool(setup.steps.replaced(Step.LOGITS, Step.WINDOW))
    managers = setup.plans_manager, setup.configuration_manager, setup.label_manager
    asked: Any = setup.bbox, setup.options.roi, setup.file_ending, setup.spacing, setup.on_network_grid
    return CaseSizes(*managers, setup.tile_step_size, model, holds_logits, *asked)


def warm_up_kernels(setup: Setup) -> None:
    """Compile or load what a predictor needs, so that it counts as reserved."""
    rule = adapter.label_rule(setup.label_manager)
    if rule is not None:
        warm_up(rule.ranked, str(rule.dtype), len(setup.patch_size), bool(setup.options.fast))
