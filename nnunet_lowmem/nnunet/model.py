"""From a model folder to a network: the same attributes as stock's loading, and nothing run that is not trusted."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_lowmem.errors import LowMemError, ModelError, because
from nnunet_lowmem.nnunet import adapter, model_files, model_keys, model_limits, stock_calls
from nnunet_lowmem.nnunet.trust import Trust

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model folder, read; `network` has random weights.

    Attributes
    ----------
    plans_manager, configuration_manager, label_manager
        nnU-Net's.
    dataset_json : dict
    configuration_name, trainer_name : str
    mirroring_axes : sequence of int, or None
    network : Module
    weights : dict
        Of the first fold.
    """

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    label_manager: LabelManager
    dataset_json: dict[str, Any]
    configuration_name: str
    trainer_name: str
    mirroring_axes: Any
    network: nn.Module
    weights: Mapping[str, Any]


def load_folds(
    folder: Path, folds: Any, checkpoint_name: str, trust: Trust, device: str = "cpu", trainer_class: Any = None
) -> tuple[Model, list[Path], Iterator[Mapping[str, Any]]]:
    """Read a model folder; return the model, its checkpoints, and the weights of each, read when they are asked for.

    Raises
    ------
    ModelError
        If a file is missing or unreadable, names what is not trusted, or asks for an absurd size.
    """
    folds = stock_calls.find_folds(str(folder), checkpoint_name) if folds is None else folds
    checkpoints = model_files.checkpoint_files(str(folder), folds, checkpoint_name, stock_calls.reads_files())
    if trust.everything:
        logger.warning("%s is trusted: the code it holds or names is run", folder)
    try:
        model = load_model(folder, checkpoints[0], trust, device, trainer_class)
    except LowMemError:
        raise
    except Exception as error:
        raise because(ModelError, why_not_loaded(checkpoints[0], error), error) from error
    adapter.check_reader(model.plans_manager)
    others = (trust.load_checkpoint(path, device)["network_weights"] for path in checkpoints[1:])
    return model, checkpoints, chain([model.weights], others)


def load_model(
    folder: Path, checkpoint_file: Path, trust: Trust, device: str = "cpu", trainer_class: Any = None
) -> Model:
    """Read a model folder and build its network, as ``initialize_from_trained_model_folder`` does.

    On the device "meta" no weights are read and the network takes no memory: enough to tell what it would take.

    Raises
    ------
    ModelError
        If a file cannot be read, names what is not trusted, or asks for an absurd size.
    """
    dataset_json = stock_calls.read_json(folder / "dataset.json")
    model_files.check_file_ending(dataset_json, folder / "dataset.json")
    plans = stock_calls.read_json(folder / "plans.json")
    model_keys.check_files(plans, dataset_json, folder)
    checkpoint = trust.load_checkpoint(checkpoint_file, device)
    if not trust.everything:
        model_limits.check_raw_plans(plans)
    plans_manager = stock_calls.plans_manager(plans)
    configuration_name = checkpoint["init_args"]["configuration"]
    configuration = model_keys.configuration(plans_manager, configuration_name, folder)
    model_keys.check_configuration(configuration.configuration, configuration_name, folder)
    if not trust.everything:
        model_keys.check_architecture(configuration.configuration, configuration_name, folder)
    trust.check_plans(plans, configuration.configuration)
    name = checkpoint["trainer_name"]
    trainer = trainer_class or stock_calls.find_trainer(name) or trust.trainer_class(name)
    label_manager = plans_manager.get_label_manager(dataset_json)
    channels = stock_calls.input_channels(plans_manager, configuration, dataset_json)
    heads = label_manager.num_segmentation_heads

    def build() -> nn.Module:
        return _build(trainer, plans_manager, configuration, channels, heads)

    if not trust.everything:
        model_limits.check_configuration(configuration.configuration, plans_manager.transpose_forward)
        model_limits.check_channels_and_heads(channels, heads)
        held = sum(value.numel() for value in checkpoint["network_weights"].values() if torch.is_tensor(value))
        model_limits.check_weights(_weights_needed(build), held, checkpoint_file)
    return Model(
        plans_manager=plans_manager,
        configuration_manager=configuration,
        configuration_name=str(configuration_name),
        label_manager=label_manager,
        dataset_json=dataset_json,
        trainer_name=name,
        mirroring_axes=_mirroring_axes(checkpoint, checkpoint_file),
        network=(_built_without_weights(build) if device == "meta" else None) or build(),
        weights=checkpoint["network_weights"],
    )


def check_finite(weights: Any, name: object) -> None:
    """Refuse weights that are NaN or infinite: every label they made would be background.

    What is no dict of tensors is for the network of a client to judge.

    Raises
    ------
    ModelError
        With the checkpoint and the first such tensor.
    """
    for key, value in weights.items() if isinstance(weights, Mapping) else ():
        if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
            wrong = value.numel() - int(torch.isfinite(value).sum())
            raise ModelError(f"{name}: {wrong} of the {value.numel()} weights {key!r} are NaN or infinite")


def uncompiled(network: Any) -> Any:
    """Return what ``torch.compile`` was given, or the network itself."""
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def why_not_loaded(checkpoint: Path | str, error: Exception) -> str:
    """One line; of weights that do not fit, torch lists every tensor, and the first says enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RuntimeError) and "state_dict" in lines[0] and len(lines) > 1:
        return f"the weights in {checkpoint} do not fit the plans beside them: {lines[1]}"
    reason = " ".join(lines) or "no reason given"
    return f"{checkpoint} cannot be loaded as a model: {type(error).__name__}: {reason}"


def _build(trainer: Any, plans: Any, configuration: Any, channels: int, heads: int) -> nn.Module:
    build: Callable[..., nn.Module] = trainer.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:  # since nnU-Net 2.7
        return build(plans, configuration, channels, heads, enable_deep_supervision=False)
    return build(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        heads,
        enable_deep_supervision=False,
    )


def _weights_needed(build: Callable[[], nn.Module]) -> int:
    """Count the weights of the network that `build` makes, without their memory; 0 where that cannot be done."""
    network = _built_without_weights(build)
    return 0 if network is None else sum(tensor.numel() for tensor in network.state_dict().values())


def _built_without_weights(build: Callable[[], nn.Module]) -> nn.Module | None:
    """Build a network whose tensors have no memory; None where it needs real data while it is built."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # whatever a stranger's network meets there
        return None


def _mirroring_axes(checkpoint: Mapping[str, Any], file: Path) -> Any:
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    if isinstance(axes, Iterable) and not all(axis in (0, 1, 2) for axis in axes):
        raise ModelError(f"checkpoint {file} allows mirroring along the axes {axes}; there are 0, 1 and 2")
    return axes
