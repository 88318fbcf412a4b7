"""Functions of nnU-Net that are looked up where nnU-Net looks them up, whenever they are called.

So what a program has put in their place is called here as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.inference import data_iterators, export_prediction, predict_from_raw_data
from numpy.typing import NDArray

from nnunet_lowmem.overrides import is_stocks
from nnunet_lowmem.types import PreprocessedCase


def network_threads() -> int:
    """Return how many threads stock lets the network have at most."""
    return int(predict_from_raw_data.default_num_processes)


def importance(configuration_manager: Any, is_gaussian: bool, device: torch.device) -> torch.Tensor:
    """Return stock's weights of the voxels of a tile, half, of the shape of the patch."""
    patch = tuple(configuration_manager.patch_size)
    if not is_gaussian:
        return torch.ones(patch, dtype=torch.half, device=device)
    gaussian = predict_from_raw_data.compute_gaussian
    weights: torch.Tensor = gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    return weights


def forget_importance() -> None:
    """Let nnU-Net's cache of the weights go."""
    getattr(predict_from_raw_data.compute_gaussian, "cache_clear", int)()


def network_input(case: PreprocessedCase, label_manager: Any) -> torch.Tensor:
    """Return what stock's methods are given: the image, in a cascade with the labels of the previous stage behind it.

    Returns
    -------
    float32 tensor, shape (channels + foreground labels of the previous stage, z, y, x)
    """
    if case.previous_stage is None:
        return torch.from_numpy(case.image)
    known = [getattr(module, "convert_labelmap_to_one_hot", None) for module in (predict_from_raw_data, data_iterators)]
    replaced = [function for function in known if function and not is_stocks(function, "convert_labelmap_to_one_hot")]
    encode: Any = replaced[0] if replaced else known[1]
    one_hot = encode(case.previous_stage, label_manager.foreground_labels, case.image.dtype)
    return torch.from_numpy(np.vstack((case.image, one_hot)))


def item_of_adapter(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    plans_manager: Any,
    dataset_json: dict[str, Any],
    configuration_manager: Any,
    verbose: bool,
) -> dict[str, Any]:
    """Return the only item of stock's iterator over one array, or of what stands in its place."""
    adapter = predict_from_raw_data.PreprocessAdapterFromNpy(
        [image], [previous_stage], [properties], [None], plans_manager, dataset_json, configuration_manager,
        num_threads_in_multithreaded=1, verbose=verbose,
    )  # fmt: skip
    item: dict[str, Any] = next(adapter)
    return item


def conversion(writes: bool) -> Any:
    """Return the function that makes a segmentation of logits, from where stock takes it if it `writes` the result."""
    return (
        export_prediction if writes else predict_from_raw_data
    ).convert_predicted_logits_to_segmentation_with_correct_shape


def export_as_stock(
    logits: Any,
    properties: dict[str, Any],
    plans_manager: Any,
    configuration_manager: Any,
    dataset_json: dict[str, Any],
    output: str,
    probabilities: bool,
) -> None:
    """Let stock's function, or what stands in its place, write the files of a case."""
    predict_from_raw_data.export_prediction_from_logits(
        logits, properties, configuration_manager, plans_manager, dataset_json, output, probabilities
    )
