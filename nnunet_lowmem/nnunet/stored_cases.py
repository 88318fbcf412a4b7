"""What nnU-Net's training stores of a case: its preprocessed image, and its labels for later stages of a cascade.

The differences between nnU-Net's versions live here: 2.5 has one class of data sets, which gives the labels of the
previous stage as the last channel of the segmentation and writes .npz only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.training.dataloading import nnunet_dataset
from numpy.typing import NDArray

from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.types import NextStage, PreprocessedCase, Shape3

#: Data sets by the ending of their files; empty before nnU-Net 2.6.
_CLASSES: dict[str, Any] = getattr(nnunet_dataset, "file_ending_dataset_mapping", {})


def validation_cases(trainer: Any) -> tuple[Any, list[str]]:
    """Return nnU-Net's data set of the validation cases, and their names in the order of stock."""
    _, names = trainer.do_split()
    data = _data_set(trainer.preprocessed_dataset_folder, list(names), trainer.folder_with_segs_from_previous_stage)
    return data, sorted(names)


def stored_case(trainer: Any, data: Any, name: str) -> PreprocessedCase:
    """Return a case whose image may still have to be read: see `read_image`."""
    image, segmentation, *rest = data.load_case(name)
    previous_stage = None
    if trainer.is_cascaded:
        previous_stage = np.asarray(rest[0][:] if len(rest) == 2 else segmentation[-1])
    properties = rest[-1]
    return PreprocessedCase(image, previous_stage, properties, _next_stages(trainer, name, properties))


def reading_bytes(image: Any) -> int:
    """Return what `read_image` takes beside the image it returns."""
    return 0 if isinstance(image, np.ndarray) else int(image.nbytes * image.chunks[1] / image.shape[1])


def read_image(image: Any, allocate: Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]) -> NDArray[Any]:
    """Read a compressed image chunk by chunk; one that is mapped or in memory is returned as it is."""
    if isinstance(image, np.ndarray):
        return image
    result = allocate(image.shape, np.dtype(image.dtype))
    depth = image.chunks[1]
    for start in range(0, image.shape[1], depth):
        result[:, start : start + depth] = image[:, start : start + depth]
    return result


def _data_set(folder: str, names: list[str], previous_stage_folder: str | None = None) -> Any:
    if not _CLASSES:
        return nnunet_dataset.nnUNetDataset(folder, names, 0, previous_stage_folder)
    return nnunet_dataset.infer_dataset_class(folder)(folder, names, previous_stage_folder)


def _next_stages(trainer: Any, name: str, properties: dict[str, Any]) -> tuple[NextStage, ...]:
    """Return the next stages that have preprocessed this case; the others are logged, as in stock."""
    found = []
    for stage in trainer.configuration_manager.next_stage_names or ():
        configuration = trainer.plans_manager.get_configuration(stage)
        folder = Path(trainer.preprocessed_dataset_folder_base, configuration.data_identifier)
        try:
            data = _data_set(str(folder), [name])
            shape = data.load_case(name)[0].shape[1:]
        except FileNotFoundError:
            trainer.print_to_log_file(
                f"Predicting next stage {stage} failed for case {name} because the preprocessed file is missing! "
                "Run the preprocessing for this configuration first!"
            )
            continue
        output = Path(trainer.output_folder_base, "predicted_next_stage", stage)
        output.mkdir(parents=True, exist_ok=True)
        z, y, x = map(int, shape)
        write = partial(write_labels, trainer, type(data), output / name, properties, (z, y, x))
        found.append(NextStage((z, y, x), write))
    return tuple(found)


def write_labels(
    trainer: Any, data_class: Any, output: Path, properties: dict[str, Any], shape: Shape3, labels: NDArray[Any]
) -> None:
    """Store labels through ``resample_and_save``, which is given nothing to resample and to decide."""
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    decided = SimpleNamespace(
        foreground_labels=trainer.label_manager.foreground_labels,
        convert_logits_to_segmentation=lambda logits: logits,
    )
    managers = (
        SimpleNamespace(transpose_forward=plans.transpose_forward, get_label_manager=lambda _: decided),
        SimpleNamespace(
            spacing=configuration.spacing,
            patch_size=configuration.patch_size,
            resampling_fn_probabilities=lambda logits, *_: logits,
        ),
    )
    ending = next((ending for ending, known in _CLASSES.items() if known is data_class), "npz")
    with atomic_output(output.with_name(f"{output.name}.{ending}")) as path:
        target = path.with_suffix("") if _CLASSES else path
        since_2_6 = (data_class,) if _CLASSES else ()
        resample_and_save(
            labels,
            shape,
            str(target),
            *managers,
            properties,
            trainer.dataset_json,
            torch.get_num_threads(),
            *since_2_6,
        )
