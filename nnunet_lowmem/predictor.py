"""`LowMemPredictor`: nnU-Net's methods, wired to the rooms; what each accepts and returns is stock's."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray

from nnunet_lowmem.budget import machine
from nnunet_lowmem.budget.estimates import Estimate
from nnunet_lowmem.nnunet import adapter, predictors
from nnunet_lowmem.nnunet.model import load_folds
from nnunet_lowmem.nnunet.trust import Trust
from nnunet_lowmem.options import OPTIONS, Arithmetic, Options, arithmetic, asks_for_cluster, with_options
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.lookup import IN_WORKERS_AFTER, IN_WORKERS_BEFORE, replaced, tell, unless_replaced
from nnunet_lowmem.predict import cases, estimating, jobs, loading, runs, validation, weights
from nnunet_lowmem.predict.cases import Failing, Outcomes
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.listeners import logging_prints
from nnunet_lowmem.predict.listing import list_jobs, refuse_unwritable
from nnunet_lowmem.predict.logits import FoldLogits
from nnunet_lowmem.predict.outcomes import RunReport
from nnunet_lowmem.predict.parts import refuse_if_asked_for
from nnunet_lowmem.predict.setup import Memo, Setup, Steps
from nnunet_lowmem.report.following import audience, following
from nnunet_lowmem.types import PreprocessedCase, Result

logger = logging.getLogger(__name__)

Folds = Sequence[int | str] | int | str | None


class LowMemPredictor(Options, nnUNetPredictor):  # type: ignore[misc]  # nnU-Net ships no types
    """Drop-in for ``nnUNetPredictor``: the same labels from a fraction of the memory.

    Parameters
    ----------
    tile_step_size, use_gaussian, use_mirroring, perform_everything_on_device, device, verbose, verbose_preprocessing, \
    allow_tqdm
        As in nnU-Net. `perform_everything_on_device` says where the rolling window lives; without `allow_tqdm` there
        are neither bars nor, where no terminal is, lines in the log.
    **more : any
        Our options by their names, described in `nnunet_lowmem.options`; and what only the installed nnU-Net knows.

    Attributes
    ----------
    foreign_ends_run : bool
        What the network, an override or a callback raises ends a run at once. For commands it is a failure of the case.
    network_threads : int or None
        At most; None takes stock's number, which it sets for predictions and not for validations.
    run_report : RunReport
        Of the latest call.
    came_from : tuple or None
        Where the model is: what workers of a cluster read.

    Notes
    -----
    Cases are preprocessed one after the other in this process, and exported in this process: the ``num_processes...``
    arguments are accepted and export never starts a process.
    """

    network: Any
    foreign_ends_run = True
    network_threads: int | None = None
    run_report: RunReport
    came_from: tuple[Any, ...] | None = None
    _checkpoints: tuple[Path, ...] = ()
    _memo: Memo | None = None

    @lookup.as_installed
    @with_options
    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  # stock's signature, read by tools that embed nnU-Net
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        **more: Any,
    ) -> None:
        own = {option.name: more.pop(option.name, option.default) for option in OPTIONS}
        on_device = perform_everything_on_device and device.type == "cuda"
        # nnU-Net says of every other device that CUDA alone keeps logits, whatever it was asked for
        with logging_prints():
            super().__init__(
                tile_step_size=tile_step_size, use_gaussian=use_gaussian, use_mirroring=use_mirroring,
                perform_everything_on_device=on_device, device=device, verbose=verbose,
                verbose_preprocessing=verbose_preprocessing, allow_tqdm=allow_tqdm, **more,
            )  # fmt: skip
        self.__dict__.update(own)
        wanted = arithmetic(self.fast)  # which is refused here, if it is none
        self.fast = self.fast if device.type == "cpu" and wanted is not Arithmetic.EXACT else False

    # -- the model -----------------------------------------------------------------------------------------------------

    @unless_replaced
    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Folds,
        checkpoint_name: str = "checkpoint_final.pth",
        trainer_class: Any = None,  # in nnunetv2-neuropoly: in the place of the trainer that the checkpoint names
    ) -> None:
        """Build the network from a model folder, and read the weights of all folds; no file of it is read later.

        Raises
        ------
        ModelError
            If a file is missing or unreadable, or the weights do not fit the network of the plans.
        """
        limit, in_use = machine.ram_limit(self.max_ram)
        free_bytes = 2**62 if limit is None else max(0, limit - in_use)
        self._describe(model_training_output_dir, use_folds, checkpoint_name, "cpu", free_bytes, trainer_class)
        self.came_from = None if trainer_class else (model_training_output_dir, use_folds, checkpoint_name)
        weights.load_into(self.network, self.list_of_parameters[0], str(self._checkpoints[0]), None)
        if os.environ.get("nnUNet_compile", "").lower() in ("true", "1", "t"):  # noqa: SIM112  # nnU-Net's spelling
            self.network = torch.compile(self.network)

    def describe_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Folds,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """As `initialize_from_trained_model_folder`, but read no weights: enough for `estimate`, and for nothing else.

        Raises
        ------
        ModelError
            If a file is missing or unreadable.
        """
        self._describe(model_training_output_dir, use_folds, checkpoint_name, "meta")

    def _describe(
        self, folder: str, folds: Folds, checkpoint_name: str, device: str, free_bytes: int = 0, trainer: Any = None
    ) -> None:
        """Set the attributes that describe the model, once all of it is read; its network has no weights yet."""
        trust = Trust((self.trust,) if isinstance(self.trust, str) else tuple(self.trust), self.trust_model)
        model, checkpoints, parameters = load_folds(Path(folder), folds, checkpoint_name, trust, device, trainer)
        self.list_of_parameters = weights.keep(parameters, free_bytes, self.tmp_dir)
        self._checkpoints = tuple(checkpoints)
        self.plans_manager, self.configuration_manager = model.plans_manager, model.configuration_manager
        self.label_manager, self.dataset_json = model.label_manager, model.dataset_json
        self.trainer_name, self.allowed_mirroring_axes = model.trainer_name, model.mirroring_axes
        self.network = model.network
        self._memo = Memo.of_files(Path(folder), self._checkpoints, model.configuration_name)

    def picture(self) -> Setup:
        """Return a picture of this predictor, for a case that begins now."""
        self._memo = self._memo or Memo()
        steps = Steps(
            network=lambda: self.network,
            place_network=self._place_network,
            predict_tile=self._internal_maybe_mirror_and_predict,
            predict_logits=self.predict_logits_from_preprocessed_data,
            replaced=partial(replaced, self),
        )
        return Setup.of(self, steps, self._memo, self._checkpoints)

    def _place_network(self) -> None:
        self.network = self.network.to(self.device)
        self.network.eval()

    def _setup_with(self, network: Any, mirroring_axes: tuple[int, ...] | None) -> Setup:
        """Return a picture of this predictor with another network."""
        other = copy.copy(self)
        other.network, other.allowed_mirroring_axes, other._memo = network, mirroring_axes, None
        return other.picture()

    def estimate(self, source_folder: str, probabilities: bool = False) -> Iterator[Estimate]:
        """Plan every case of a folder from its header: upper bounds, since the nonzero crop is not known yet."""
        return estimating.estimate(self.picture(), self._setup_with, source_folder, probabilities)

    @unless_replaced
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Return the logits of the current weights, half, shape (heads, z, y, x): stock's method, stock's bits.

        All heads on the whole grid are what the caller asks for here; `predict_from_files` never makes them.
        """
        if input_image.dtype != torch.float32 or replaced(self, Step.WINDOW):
            return super().predict_sliding_window_return_logits(input_image)  # type: ignore[no-any-return]  # stock's
        assert input_image.ndim == 4, "input_image must be a 4D torch.Tensor (c, x, y, z)"
        case = PreprocessedCase(input_image.detach().cpu().numpy(), None, {})
        setup = self.picture()
        listeners = audience(setup)
        clock = runs.clock_of("image", listeners)
        with runs.followed(clock, listeners):
            return FoldLogits(setup, case, clock).whole()

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
        arguments = adapter.as_recorded(nnUNetPredictor.predict_from_files, locals())
        _note_exact(use_cropped_logits_resampling)
        return self._predict_files(arguments, in_workers=True)

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
        arguments = adapter.as_recorded(nnUNetPredictor.predict_from_files_sequential, locals())
        _note_exact(use_cropped_logits_resampling)
        results = self._predict_files(arguments, in_workers=False)
        return None if results is None else [result for result in results if result is not None]

    def _predict_files(self, arguments: dict[str, Any], in_workers: bool) -> list[Result] | None:
        """Predict files; `in_workers` says whether stock preprocesses and exports them in processes of their own."""
        target = adapter.outputs(arguments["output_folder_or_list_of_truncated_output_files"])
        probabilities, is_listed = arguments["save_probabilities"], tell(self, Step.LISTING)
        wanted = list_jobs(arguments, self.picture(), self._manage_input_and_output_lists, is_listed)
        report = self.run_report = RunReport()  # of this call, whatever other threads begin
        if not arguments["overwrite"] and target is not None and not is_listed:
            listed = wanted
            wanted = cases.without_those_done(listed, report)
            if wanted:
                cases.keep_arithmetic(listed, self.picture())
        if in_workers and wanted and replaced(self, *lookup.OF_FILES):
            return self._predict_iterated(wanted, arguments)
        results = None
        with following(self.picture(), report, target) as listeners:
            outcomes = Outcomes(report, self._failing(in_workers), listeners)
            try:
                if wanted:
                    tell(self, Step.READING, *IN_WORKERS_BEFORE, *lookup.of_prediction(bool(self.fast)))
                    wanted = wanted if replaced(self, Step.EXPORT) else refuse_unwritable(wanted)
                    cases.require_space(wanted, self.picture(), probabilities)
                    ahead = arguments.get("num_processes_preprocessing", 0) > 0
                    if asks_for_cluster(self):
                        from nnunet_lowmem.cluster import running  # nobody else loads Dask

                        results = running.predict_cases(self, wanted, self.picture(), probabilities, outcomes)
                    else:
                        results = runs.predict_cases(wanted, self.picture, probabilities, outcomes, may_prefetch=ahead)
            finally:  # what failed is told in the output folder
                if target is not None and not isinstance(target, adapter.OutputFile):
                    report.write_failures(adapter.output_folder(target))
        outcomes.raise_failures(results)
        return results

    def _predict_iterated(self, wanted: Sequence[Job], arguments: dict[str, Any]) -> list[Result] | None:
        """Predict files stock's way over an iterator, where somebody else makes the iterator, or takes it."""
        items: Any = loading.items_of(wanted, self.picture())
        if tell(self, Step.FILES, Step.READING, *IN_WORKERS_BEFORE):
            for job in wanted:
                if job.files is None:  # one that cannot be right: it says why
                    loading.load(job, self.picture(), None)
            read = [job.files for job in wanted if job.files is not None]
            items = self._internal_get_data_iterator_from_lists_of_filenames(
                [files.images for files in read],
                [files.stage for files in read],
                None if wanted[0].output is None else [job.output for job in wanted],
                max(1, arguments["num_processes_preprocessing"]),
            )
        tell(self, Step.ITERATION)
        refuse_if_asked_for(self, replaced(self, Step.ITERATION))
        exporting = arguments["num_processes_segmentation_export"]
        return self.predict_from_data_iterator(items, arguments["save_probabilities"], exporting)

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
            refuse_if_asked_for(self, replaced(self, *IN_WORKERS_AFTER))
            return super().predict_from_data_iterator(data_iterator, save_probabilities, 1)  # type: ignore[no-any-return]  # stock's
        tell(self, *lookup.of_prediction(bool(self.fast)))
        return self._predict_unrecorded(map(jobs.job_of_item, data_iterator), save_probabilities, self._failing())

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
        wanted = jobs.jobs_of_arrays(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname or None,
        )
        if replaced(self, Step.ITERATION, *IN_WORKERS_AFTER):
            tell(self, Step.ITERATION)
            refuse_if_asked_for(self, replaced(self, Step.ITERATION))
            items = loading.items_of(wanted, self.picture())
            return self.predict_from_data_iterator(items, save_probabilities, num_processes_segmentation_export)
        tell(self, *lookup.of_prediction(bool(self.fast)))
        return self._predict_unrecorded(wanted, save_probabilities, self._failing(in_workers=True))

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
        tell(self, Step.ADAPTER, *IN_WORKERS_BEFORE, *lookup.of_prediction(bool(self.fast)))
        by_adapter = bool(replaced(self, Step.ADAPTER))
        image = jobs.Array(input_image, segmentation_previous_stage, image_properties, by_adapter)
        job = Job("array", output_file_truncated, image)
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
            validated, load = validation.jobs_and_load(trainer, save_probabilities)
            predictor._predict_unrecorded(validated, save_probabilities, predictor._failing(), load)
            validation.write_summary(trainer, predictor)
        return True

    # -- cases in a row ----------------------------------------------------------------------------------------------

    def _failing(self, in_workers: bool = False) -> Failing:
        return Failing(self.continue_on_error, self.foreign_ends_run, in_workers)

    def _predict_unrecorded(
        self, wanted: Iterable[Job], probabilities: bool, failing: Failing, load: loading.Load = loading.load
    ) -> list[Result]:
        """Predict what has no input files, or is not written: arrays and iterators."""
        report = self.run_report = RunReport()
        with following(self.picture(), report) as listeners:
            outcomes = Outcomes(report, failing, listeners)
            results = runs.predict_cases(wanted, self.picture, probabilities, outcomes, load=load)
        outcomes.raise_failures(results)
        return results


def _note_exact(use_cropped_logits_resampling: bool) -> None:
    if use_cropped_logits_resampling:
        logger.info("use_cropped_logits_resampling is an approximation; the exact labels are made instead")
