"""The validation at the end of training: what ``nnUNetTrainer.perform_actual_validation`` does, in bounded memory.

The preprocessed cases are read as the trainer's own data set reads them, and predicted and exported one after the other
in this process. Only the metrics are stock's, in as many processes as the budget has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder

from nnunet_lowmem import __version__
from nnunet_lowmem.budget.arrays import WORKER_BYTES
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.budget.machine import machine_budget
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.nnunet import adapter, stored_cases
from nnunet_lowmem.options import Options
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.predict.jobs import Job, Stored
from nnunet_lowmem.predict.loading import Load
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.types import PreprocessedCase
from nnunet_lowmem.volumes.formats import read_header

# two segmentations as float32, and the masks of one label
_METRIC_VOXEL_BYTES = 16


def is_left_to_stock(trainer: Any) -> bool:
    """Whether the trainer has to validate by itself; its log says why."""
    reason = None
    if trainer.is_ddp:
        reason = "several GPUs share it"
    elif names := lookup.of_validation(trainer):
        reason = f"{', '.join(names)}: not nnU-Net's own"
    elif adapter.label_rule(trainer.label_manager) is None:
        reason = f"label manager {type(trainer.label_manager).__name__} is not nnU-Net's own"
    elif not adapter.treats_heads_one_by_one(trainer.configuration_manager.resampling_fn_probabilities):
        reason = "the resampling of logits is not nnU-Net's own"
    if reason is not None:
        trainer.print_to_log_file(f"nnunet_lowmem leaves this validation to nnU-Net, in unbounded memory: {reason}")
    return reason is not None


@contextmanager
def prepared(trainer: Any, predictor: Any) -> Iterator[None]:
    """Let `predictor` use the trainer's network, set up as stock sets it up for a validation."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    try:
        predictor.network_threads = torch.get_num_threads()
        predictor.manual_initialization(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            None,
            trainer.dataset_json,
            type(trainer).__name__,
            trainer.inference_allowed_mirroring_axes,
        )
        yield
    finally:
        trainer.set_deep_supervision_enabled(True)


def jobs_and_load(trainer: Any, probabilities: bool) -> tuple[list[Job], Load]:
    """Return one job per validation case, and what loads them."""
    trainer.print_to_log_file(f"nnunet_lowmem {__version__} validates: one case after the other in this process")
    folder = _folder(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    data, names = stored_cases.validation_cases(trainer)

    def load(job: Job, setup: Setup, planning: CasePlanning | None) -> PreprocessedCase:
        assert isinstance(job.source, Stored), "a validation knows its own cases"
        assert planning is not None, "a case is planned before it is loaded"
        name = job.source.name
        trainer.print_to_log_file(f"predicting {name}")
        case = stored_cases.stored_case(trainer, data, name)
        trainer.print_to_log_file(f"{name}, shape {tuple(case.image.shape)}, rank {trainer.local_rank}")
        planning.expect(name, case, probabilities, stored_cases.reading_bytes(case.image))
        image = stored_cases.read_image(case.image, planning.allocate)
        return PreprocessedCase(image, case.previous_stage, case.properties, case.next_stages)

    return [Job(name, str(folder / name), Stored(name)) for name in names], load


def write_summary(trainer: Any, options: Options) -> None:
    """Compare the segmentations with the ground truth, write ``summary.json`` and log the means."""
    labels = trainer.label_manager
    metrics = compute_metrics_on_folder(
        str(Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations")),
        str(_folder(trainer)),
        str(_folder(trainer) / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
        _metric_processes(trainer, options),
        True,
    )
    if hasattr(trainer.logger, "log_summary"):  # new in nnU-Net 2.7
        for label, means in metrics["mean"].items():
            trainer.logger.log_summary(f"final_val/class_{label}_dice", means["Dice"])
        trainer.logger.log_summary("final_val/foreground_dice", metrics["foreground_mean"]["Dice"])
    trainer.print_to_log_file("Validation complete", also_print_to_console=True)
    trainer.print_to_log_file("Mean Validation Dice: ", metrics["foreground_mean"]["Dice"], also_print_to_console=True)


def _metric_processes(trainer: Any, options: Options) -> int:
    """Return how many cases are compared at a time: as many as stock, if the budget has room for them."""
    files = list(_folder(trainer).glob(f"*{trainer.dataset_json['file_ending']}"))
    largest = max(map(_voxels, files), default=0)
    budget = machine_budget(options.max_ram, None, torch.device("cpu"), options.tmp_dir)
    most = min(int(default_num_processes), len(files))
    if budget.ram_bytes is not None:
        room = (budget.ram_bytes - budget.reserved_ram_bytes) // (WORKER_BYTES + _METRIC_VOXEL_BYTES * largest)
        most = min(most, room)
    return max(1, most)


def _voxels(file: Path) -> int:
    try:
        return read_header(str(file)).voxels
    except UsageError:  # a format that nnU-Net's reader knows and this one does not
        return 0


def _folder(trainer: Any) -> Path:
    return Path(trainer.output_folder, "validation")
