"""`LowMemPredictor`: nnU-Net's predictor with a rolling window and export in the main process.

This room wires the others to nnU-Net's methods; what each method accepts and returns is stock's.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import NDArray

from nnunet_lowmem import export, model_files, nnunet_adapter
from nnunet_lowmem.budget import machine_budget
from nnunet_lowmem.cases import Job, job_of_item
from nnunet_lowmem.clock import StageClock, trace
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.files import atomic_output, temporary_folder
from nnunet_lowmem.labelling import LabelRule, LogitsSlab
from nnunet_lowmem.logits_predictor import LogitsPredictor
from nnunet_lowmem.measuring import PeakSampler
from nnunet_lowmem.planner import Budget, CaseFacts, Plan, plan_case
from nnunet_lowmem.prefetching import Prefetcher
from nnunet_lowmem.preprocessing import preprocess_array, preprocess_case
from nnunet_lowmem.probabilities import label_and_export, npz_sink
from nnunet_lowmem.reporting import CaseReport
from nnunet_lowmem.spill import PlaneStore
from nnunet_lowmem.threads import RowThreads
from nnunet_lowmem.tiling import tile_grid
from nnunet_lowmem.types import PreprocessedCase
from nnunet_lowmem.watchdog import WorkerLimits

logger = logging.getLogger(__name__)

Segmentation = NDArray[Any]
Result = Segmentation | tuple[Segmentation, NDArray[np.float32]] | None


class LowMemPredictor(LogitsPredictor):
    """Drop-in for ``nnUNetPredictor``: the same labels from a fraction of the memory.

    Parameters as for `LogitsPredictor`: stock's, and keyword-only ones of its own.

    Notes
    -----
    Cases are preprocessed one after the other in this process, and exported in this process: the ``num_processes...``
    arguments are accepted and export never starts a process.
    """

    def estimate(self, source_folder: str) -> Iterator[Plan]:
        """Plan every case of a folder from its header: upper bounds, since the nonzero crop is not known yet."""
        budget = machine_budget(self.max_ram, self.max_vram, self.device)
        facts = self._model_facts()
        file_ending = self.dataset_json["file_ending"]
        for files in model_files.list_cases(source_folder, file_ending):
            geometry = nnunet_adapter.uncropped_geometry(files, self.plans_manager, self.configuration_manager)
            case = CaseFacts(
                name=model_files.case_name(files, file_ending),
                grid=tile_grid(
                    geometry.network_shape, tuple(self.configuration_manager.patch_size), self.tile_step_size
                ),
                original_shape=geometry.original_shape,
                cropped_shape=geometry.cropped_shape,
                streams=nnunet_adapter.label_rule(self.label_manager) is not None,
            )
            yield plan_case(
                facts, case, replace(budget, binding=False), self.device.type, self.perform_everything_on_device
            )

    def _plan(self, case: PreprocessedCase, name: str, budget: Budget, streams: bool) -> Plan:
        geometry = nnunet_adapter.case_geometry(case.image.shape[1:], case.properties)
        facts = CaseFacts(name, self._grid(case), geometry.original_shape, geometry.cropped_shape, streams)
        plan = plan_case(self._model_facts(), facts, budget, self.device.type, self.perform_everything_on_device)
        if self.on_plan is not None:
            self.on_plan(plan)
        return plan

    def _segment(
        self, case: PreprocessedCase, job: Job, clock: StageClock, budget: Budget, folder: Path, probabilities: bool
    ) -> tuple[Result, Plan]:
        """Segmentation of a preprocessed case, in the axis order and grid of the file.

        Probabilities are returned, or written where the job has an output.
        """
        geometry = nnunet_adapter.case_geometry(case.image.shape[1:], case.properties)
        rule = nnunet_adapter.label_rule(self.label_manager)
        resampling = nnunet_adapter.logits_resampling(
            self.plans_manager, self.configuration_manager, geometry, case.properties
        )
        by_softmax = probabilities or (nnunet_adapter.TAKES_ARGMAX_OF_SOFTMAX and rule is not None and rule.ranked)
        streams = rule is not None and resampling.tables is not None and not by_softmax
        plan = self._plan(case, job.name, budget, streams)
        grid = self._grid(case)
        with ExitStack() as stack:
            threads = stack.enter_context(RowThreads(self.kernel_threads))
            stack.enter_context(clock.stage("prediction"))
            trace("first_tile", job.name)
            slabs = stack.enter_context(self._final_slabs(case, grid, plan, threads, folder))
            if rule is None:
                return self._convert_as_stock(slabs, case, clock, probabilities), plan
            if streams:
                labels = export.label_slabs(slabs, resampling, geometry, rule, threads, clock)
                return self._to_file_axes(labels), plan
            store = stack.enter_context(
                PlaneStore(self.label_manager.num_segmentation_heads, grid.image_shape, grid.roll_axis, folder)
            )
            export.store_slabs(slabs, store)
            heads = export.ResampledHeads(store, resampling, geometry.cropped_shape, threads)
            with clock.stage("export"):
                if not by_softmax:
                    return self._to_file_axes(export.label_heads(heads, geometry, rule)), plan
                if not probabilities:
                    return self._to_file_axes(label_and_export(heads, geometry, rule, None)), plan
                return self._probabilities(heads, geometry, rule, job, case.properties), plan

    def _to_file_axes(self, labels: NDArray[Any]) -> NDArray[Any]:
        return labels.transpose(self.plans_manager.transpose_backward)

    def _probabilities(
        self,
        heads: export.ResampledHeads,
        geometry: nnunet_adapter.CaseGeometry,
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
        nnunet_adapter.write_properties(properties, job.output + ".pkl")
        return self._to_file_axes(labels)

    def _convert_as_stock(
        self, slabs: Iterator[LogitsSlab], case: PreprocessedCase, clock: StageClock, probabilities: bool
    ) -> Result:
        """Hold all logits and let stock convert them: for label managers whose rule is not known here."""
        logger.warning(
            "label manager %s is not nnU-Net's own: all logits are held for it, so memory is not bounded",
            type(self.label_manager).__name__,
        )
        shape = self._grid(case).image_shape
        logits = export.collect_slabs(slabs, self.label_manager.num_segmentation_heads, shape)
        with clock.stage("export"):
            return convert_predicted_logits_to_segmentation_with_correct_shape(  # type: ignore[no-any-return]  # stock's
                logits.cpu().numpy(),
                self.plans_manager,
                self.configuration_manager,
                self.label_manager,
                case.properties,
                return_probabilities=probabilities,
            )

    # -- nnU-Net's entry points ---------------------------------------------------------------------------------------

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Result] | None:
        """Predict a folder or a list of cases; as in stock, one result per case, None where a file was written."""
        arguments = {name: value for name, value in locals().items() if name in _stock_parameters("predict_from_files")}
        _note_exact(use_cropped_logits_resampling)
        return self._predict_files(arguments, save_probabilities, overwrite, part_id, num_parts)

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Result] | None:
        """Predict case after case; as in stock, the list holds only what was not written to a file."""
        names = _stock_parameters("predict_from_files_sequential")
        arguments = {name: value for name, value in locals().items() if name in names}
        _note_exact(use_cropped_logits_resampling)
        results = self._predict_files(arguments, save_probabilities, overwrite, 0, 1)
        return None if results is None else [result for result in results if result is not None]

    def _predict_files(
        self, arguments: dict[str, Any], save_probabilities: bool, overwrite: bool, part_id: int, num_parts: int
    ) -> list[Result] | None:
        source = arguments["list_of_lists_or_source_folder"]
        target = arguments["output_folder_or_list_of_truncated_output_files"]
        stage_folder = arguments["folder_with_segs_from_prev_stage"]
        previous_stage = self.configuration_manager.previous_stage_name
        if previous_stage is not None and stage_folder is None:
            raise UsageError(
                f"this configuration is the second stage of a cascade and needs the segmentations of "
                f"{previous_stage!r}: give their folder with -prev_stage_predictions"
            )
        nnunet_adapter.write_run_files(target, arguments, self.dataset_json, self.plans_manager.plans)
        if isinstance(source, str):
            source = model_files.list_cases(source, self.dataset_json["file_ending"])
        cases, outputs, stages = self._manage_input_and_output_lists(
            source, target, stage_folder, overwrite, part_id, num_parts, save_probabilities
        )
        if not cases:
            return None
        model_files.check_previous_stage(cases, stages, self.dataset_json["file_ending"])
        jobs = [
            Job(
                name=model_files.case_name(files, self.dataset_json["file_ending"]),
                output=output,
                load=partial(self._preprocess_files, files, stage),
                files=(files, stage),
            )
            for files, output, stage in zip(cases, outputs or [None] * len(cases), stages, strict=True)
        ]
        if not self._prefetches(len(jobs), arguments.get("num_processes_preprocessing", 0)):
            return self._predict_jobs(jobs, save_probabilities)
        with self._in_temporary_folder() as folder, self._prefetcher(folder) as prefetcher:
            return [self._predict_job(job, folder, save_probabilities) for job in prefetcher.jobs(jobs)]

    def _prefetches(self, cases: int, processes: int) -> bool:
        """Prefetch beside a GPU; on the CPU a worker would take the cores that the network needs."""
        wanted = self.device.type != "cpu" if self.prefetch is None else self.prefetch
        return wanted and cases > 1 and processes > 0

    def _prefetcher(self, folder: Path) -> Prefetcher:
        model = (self.plans_manager, self.configuration_manager, self.dataset_json)
        limits = WorkerLimits(stall_s=self.worker_timeout_s)
        return Prefetcher(model, folder, limits, max(1, self.kernel_threads // 2))

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Result]:
        """Predict preprocessed cases: dicts with 'data', 'ofile' and 'data_properties', as stock's iterators give."""
        _note_exact(use_cropped_logits_resampling)
        return self._predict_jobs(map(job_of_item, data_iterator), save_probabilities)

    def predict_from_list_of_npy_arrays(
        self,
        image_or_list_of_images: NDArray[Any] | list[NDArray[Any]],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: NDArray[Any] | list[NDArray[Any]] | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Result]:
        """Predict arrays of shape (channels, x, y, z) with nnU-Net's properties dict each."""
        _note_exact(use_cropped_logits_resampling)
        images = _as_list(image_or_list_of_images)
        outputs: list[str | None] = _as_list(truncated_ofname) if truncated_ofname else [None] * len(images)
        stages = segs_from_prev_stage_or_list_of_segs_from_prev_stage
        stage_list = [None] * len(images) if stages is None else _as_list(stages)
        properties = _as_list(properties_or_list_of_properties)
        jobs = [
            Job(f"array {number}", output, partial(self._preprocess_array, image, stage, entry))
            for number, (image, stage, entry, output) in enumerate(
                zip(images, stage_list, properties, outputs, strict=True)
            )
        ]
        return self._predict_jobs(jobs, save_probabilities)

    def predict_single_npy_array(
        self,
        input_image: NDArray[Any],
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
        use_cropped_logits_resampling: bool = False,
    ) -> Result:
        """Predict one array of shape (channels, x, y, z)."""
        _note_exact(use_cropped_logits_resampling)
        load = partial(self._preprocess_array, input_image, segmentation_previous_stage, image_properties)
        return self._predict_jobs([Job("array", output_file_truncated, load)], save_or_return_probabilities)[0]

    # -- cases in a row ----------------------------------------------------------------------------------------------

    def _predict_jobs(self, jobs: Iterable[Job], probabilities: bool) -> list[Result]:
        with self._in_temporary_folder() as folder:
            return [self._predict_job(job, folder, probabilities) for job in jobs]

    @contextmanager
    def _in_temporary_folder(self) -> Iterator[Path]:
        try:
            with temporary_folder(self.tmp_dir) as folder:
                yield folder
        finally:
            compute_gaussian.cache_clear()
            empty_cache(self.device)

    def _predict_job(self, job: Job, folder: Path, probabilities: bool) -> Result:
        budget = machine_budget(self.max_ram, self.max_vram, self.device)
        with PeakSampler(stage="preprocessing") if self.on_case else nullcontext() as sampler:
            clock = StageClock(job.name, sampler.mark if sampler else None)
            with clock.stage("preprocessing"):
                case = _load(job)
            result, plan = self._segment(case, job, clock, budget, folder, probabilities)
            if job.output is not None:
                with clock.stage("writing"):
                    self._write(result, job.output, case.properties)
                result = None
        trace("case_end", job.name, clock.seconds)
        if self.on_case is not None:
            assert sampler is not None
            self.on_case(CaseReport(job.name, job.output, clock.seconds, plan, sampler.peaks_bytes()))
        return result

    def _preprocess_files(self, files: list[str], previous_stage: str | None) -> PreprocessedCase:
        return preprocess_case(
            files,
            previous_stage,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            threads=self.kernel_threads,
            verbose=self.verbose_preprocessing,
        )

    def _preprocess_array(
        self, image: NDArray[Any], previous_stage: NDArray[Any] | None, properties: dict[str, Any]
    ) -> PreprocessedCase:
        return preprocess_array(
            image,
            previous_stage,
            properties,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            threads=self.kernel_threads,
            verbose=self.verbose_preprocessing,
        )

    # -- files -------------------------------------------------------------------------------------------------------

    def _write(self, result: Result, output: str, properties: dict[str, Any]) -> None:
        """Write through the model's own writer; each file appears under its name when it is complete."""
        assert result is not None
        segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
        if probabilities is not None:
            nnunet_adapter.write_probabilities(probabilities, output + ".npz")
            nnunet_adapter.write_properties(properties, output + ".pkl")
        nnunet_adapter.write_segmentation(
            segmentation, properties, output + self.dataset_json["file_ending"], self.plans_manager
        )


def _load(job: Job) -> PreprocessedCase:
    try:
        return job.load()
    except UsageError as error:
        raise type(error)(f"case {job.name}, preprocessing: {error}") from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _stock_parameters(method: str) -> list[str]:
    """Names of the arguments of a stock method: what stock records in predict_from_raw_data_args.json."""
    return [name for name in inspect.signature(getattr(nnUNetPredictor, method)).parameters if name != "self"]


def _note_exact(use_cropped_logits_resampling: bool) -> None:
    if use_cropped_logits_resampling:
        logger.info("use_cropped_logits_resampling is an approximation; the exact labels are made instead")
