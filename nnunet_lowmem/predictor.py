"""`LowMemPredictor`: nnU-Net's methods, wired to the rooms; what each accepts and returns is stock's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import NDArray

from nnunet_lowmem.budget.machine import vram_limit
from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.labels import heads
from nnunet_lowmem.nnunet import adapter, model_files, predictors, stock_calls
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.overrides.lookup import IN_WORKERS_AFTER, IN_WORKERS_BEFORE, replaced, tell, unless_replaced
from nnunet_lowmem.predict import validation
from nnunet_lowmem.predict.case import CasePredictor
from nnunet_lowmem.predict.cases import Failing, raise_failures, require_space, run_cases, without_those_done
from nnunet_lowmem.predict.iterating import items_of, predict_iterated
from nnunet_lowmem.predict.jobs import Job, in_a_row, job_of_item, jobs_of_arrays, of_folder, unless_unwritable
from nnunet_lowmem.predict.outcomes import CaseReport, RunReport
from nnunet_lowmem.predict.pending_write import PendingWrite
from nnunet_lowmem.predict.prefetching import Prefetcher
from nnunet_lowmem.predict.progress import logging_prints, on_terminal
from nnunet_lowmem.predict.records import Recipe, fingerprint
from nnunet_lowmem.predict.weights import digests
from nnunet_lowmem.predict.writing import Result
from nnunet_lowmem.report.page import HtmlReport, facts_of
from nnunet_lowmem.system.atomic_files import temporary_folder
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.stalls import WorkerLimits
from nnunet_lowmem.system.watchdog import LINE_S, StallWatch

logger = logging.getLogger(__name__)


class LowMemPredictor(CasePredictor):
    """Drop-in for ``nnUNetPredictor``: the same labels from a fraction of the memory.

    Parameters as for `LogitsPredictor`: stock's, and keyword-only ones of its own.

    Notes
    -----
    Cases are preprocessed one after the other in this process, and exported in this process: the ``num_processes...``
    arguments are accepted and export never starts a process.
    """

    # -- nnU-Net's entry points ---------------------------------------------------------------------------------------

    @unless_replaced
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
        if part_id > num_parts:
            raise twin(UsageError, AssertionError)(f"part_id counts from 0; {part_id} is above num_parts {num_parts}")
        _note_exact(use_cropped_logits_resampling)
        return self._predict_files(arguments, save_probabilities, overwrite, part_id, num_parts, in_workers=True)

    @unless_replaced
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
        results = self._predict_files(arguments, save_probabilities, overwrite, 0, 1, in_workers=False)
        return None if results is None else [result for result in results if result is not None]

    def _predict_files(
        self,
        arguments: dict[str, Any],
        save_probabilities: bool,
        overwrite: bool,
        part_id: int,
        num_parts: int,
        in_workers: bool,
    ) -> list[Result] | None:
        """Predict files; `in_workers` says whether stock preprocesses and exports them in processes of their own."""
        source = arguments["list_of_lists_or_source_folder"]
        target = adapter.outputs(arguments["output_folder_or_list_of_truncated_output_files"])
        stage_folder = arguments["folder_with_segs_from_prev_stage"]
        previous_stage = self.configuration_manager.previous_stage_name
        if previous_stage is not None and stage_folder is None:
            raise twin(UsageError, AssertionError)(
                f"this configuration is the second stage of a cascade and needs the segmentations of "
                f"{previous_stage!r}: give their folder with -prev_stage_predictions"
            )
        adapter.write_run_files(target, arguments, self.dataset_json, self.plans_manager.plans)
        from_folder, is_listed = isinstance(source, str), tell(self, Step.LISTING)
        if from_folder:
            model_files.tell_skipped(source, self.dataset_json["file_ending"])
            if not is_listed:
                source = model_files.list_cases(source, self.dataset_json["file_ending"])
        with logging_prints():
            cases, outputs, stages = self._manage_input_and_output_lists(
                source, target, stage_folder, overwrite or not is_listed, part_id, num_parts, save_probabilities
            )
        stages = stages or [None] * len(cases)
        if outputs is not None and len(outputs) > len(cases):  # nnU-Net 2.5 gives each part the names of all
            outputs = outputs[part_id::num_parts]
        model_files.check_previous_stage(cases, stages, self.dataset_json["file_ending"])
        jobs = self._jobs(cases, outputs, stages, save_probabilities)
        if from_folder:
            folder = arguments["list_of_lists_or_source_folder"]
            jobs = of_folder(jobs, folder, self.dataset_json["file_ending"], overwrite)
        self.run_report = RunReport()
        processes = arguments.get("num_processes_preprocessing", 0)
        if not overwrite and outputs is not None and not is_listed:
            jobs = without_those_done(jobs, self.run_report)
        if in_workers and jobs and replaced(self, *lookup.OF_FILES):
            return predict_iterated(self, jobs, arguments, save_probabilities)
        failing = self._failing(in_workers)
        with self._reporting(target):
            results = self._predict_recorded(jobs, target, save_probabilities, processes, failing) if jobs else None
        raise_failures(self.run_report, results, failing)
        return results

    def _predict_recorded(
        self, jobs: list[Job], target: str | list[str] | None, probabilities: bool, processes: int, failing: Failing
    ) -> list[Result]:
        """Predict cases of files; what failed is told in the output folder."""
        tell(self, Step.READING, *IN_WORKERS_BEFORE, *lookup.of_prediction(self.fast))
        jobs = jobs if replaced(self, Step.EXPORT) else [unless_unwritable(job) for job in jobs]
        self._require_space(jobs, probabilities)
        with self._in_temporary_folder() as folder, ExitStack() as stack:
            waiting: Iterable[Job] = in_a_row(jobs)
            if self._prefetches(len(jobs), processes):
                self._prefetcher = stack.enter_context(self._new_prefetcher(folder))
                waiting = self._prefetcher.jobs(in_a_row(jobs))
            try:
                return self._predict_jobs(waiting, folder, probabilities, failing)
            finally:
                if target is not None:
                    self.run_report.write_failures(adapter.output_folder(target))

    def _jobs(
        self, cases: list[list[str]], outputs: list[str] | None, stages: list[str | None], probabilities: bool
    ) -> list[Job]:
        ending = self.dataset_json["file_ending"]
        written = [ending, ".npz", ".pkl"] if probabilities else [ending]
        made_with = "" if outputs is None else self._fingerprint(probabilities)
        targets: Sequence[str | None] = outputs or [None] * len(cases)
        jobs = []
        for files, output, stage in zip(model_files.as_text(cases), targets, stages, strict=True):
            recipe = None
            if output is not None:
                inputs = tuple(map(Path, files if stage is None else [*files, stage]))
                recipe = Recipe(tuple(Path(output + end) for end in written), inputs, made_with)
            load = partial(self._preprocess_files, files, stage)
            jobs.append(Job(model_files.case_name(files, ending), output, load, (files, stage), recipe))
        return jobs

    def _require_space(self, jobs: list[Job], probabilities: bool) -> None:
        rule = adapter.label_rule(self.label_manager)
        heads_bytes = self.label_manager.num_segmentation_heads * np.dtype(self.probabilities_dtype).itemsize
        voxel_bytes = 1 if rule is None else rule.dtype.itemsize
        reader, ending = self.plans_manager.image_reader_writer_class, self.dataset_json["file_ending"]
        require_space(jobs, reader, ending, voxel_bytes, heads_bytes if probabilities else 0)

    def _fingerprint(self, probabilities: bool) -> str:
        """Checksum of all that the labels depend on, beside the images."""
        description = {
            "plans": self.plans_manager.plans,
            "configuration": self.configuration_manager.configuration,
            "dataset": self.dataset_json,
            "step": self.tile_step_size,
            "gaussian": self.use_gaussian,
            "mirroring": list(self._mirrored_axes()),
            "device": self.device.type,
            "accept_nan": self.accept_nan,
            "probabilities": self.probabilities_dtype if probabilities else None,
            "fast": self.fast,
        }
        weights = self.list_of_parameters
        if weights is None:  # the network is used as it is, whatever a client has made of it
            weights = [getattr(uncompiled(self.network), "state_dict", dict)()]
        return fingerprint(description, digests(weights))

    def _prefetches(self, cases: int, processes: int) -> bool:
        """Prefetch beside a GPU; on the CPU a worker would take the cores that the network needs."""
        wanted = self.device.type != "cpu" if self.prefetch is None else self.prefetch
        return wanted and cases > 1 and processes > 0

    def _new_prefetcher(self, folder: Path) -> Prefetcher:
        model = (self.plans_manager, self.configuration_manager, self.dataset_json)
        return Prefetcher(model, folder, self.worker_timeout_s, max(1, self._kernel_threads() // 2), self.accept_nan)

    @unless_replaced
    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Result]:
        """Predict preprocessed cases: dicts with 'data', 'ofile' and 'data_properties', as stock's iterators give."""
        _note_exact(use_cropped_logits_resampling)
        if tell(self, *IN_WORKERS_AFTER):  # one process is enough, and the fewest logits in RAM
            return super().predict_from_data_iterator(data_iterator, save_probabilities, 1)  # type: ignore[no-any-return]  # stock's
        tell(self, *lookup.of_prediction(self.fast))
        return self._predict_unrecorded(map(job_of_item, data_iterator), save_probabilities, self._failing())

    @unless_replaced
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
        if tell(self, Step.ARRAYS, *IN_WORKERS_BEFORE):
            items = self.get_data_iterator_from_raw_npy_data(
                image_or_list_of_images,
                segs_from_prev_stage_or_list_of_segs_from_prev_stage,
                properties_or_list_of_properties,
                truncated_ofname,
                num_processes,
            )
            return self.predict_from_data_iterator(items, save_probabilities, num_processes_segmentation_export)
        jobs = jobs_of_arrays(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname or None,
            self._preprocess_array,
        )
        if replaced(self, Step.ITERATION, *IN_WORKERS_AFTER):
            tell(self, Step.ITERATION)
            items = items_of(self, jobs)
            return self.predict_from_data_iterator(items, save_probabilities, num_processes_segmentation_export)
        tell(self, *lookup.of_prediction(self.fast))
        return self._predict_unrecorded(jobs, save_probabilities, self._failing(in_workers=True))

    @unless_replaced
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
        tell(self, Step.ADAPTER, *IN_WORKERS_BEFORE, *lookup.of_prediction(self.fast))
        given = (input_image, segmentation_previous_stage, image_properties, output_file_truncated)
        job = self._job_of_array("array", *given, by_adapter=bool(replaced(self, Step.ADAPTER)))
        return self._predict_unrecorded([job], save_or_return_probabilities, Failing(keep_going=False))[0]

    @classmethod
    def perform_actual_validation(cls, trainer: Any, save_probabilities: bool = False, **options: Any) -> bool:
        """Do what the trainer's method of that name does, in bounded memory; False where it has to do it by itself.

        The trainers in ``nnunet_lowmem/trainers`` and nnU-Net as patched in ``patches/`` call this.
        """
        if validation.is_left_to_stock(trainer):
            return False
        chosen = predictors.options(predictors.OWN.name, cls, trainer.plans_manager.plans)
        predictor = cls(device=trainer.device, allow_tqdm=False, **{**chosen, **options})
        with validation.prepared(trainer, predictor):
            jobs = validation.jobs(trainer, predictor, save_probabilities)
            predictor._predict_unrecorded(jobs, save_probabilities, predictor._failing())
            validation.write_summary(trainer, predictor)
        return True

    # -- the report --------------------------------------------------------------------------------------------------

    @contextmanager
    def _reporting(self, target: str | list[str] | None) -> Iterator[None]:
        """Write the report of the block, if one is wanted and there is a folder for it."""
        if not self.report or target is None:
            yield
            return
        with ExitStack() as stack:
            folder = stack.enter_context(temporary_folder(self.tmp_dir))
            page = HtmlReport(adapter.output_folder(target), folder, facts_of(self), self.run_report)
            self._listener = stack.enter_context(page)
            stack.callback(setattr, self, "_listener", None)
            yield

    # -- cases in a row ----------------------------------------------------------------------------------------------

    def _failing(self, in_workers: bool = False) -> Failing:
        return Failing(self.continue_on_error, self.foreign_ends_run, in_workers)

    def _predict_unrecorded(self, jobs: Iterable[Job], probabilities: bool, failing: Failing) -> list[Result]:
        """Predict what has no input files, or is not written: arrays and iterators."""
        self.run_report = RunReport()
        with self._in_temporary_folder() as folder:
            results = self._predict_jobs(jobs, folder, probabilities, failing)
        raise_failures(self.run_report, results, failing)
        return results

    def _predict_jobs(self, jobs: Iterable[Job], folder: Path, probabilities: bool, failing: Failing) -> list[Result]:
        line_s = LINE_S if self.allow_tqdm and not on_terminal() else 0
        with StallWatch(WorkerLimits(stall_s=self.worker_timeout_s), str(self.device), line_s) as watch:
            predict = partial(self._predict_job, folder=folder, probabilities=probabilities, watch=watch)
            try:
                return run_cases(jobs, predict, self.run_report, failing, self.on_case)
            finally:
                self._clock = None
                latest, self._latest_write = self._latest_write, None
                if latest is not None:
                    self._keep(latest)

    def _keep(self, latest: PendingWrite) -> None:
        """Let the files of the last case be written, however the run ends; `run_cases` has told of most failures."""
        try:
            latest.result()
        except Exception as error:
            logger.error("the case that was finished last could not be written: %s", error)

    @contextmanager
    def _in_temporary_folder(self) -> Iterator[Path]:
        try:
            with vram_limit(self.max_vram, self.device), temporary_folder(self.tmp_dir) as folder:
                yield folder
        finally:
            self._worker_bytes, self._prefetcher = 0, None
            stock_calls.forget_importance()
            empty_cache(self.device)

    def _predict_job(
        self, job: Job, clock: StageClock, folder: Path, probabilities: bool, watch: StallWatch
    ) -> tuple[Result, CaseReport, PendingWrite | None]:
        clock.listeners.append(watch.note)
        self._clock = clock
        with self._observed(clock) as sampler:
            if sampler is not None:
                watch.observed_s = partial(getattr, sampler, "cpu_s")
            with clock.stage("preprocessing"):
                planning = self._begin(job, folder, probabilities)
                others = replaced(self, Step.ADAPTER, Step.READING, *IN_WORKERS_BEFORE)
                with foreign(clock if others else None):
                    case = planning.preprocessing(job.load)
            result, plan = self._segment(case, job, clock, planning, probabilities)
            before = self._pending
            if before is not None:
                with clock.stage("writing", 1):  # one at a time
                    before.wait()
            self._latest_write = None
            if job.output is not None and result is not None:
                write = partial(self._write_files, result, job, case.properties)
                self._latest_write = self._held_back(write, result, job, planning, probabilities)
                if self._latest_write is None:
                    with clock.stage("writing"):
                        write()
                self._draw(case, job, result, clock)
                result = None
        report = CaseReport(job.name, job.output, clock.seconds, plan, sampler.peaks_bytes() if sampler else {})
        return heads.plain(result), report, self._latest_write


def _stock_parameters(method: str) -> list[str]:
    """Names of the arguments of a stock method: what stock records in predict_from_raw_data_args.json."""
    return [name for name in inspect.signature(getattr(nnUNetPredictor, method)).parameters if name != "self"]


def _note_exact(use_cropped_logits_resampling: bool) -> None:
    if use_cropped_logits_resampling:
        logger.info("use_cropped_logits_resampling is an approximation; the exact labels are made instead")
