"""What this package needs to know of nnU-Net's objects, as plain data; the differences between versions live here.

nnU-Net's managers are read and never changed. "Default" below means: nnU-Net's own class or function, whose rule this
package reproduces. Anything else is called as it is.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json, save_pickle
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.helpers import softmax_helper_dim0
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from nnunet_lowmem.errors import ModelError, because
from nnunet_lowmem.labels.next_stages import Target
from nnunet_lowmem.labels.resampling import AxisTable, copy_axis, resampling_tables
from nnunet_lowmem.labels.rules import CaseGeometry, LabelRule, LogitsResampling
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import LABEL_MANAGER, RESAMPLINGS, Step
from nnunet_lowmem.preprocessing.grids import network_spacing
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.system.owned_folders import remove_stale
from nnunet_lowmem.types import PreprocessedCase, shape3
from nnunet_lowmem.volumes.selection import is_output_file

try:
    from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
except ImportError:  # new in nnU-Net 2.6
    no_resampling_hack = None

logger = logging.getLogger(__name__)


def label_rule(label_manager: LabelManager) -> LabelRule | None:
    """Return how `label_manager` turns logits into labels, or None if it is not nnU-Net's own.

    Rules from ``LabelManager.convert_logits_to_segmentation`` and ``export_prediction``: without regions the map holds
    the index of the head; uint8 below 255 foreground labels, else uint16.
    """
    nonlin = torch.sigmoid if label_manager.has_regions else softmax_helper_dim0
    if not lookup.is_class(type(label_manager), LABEL_MANAGER) or label_manager.inference_nonlin is not nonlin:
        return None
    if lookup.found(Step.LABELS, label_manager):
        return None
    heads = label_manager.num_segmentation_heads
    dtype = np.dtype(np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16)
    if label_manager.has_regions:
        values = np.array([0, *label_manager.regions_class_order], np.int64).astype(np.uint16)
    else:
        values = np.arange(heads + 1, dtype=np.uint16)
    by_softmax = not label_manager.has_regions and _takes_softmax_for_labels()
    return LabelRule(ranked=not label_manager.has_regions, values=values, dtype=dtype, by_softmax=by_softmax)


@cache
def _takes_softmax_for_labels() -> bool:
    """Whether nnU-Net takes the softmax for labels alone, as 2.5 does: rounding can make its argmax another.

    It is asked with two logits that differ by less than their softmax can tell.
    """
    labels = LabelManager({"background": 0, "foreground": 1}, None)
    return not labels.convert_logits_to_segmentation(torch.tensor([0.0, 2.0**-30]).reshape(2, 1, 1, 1)).any()


def check_reader(plans_manager: PlansManager) -> None:
    """Refuse plans that name a reader which the installed nnU-Net does not have."""
    try:
        plans_manager.image_reader_writer_class  # noqa: B018  # a property that looks the class up
    except RuntimeError as error:
        text = f"the plans ask for the reader {plans_manager.plans['image_reader_writer']!r}"
        raise because(ModelError, f"{text}, which the installed nnU-Net does not have", error) from error


def write_run_files(
    target: str | list[str] | None,
    arguments: dict[str, Any],
    dataset_json: dict[str, Any],
    plans: dict[str, Any],
) -> None:
    """Write what stock writes beside the predictions: the arguments, dataset.json and plans.json; not beside a file."""
    if target is None:
        return
    folder = output_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    if isinstance(target, OutputFile):
        return
    arguments = deepcopy(arguments)
    recursive_fix_for_json_export(arguments)
    # as stock does: parts of a run (-num_parts) write them at the same time, and where files cannot be renamed the copy
    # of one would be compared while another writes
    save_json(arguments, str(folder / "predict_from_raw_data_args.json"))
    save_json(dataset_json, str(folder / "dataset.json"), sort_keys=False)
    save_json(plans, str(folder / "plans.json"), sort_keys=False)


class OutputFile(list[str]):
    """The only output, by its whole name: no file about the run as a whole is written beside it."""


def outputs(wanted: Any) -> str | list[str] | None:
    """Return the folder or list of outputs as far as stock takes it for one: no path, tuple or array.

    The name of a file is a list of one.
    """
    if is_output_file(wanted):
        return OutputFile([wanted])
    if wanted is None or isinstance(wanted, str | list):
        return wanted
    logger.warning("nnU-Net writes to a folder given as str, or a list: for %r results are returned", wanted)
    return None


def output_folder(target: str | list[str]) -> Path:
    """Return where stock puts what belongs to a run as a whole: the folder of the first output."""
    return Path(target if isinstance(target, str) else os.path.dirname(target[0]))


def write_probabilities(probabilities: NDArray[Any], path: str) -> None:
    """Write stock's .npz of an array that exists as a whole."""
    with atomic_output(Path(path)) as partial_file:
        np.savez_compressed(partial_file, probabilities=probabilities)


def write_properties(properties: dict[str, Any], path: str) -> None:
    """Write stock's .pkl."""
    with atomic_output(Path(path)) as partial_file:
        save_pickle(properties, str(partial_file))


def case_geometry(network_shape: Sequence[int], properties: dict[str, Any]) -> CaseGeometry:
    """Read the shapes that nnU-Net's preprocessor left in `properties`."""
    crop = [slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]]
    return CaseGeometry(
        network_shape=shape3(network_shape),
        cropped_shape=shape3(properties["shape_after_cropping_and_before_resampling"]),
        original_shape=shape3(properties["shape_before_cropping"]),
        crop=(crop[0], crop[1], crop[2]),
    )


def logits_resampling(
    plans_manager: Any,
    configuration_manager: Any,
    geometry: CaseGeometry,
    properties: dict[str, Any],
    to_next_stage: bool = False,
) -> LogitsResampling:
    """Return the resampling of logits that the plans ask for.

    The spacings are those of ``convert_predicted_logits_to_segmentation_with_correct_shape``: a two-dimensional
    configuration keeps the spacing between slices. To the grid of a next stage, which `geometry` calls the cropped one,
    both are those of the configuration that predicts, as in ``resample_and_save``.
    """
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    current = network_spacing(spacing, configuration_manager)
    function = configuration_manager.resampling_fn_probabilities
    if to_next_stage:
        arguments = (geometry.cropped_shape, current, current)
    else:
        arguments = (properties["shape_after_cropping_and_before_resampling"], current, spacing)
    if not treats_heads_one_by_one(function):
        return LogitsResampling(function, arguments, None, per_head=False)
    return LogitsResampling(function, arguments, _default_tables(function, geometry, *arguments[1:]))


def next_stage_targets(case: PreprocessedCase, plans_manager: Any, configuration_manager: Any) -> list[Target]:
    """Return what the next stages of a case ask for."""
    found = []
    for stage in case.next_stages:
        geometry = CaseGeometry.uncropped(shape3(case.image.shape[1:]), stage.shape)
        resampling = logits_resampling(
            plans_manager, configuration_manager, geometry, case.properties, to_next_stage=True
        )
        found.append(Target(stage, geometry, resampling))
    return found


def treats_heads_one_by_one(function: Any) -> bool:
    """Whether a resampling function is one of nnU-Net's, which look at one head at a time; others might look at all."""
    base = function.func if isinstance(function, partial) else function
    name = getattr(base, "__name__", "")
    return name in RESAMPLINGS and lookup.is_stocks(base, name) and not lookup.found(Step.RESAMPLING)


def _default_tables(
    function: Any, geometry: CaseGeometry, current: Sequence[float], spacing: Sequence[float]
) -> tuple[AxisTable, ...] | None:
    base = function.func if isinstance(function, partial) else function
    same_shape = geometry.network_shape == geometry.cropped_shape
    if same_shape and base in (default_resampling.resample_data_or_seg_to_shape, no_resampling_hack):
        return tuple(copy_axis(np.arange(size)) for size in geometry.network_shape)
    if base is not default_resampling.resample_data_or_seg_to_shape:
        return None
    options = {name: parameter.default for name, parameter in inspect.signature(base).parameters.items()}
    options |= function.keywords if isinstance(function, partial) else {}
    if options["is_seg"] or options["order"] != 1:
        return None
    separate, axis = default_resampling.determine_do_sep_z_and_axis(
        options["force_separate_z"], current, spacing, options["separate_z_anisotropy_threshold"]
    )
    if not separate:
        return resampling_tables(geometry.network_shape, geometry.cropped_shape, None)
    changes = geometry.network_shape[axis] != geometry.cropped_shape[axis]
    if changes and options["order_z"] != 0:
        return None
    return resampling_tables(geometry.network_shape, geometry.cropped_shape, int(axis))


def as_recorded(method: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stock method: what stock records in predict_from_raw_data_args.json."""
    return {name: given[name] for name in inspect.signature(method).parameters if name != "self"}
