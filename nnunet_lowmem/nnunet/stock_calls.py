"""Functions of nnU-Net that are looked up where nnU-Net looks them up, whenever they are called.

So what a program has put in their place is called here as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import torch
from nnunetv2.inference import data_iterators, export_prediction, predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray

from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.overrides.bypassed import RAW
from nnunet_lowmem.overrides.lookup import is_stocks
from nnunet_lowmem.types import PreprocessedCase


def read_json(path: Path) -> dict[str, Any]:
    """Read dataset.json or plans.json: by our own function, which says more, unless a program has put one there.

    Raises
    ------
    ModelError
        If the file holds no JSON object.
    """
    read = predict_from_raw_data.load_json
    return model_files.read_json(path) if is_stocks(read, "load_json") else read(str(path))


def reads_files() -> bool:
    """Whether a model is read from the files that it is said to be in; programs put other loaders there."""
    return is_stocks(torch.load, "load", "torch") and is_stocks(predict_from_raw_data.load_json, "load_json")


def find_folds(model_folder: str, checkpoint_name: str) -> list[int | str] | None:
    """Ask a program's own function which folds there are; None without one."""
    find = nnUNetPredictor.auto_detect_available_folds
    return None if is_stocks(find, "auto_detect_available_folds", RAW) else list(find(model_folder, checkpoint_name))


def find_trainer(name: str) -> Any:
    """Ask a program's own function for a trainer; None without one."""
    find = getattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", None)
    if find is not None:
        return None if is_stocks(find, "recursive_find_trainer_class_by_name") else find(name)
    find = predict_from_raw_data.recursive_find_python_class  # before nnU-Net 2.8
    if is_stocks(find, "recursive_find_python_class"):
        return None
    return find(str(Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")), name, "nnunetv2.training.nnUNetTrainer")


def plans_manager(plans: dict[str, Any]) -> Any:
    """Make nnU-Net's manager of plans."""
    return predict_from_raw_data.PlansManager(plans)


def input_channels(plans: Any, configuration: Any, dataset_json: dict[str, Any]) -> int:
    """Return the number of channels the network takes, those of a previous stage included."""
    return int(predict_from_raw_data.determine_num_input_channels(plans, configuration, dataset_json))


def network_threads() -> int:
    """Return how many threads stock lets the network have at most."""
    return int(predict_from_raw_data.default_num_processes)


def importance(configuration_manager: Any, is_gaussian: bool, device: torch.device) -> torch.Tensor:
    """Return stock's weights of the voxels of a tile, half, of the shape of the patch.

    What a program makes of them may be a number or of another type, as long as it can be broadcast.
    """
    patch = tuple(configuration_manager.patch_size)
    if not is_gaussian:
        return torch.ones(patch, dtype=torch.half, device=device)
    gaussian = predict_from_raw_data.compute_gaussian
    made = gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    weights = torch.as_tensor(made, device=device)
    weights = weights if weights.is_floating_point() else weights.half()
    return weights if tuple(weights.shape) == patch else weights.expand(patch).clone()


def forget_importance() -> None:
    """Let nnU-Net's cache of the weights go."""
    getattr(predict_from_raw_data.compute_gaussian, "cache_clear", int)()


def network_input(case: PreprocessedCase, label_manager: Any) -> torch.Tensor:
    """Return what stock's methods are given: the image, in a cascade with the labels of the previous stage behind it.

    Returns
    -------
    float32 tensor, shape (channels + foreground labels of the previous stage, z, y, x)
    """
    image = np.asarray(case.image)
    if case.previous_stage is None:
        return torch.from_numpy(image)
    known = [getattr(module, "convert_labelmap_to_one_hot", None) for module in (predict_from_raw_data, data_iterators)]
    replaced = [function for function in known if function and not is_stocks(function, "convert_labelmap_to_one_hot")]
    encode: Any = replaced[0] if replaced else known[1]
    one_hot = encode(case.previous_stage, label_manager.foreground_labels, image.dtype)
    return torch.from_numpy(np.vstack((image, one_hot)))


def item_of_adapter(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    plans_manager: Any,
    configuration_manager: Any,
    dataset_json: dict[str, Any],
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


def export() -> Any:
    """Return the function that makes and writes the files of a case, or what stands in its place."""
    return predict_from_raw_data.export_prediction_from_logits
