"""The steps of one case: its plan, then from a preprocessed image to its segmentation and probabilities."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.budget.arrays import THREAD_BYTES, WORKER_BYTES, Budget, CaseFacts, writer_bytes
from nnunet_lowmem.budget.case_plan import CasePlanner, CasePlanning, ModelDescription
from nnunet_lowmem.budget.estimates import Estimate, estimates
from nnunet_lowmem.budget.machine import machine_budget
from nnunet_lowmem.budget.planner import Plan
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels import next_stages, rules
from nnunet_lowmem.labels.heads import ResampledHeads, label_heads, label_slabs
from nnunet_lowmem.labels.labeller import SlabLimits
from nnunet_lowmem.labels.probabilities import label_and_export, npz_sink
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.names import shown
from nnunet_lowmem.network.tile_memory import TileBytes, copy_of_zeros
from nnunet_lowmem.nnunet import adapter, model_files, model_keys, stock_calls
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.overrides.lookup import replaced
from nnunet_lowmem.predict.jobs import Job, facts_of_job
from nnunet_lowmem.predict.loading import CaseLoading
from nnunet_lowmem.predict.logits import LogitsPredictor
from nnunet_lowmem.predict.pending_write import PendingWrite
from nnunet_lowmem.predict.prefetching import Prefetcher
from nnunet_lowmem.predict.warming import warm_up
from nnunet_lowmem.predict.writing import CaseWriting, Result
from nnunet_lowmem.preprocessing.case import check_headers
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import RowThreads, torch_threads
from nnunet_lowmem.types import Place, PreprocessedCase
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.slabs import collect_slabs, store_slabs, whole_slab
from nnunet_lowmem.window.tiles import PredictedTiles
from nnunet_lowmem.window.tiling import TileGrid

logger = logging.getLogger(__name__)


class CasePredictor(CaseLoading, CaseWriting, LogitsPredictor):
    """The part of the predictor that takes one case from its files to its outputs."""

    _worker_bytes = 0
    _prefetcher: Prefetcher | None = None
    _latest_write: PendingWrite | None = None

    @property
    def _pending(self) -> PendingWrite | None:
        """Files of the case before that are not there yet."""
        return None if self._latest_write is None or self._latest_write.is_over else self._latest_write

    def estimate(self, source_folder: str, probabilities: bool = False) -> Iterator[Estimate]:
        """Plan every case of a folder from its header: upper bounds, since the nonzero crop is not known yet."""
        plans, configuration = self.plans_manager.plans, self.configuration_manager.configuration
        model_keys.check_case(plans, configuration, preprocesses=True, exports=True)
        self._warm_up()
        budget = self._without_weights(machine_budget(self.max_ram, self.max_vram, self.device, self.tmp_dir))
        planner = CasePlanner(self._description(), self._model_facts(self._tile_bytes_of_zeros(budget).with_margin()))
        file_ending = self.dataset_json["file_ending"]
        cascades = self.configuration_manager.previous_stage_name is not None
        cases = (
            (shown(model_files.case_name(files, file_ending)), files, files[0] if cascades else None)
            for files in model_files.list_cases(source_folder, file_ending)
        )
        return estimates(cases, planner, budget, probabilities, file_ending)

    def _tile_bytes_of_zeros(self, budget: Budget) -> TileBytes:
        """Measure a tile of zeros in a copy of the network that nobody else sees, or tell what is expected."""
        known, network, axes = self._tile_bytes(), self.network, self.allowed_mirroring_axes
        place = Place.VRAM if self.device.type == "cuda" else Place.RAM
        room = (budget.limit(place) or 0) - budget.reserved(place) - known.certain
        sample = copy_of_zeros(uncompiled(network), self.device, room) if known.uncertain else None
        if sample is None:
            return known.after(0)
        patch = self.configuration_manager.patch_size
        two_tiles = (2, *patch) if len(patch) == 2 else (2 * patch[0], *patch[1:])
        case = PreprocessedCase(np.zeros((self._input_channels(), *two_tiles), np.float32), None, {})
        try:
            # mirroring along one axis holds as much as along all of them
            self.network, self.allowed_mirroring_axes = sample, self._mirrored_axes()[:1] or None
            return self._measure(self._predicted(case, self._grid(case)), lambda run: run())
        except (MemoryError, RuntimeError) as error:
            logger.info("no tile could be run to measure the network: %s", error)
            return known.after(0)
        finally:
            self.network, self.allowed_mirroring_axes = network, axes

    def _check_keys(self, job: Job) -> None:
        given = job.files is None and job.array is None
        preprocesses = not given and not replaced(self, Step.READING, Step.PREPROCESSING)
        model_keys.check_case(
            self.plans_manager.plans,
            self.configuration_manager.configuration,
            preprocesses,
            exports=not replaced(self, Step.EXPORT),
        )

    def _begin(self, job: Job, folder: Path, probabilities: bool) -> CasePlanning:
        """Measure what is in use, and refuse a case that cannot fit by its header alone.

        Raises
        ------
        BudgetError
        UsageError
            If the header is not to be believed: that comes first, or its size would be blamed.
        """
        self._check_keys(job)
        if job.files is not None:
            check_headers(job.files[0], self.plans_manager, self.configuration_manager)
        self._warm_up()
        budget = machine_budget(self.max_ram, self.max_vram, self.device, self.tmp_dir, self._worker_bytes == 0)
        budget = self._without_weights(budget)
        facts = replace(self._model_facts(), worker_bytes=self._worker_bytes)
        planner = CasePlanner(self._description(), facts)
        pending = self._pending
        if pending is not None:
            planner = planner.changed(pending_bytes=pending.map_bytes + pending.writer_bytes)
            budget = replace(budget, reserved_ram_bytes=budget.reserved_ram_bytes - pending.resident_bytes)
        header = None
        if not replaced(self, Step.READING, Step.PREPROCESSING):
            with suppress(UsageError):  # the reader tells it better
                header = facts_of_job(planner, job, probabilities)
        self._planning = CasePlanning(planner, budget, folder, header, move_weights=self._mover())
        if pending is not None:
            if not self._planning.fits():  # more is in use than when the case before was planned
                pending.wait()
                return self._begin(job, folder, probabilities)
            pending.start()
        self._planning.check()
        return self._planning

    def _start_prefetching(self, planning: CasePlanning, probabilities: bool) -> None:
        """Preprocess the next cases in a process from now on, if every case fits beside it; its plans count it then.

        Decided once in a run, when it is known what the network takes.
        """
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is None or planning.header is None:
            return
        facts: list[CaseFacts] = []
        for job in prefetcher.all_jobs:
            with suppress(UsageError):  # told of when its turn comes
                case = facts_of_job(planning.planner, job, probabilities)
                if case is None:  # one that cannot be right
                    continue
                facts.append(replace(case, image_place=Place.DISK))  # which is where the worker puts it
        largest = max((max(case.reading_bytes, case.preprocessing_bytes) for case in facts), default=0)
        planner = planning.planner.changed(worker_bytes=WORKER_BYTES + largest)
        if all(planner.closest(case, planning.budget).fits_everywhere() for case in facts):
            planning.planner, self._worker_bytes = planner, WORKER_BYTES + largest
            prefetcher.release()

    def _warm_up(self) -> None:
        rule = adapter.label_rule(self.label_manager)
        if rule is not None:
            warm_up(rule.ranked, str(rule.dtype), len(self.configuration_manager.patch_size), self.fast)

    def _description(self) -> ModelDescription:
        return ModelDescription(
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            self.tile_step_size,
            self.device.type,
            self.perform_everything_on_device,
            bool(replaced(self, Step.LOGITS, Step.WINDOW)),
        )

    def _planned(
        self, case: PreprocessedCase, job: Job, clock: StageClock, planning: CasePlanning, probabilities: bool
    ) -> tuple[Plan, Iterator[PredictedTiles]]:
        """Return the final plan of a case, and the tiles of its folds, of which the network may have seen the first."""
        grid = self._grid(case)
        folds = self._folds(case, grid)
        plan = planning.plan(job.name, case, probabilities)
        if planning.is_unmeasured and not self._is_held(case):
            with planning.recovery(plan) as recovery, clock.stage("prediction", self._tiles(grid)):
                first = next(folds)
                tile_bytes = self._measure(first, recovery.run)
            folds = chain([first], folds)
            planning.planner = planning.planner.changed(activation_bytes=tile_bytes.certain, unmeasured_bytes=0)
        self._start_prefetching(planning, probabilities)
        return self._plan(case, job.name, planning, probabilities), folds

    def _plan(self, case: PreprocessedCase, name: str, planning: CasePlanning, probabilities: bool) -> Plan:
        plan = planning.plan(name, case, probabilities)
        if planning.planner.model.pending_bytes and not self._goes_on_beside(plan, planning):
            planning.planner = planning.after_pending()
            plan = planning.plan(name, case, probabilities)
        if self.on_plan is not None:
            with foreign(self._clock):
                self.on_plan(plan)
        if self._listener is not None:
            self._listener.plan(plan)
        return_freed_memory()
        return plan

    def _goes_on_beside(self, plan: Plan, planning: CasePlanning) -> bool:
        """Whether files of the case before are still being written; waits for them where this case is slowed by it."""
        pending = self._pending
        if pending is not None and planning.is_slowed(plan):
            pending.wait()
        return self._pending is not None

    def _segment(
        self, case: PreprocessedCase, job: Job, clock: StageClock, planning: CasePlanning, probabilities: bool
    ) -> tuple[Result, Plan]:
        """Segmentation of a preprocessed case, in the axis order and grid of the file.

        Probabilities are returned, or written where the job has an output. None where all files are written.
        """
        geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
        rule = self._label_rule(job)
        if job.output is not None and not replaced(self, Step.EXPORT):
            self._rehearse(job.output, case.properties, geometry.original_shape, rule, clock, planning.folder)
        resampling = adapter.logits_resampling(
            self.plans_manager, self.configuration_manager, geometry, case.properties
        )
        by_softmax = rules.takes_softmax(rule, probabilities)
        plan, folds = self._planned(case, job, clock, planning, probabilities)
        grid, folder = self._grid(case), planning.folder
        map_folder = folder if plan.placement.label_map is Place.DISK else None
        with ExitStack() as stack:
            stack.callback(planning.forget_weights)
            recovery = stack.enter_context(planning.recovery(plan))
            threads = stack.enter_context(RowThreads(plan.placement.threads))
            stack.enter_context(clock.stage("prediction", self._tiles(grid)))
            held = self._held_logits(case)
            if held is None:
                slabs = stack.enter_context(self._final_slabs(folds, grid, plan, threads, folder, clock, recovery))
            elif self._are_plain(held, grid):
                slabs = iter([whole_slab(held.contiguous())])
            else:
                return self._convert_as_stock(held, case, job, clock, probabilities), plan
            if rule is None or not resampling.per_head:
                self._tell_of_held_logits(rule)
                logits = collect_slabs(slabs, self.label_manager.num_segmentation_heads, grid.image_shape)
                return self._convert_as_stock(logits.cpu(), case, job, clock, probabilities), plan

            def limits() -> SlabLimits:
                placement = recovery.plan.placement
                return SlabLimits(placement.slab_planes, placement.block_bytes)

            targets = adapter.next_stage_targets(case, self.plans_manager, self.configuration_manager)
            slabs = next_stages.label_along(slabs, targets, rule, threads, limits, recovery.run, folder)
            if rules.streams(resampling, rule, probabilities):
                labels = label_slabs(
                    slabs, resampling, geometry, rule, threads, clock, limits, map_folder, recovery.run
                )
                return self._to_file_axes(labels), plan
            planes_folder = folder if plan.placement.planes is Place.DISK else None
            store = stack.enter_context(
                PlaneStore(self.label_manager.num_segmentation_heads, grid.image_shape, grid.roll_axis, planes_folder)
            )
            store_slabs(slabs, store)
            recovery.listeners.clear()
            heads = ResampledHeads(store, resampling, geometry.cropped_shape, threads)
            passes = 1 if not (by_softmax and rule.ranked) else 3 if probabilities else 2
            with clock.stage("export", heads.heads * passes):
                heads.on_head = clock.advance
                if not by_softmax:
                    return self._to_file_axes(label_heads(heads, geometry, rule)), plan
                if not probabilities:
                    return self._to_file_axes(label_and_export(heads, geometry, rule, None)), plan
                return self._probabilities(heads, geometry, rule, job, case.properties), plan

    def _to_file_axes(self, labels: NDArray[Any]) -> NDArray[Any]:
        return labels.transpose(self.plans_manager.transpose_backward)

    def _probabilities(
        self,
        heads: ResampledHeads,
        geometry: rules.CaseGeometry,
        rule: LabelRule,
        job: Job,
        properties: dict[str, Any],
    ) -> Result:
        """Return (segmentation, probabilities), or write the probabilities and return the segmentation."""
        backward = self.plans_manager.transpose_backward
        if job.output is None:
            collected: list[NDArray[np.float32]] = []
            labels = label_and_export(heads, geometry, rule, lambda head: collected.append(head.copy()))
            stacked = np.stack(collected).transpose([0, *(axis + 1 for axis in backward)])
            return self._to_file_axes(labels), stacked
        shape = tuple(geometry.original_shape[axis] for axis in backward)
        with (
            atomic_output(Path(job.output + ".npz")) as path,
            npz_sink(path, heads.heads, shape, backward, np.dtype(self.probabilities_dtype)) as sink,
        ):
            labels = label_and_export(heads, geometry, rule, sink)
        adapter.write_properties(properties, job.output + ".pkl")
        return self._to_file_axes(labels)

    def _label_manager(self, job: Job) -> Any:
        """Return the label manager that stock asks: where it writes files, it makes a new one."""
        return self.label_manager if job.output is None else self.plans_manager.get_label_manager(self.dataset_json)

    def _label_rule(self, job: Job) -> LabelRule | None:
        """How logits become labels; None where nnU-Net's, or somebody's, functions have to be asked."""
        return None if replaced(self, Step.EXPORT) else adapter.label_rule(self._label_manager(job))

    def _is_held(self, case: PreprocessedCase) -> bool:
        """Whether somebody else takes part in making the logits, or the image is not what our tiles are."""
        is_single = case.image.dtype == np.float32 or case.image.dtype.kind != "f"
        return not is_single or bool(replaced(self, Step.LOGITS, Step.WINDOW))

    def _held_logits(self, case: PreprocessedCase) -> Any:
        """All logits of a case, as nnU-Net's method returns them, where somebody else takes part in making them."""
        if not self._is_held(case):
            return None
        data = stock_calls.network_input(case, self.label_manager)
        with torch_threads(self._threads_of_network()), foreign(self._clock):
            logits = self.predict_logits_from_preprocessed_data(data)
        return logits.cpu().detach() if isinstance(logits, torch.Tensor) else logits

    def _tell_of_held_logits(self, rule: LabelRule | None) -> None:
        """Say why all logits are held, unless that has been said of what is replaced."""
        what = "the resampling of logits" if rule else f"label manager {type(self.label_manager).__name__}"
        if not replaced(self, Step.LABELS, Step.EXPORT, Step.RESAMPLING):
            logger.warning("%s is not nnU-Net's own: all logits are held for it, so memory is not bounded", what)

    def _are_plain(self, logits: Any, grid: TileGrid) -> bool:
        """Whether our kernels may read logits that somebody else has made."""
        shape = (self.label_manager.num_segmentation_heads, *grid.image_shape)
        plain = isinstance(logits, torch.Tensor) and logits.dtype == torch.half and tuple(logits.shape) == shape
        return plain and all(bool(torch.isfinite(head).all()) for head in logits)

    def _convert_as_stock(
        self, logits: Any, case: PreprocessedCase, job: Job, clock: StageClock, probabilities: bool
    ) -> Result:
        """Let nnU-Net's functions convert all logits at once, or what stands in their place; None where these wrote."""
        others = replaced(self, Step.LABELS, Step.EXPORT, Step.RESAMPLING)
        with clock.stage("export"), foreign(clock if others else None):
            if job.output is not None and replaced(self, Step.EXPORT):
                stock_calls.export_as_stock(
                    logits, case.properties, self.plans_manager, self.configuration_manager, self.dataset_json,
                    job.output, probabilities,
                )  # fmt: skip
                return None
            convert = stock_calls.conversion(writes=job.output is not None)
            arguments = (self.plans_manager, self.configuration_manager, self._label_manager(job), case.properties)
            return convert(logits, *arguments, return_probabilities=probabilities)  # type: ignore[no-any-return]  # stock's

    def _draw(self, case: PreprocessedCase, job: Job, result: Result, clock: StageClock) -> None:
        """Keep three slices of a case for the report; what is wrong with them costs a warning and not the case."""
        if self._listener is None or result is None or job.output is None:
            return
        with clock.stage("report"):
            try:
                segmentation = result[0] if isinstance(result, tuple) else result
                forward, names = self.plans_manager.transpose_forward, model_files.label_names(self.dataset_json)
                self._listener.draw(job.output, case, segmentation, forward, names)
            except Exception as error:
                logger.warning("case %s: no slices for the report: %s: %s", job.name, type(error).__name__, error)

    # -- files -------------------------------------------------------------------------------------------------------

    def _held_back(
        self, write: Callable[[], None], result: Result, job: Job, planning: CasePlanning, probabilities: bool
    ) -> PendingWrite | None:
        """Keep a case to be written beside the next one, if there is one that fits beside it."""
        if job.following is None or not isinstance(result, np.ndarray):
            return None
        assert planning.exact is not None, "a case is planned before it is written"
        map_bytes = 0 if isinstance(result, np.memmap) else result.nbytes
        # nothing is written around the crop: those pages take no memory
        resident_bytes = min(map_bytes, math.prod(planning.exact.cropped_shape) * result.itemsize)
        pending = PendingWrite(write, map_bytes, resident_bytes, writer_bytes(result.nbytes) + THREAD_BYTES)
        planner, planned_bytes = planning.planner, pending.map_bytes + pending.writer_bytes
        with suppress(UsageError):  # told of when its turn comes
            facts = planner.facts_of_files("", *job.following, probabilities)
            return pending if planner.fits_beside(facts, planning.budget, planned_bytes) else None
        return None
