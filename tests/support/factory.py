"""Writes small, real nnU-Net v2 model folders: plans, dataset.json and checkpoints that stock nnU-Net loads.

No training. The convolutions are random but smooth, and the heads are placed on the features that the network gives
for a real image: head k wins where the features are nearest to one sampled voxel's features (a Voronoi diagram), so
every class owns an area with a boundary, for 2 classes as for 700.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

RESAMPLING = {
    "default": ("resample_data_or_seg_to_shape", {"order": 1, "order_z": 0, "force_separate_z": None}),
    "torch": ("resample_torch_fornnunet", {"force_separate_z": None, "memefficient_seg_resampling": False}),
    "none": ("no_resampling_hack", {}),
}
INTENSITIES = {"mean": 60.0, "median": 50.0, "std": 45.0, "min": 0.0, "max": 255.0}
PERCENTILES = {"percentile_00_5": 1.0, "percentile_99_5": 230.0}


@dataclass(frozen=True)
class ModelSpec:
    """What distinguishes one model folder from another.

    ``labels`` is a number of classes or dataset.json's own dictionary; ``resampling`` a key of `RESAMPLING` or the name
    of another function (called without arguments of its own); ``probabilities_kwargs`` is merged into its arguments.
    Axis orders are the network's.
    """

    labels: int | dict[str, Any] = 4
    regions_class_order: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ("MR",)
    normalisation: tuple[str, ...] = ("ZScoreNormalization",)
    use_mask_for_norm: tuple[bool, ...] = (False,)
    patch_size: tuple[int, ...] = (24, 28, 20)
    spacing: tuple[float, ...] = (3.9, 4.2, 4.3)
    transpose_forward: tuple[int, int, int] = (0, 1, 2)
    resampling: str = "default"
    probabilities_kwargs: dict[str, Any] = field(default_factory=dict)
    reader: str = "SimpleITKIO"
    file_ending: str = ".nii.gz"
    folds: tuple[int | str, ...] = (0,)
    mirror_axes: tuple[int, ...] | None = None
    architecture: str = "PlainConvUNet"
    previous_stage: str | None = None
    label_manager: str = "LabelManager"
    preprocessor: str = "DefaultPreprocessor"
    trainer: str = "nnUNetTrainer"
    legacy_plans: bool = False
    features: tuple[int, ...] = (8, 12)

    @property
    def configuration(self) -> str:
        """Name of the configuration that the checkpoint asks for."""
        if len(self.patch_size) == 2:
            return "2d"
        return "3d_cascade_fullres" if self.previous_stage else "3d_fullres"

    def dataset_json(self) -> dict[str, Any]:
        labels = self.labels
        if isinstance(labels, int):
            labels = {"background": 0, **{f"class_{i}": i for i in range(1, labels)}}
        channels = {str(i): name for i, name in enumerate(self.channels)}
        key = "modality" if self.legacy_plans else "channel_names"
        out = {key: channels, "labels": labels, "numTraining": 1, "file_ending": self.file_ending}
        if self.regions_class_order is not None:
            out["regions_class_order"] = list(self.regions_class_order)
        return out

    def plans(self) -> dict[str, Any]:
        """Return plans.json: one configuration, or a cascade that inherits from its full resolution."""
        name = "3d_fullres" if self.previous_stage else self.configuration
        configurations = {name: self._configuration_dict()}
        if self.previous_stage:
            cascade = {"inherits_from": name, "previous_stage": self.previous_stage}
            configurations["3d_cascade_fullres"] = cascade
            configurations[self.previous_stage] = {"inherits_from": name, "next_stage": "3d_cascade_fullres"}
        intensities = {str(i): {**INTENSITIES, **PERCENTILES} for i in range(len(self.channels))}
        key = "by_modality" if self.legacy_plans else "per_channel"
        return {
            "dataset_name": "Dataset999_Small",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "original_median_shape_after_transp": [40, 40, 40],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": [self.transpose_forward.index(i) for i in range(3)],
            "configurations": configurations,
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": self.label_manager,
            f"foreground_intensity_properties_{key}": intensities,
        }

    def _configuration_dict(self) -> dict[str, Any]:
        function, kwargs = RESAMPLING.get(self.resampling, (self.resampling, {}))
        for_seg = {"is_seg": True} if kwargs else {}
        for_data = {"is_seg": False} if kwargs else {}
        cubic = {"order": 3} if "order" in kwargs else {}
        return {
            "data_identifier": "nnUNetPlans_small",
            "preprocessor_name": self.preprocessor,
            "batch_size": 2,
            "patch_size": list(self.patch_size),
            "median_image_size_in_voxels": [40.0] * len(self.patch_size),
            "spacing": list(self.spacing),
            "normalization_schemes": list(self.normalisation),
            "use_mask_for_norm": list(self.use_mask_for_norm),
            "resampling_fn_data": function,
            "resampling_fn_data_kwargs": {**for_data, **kwargs, **cubic},
            "resampling_fn_seg": function,
            "resampling_fn_seg_kwargs": {**for_seg, **kwargs},
            "resampling_fn_probabilities": function,
            "resampling_fn_probabilities_kwargs": {**for_data, **kwargs, **self.probabilities_kwargs},
            "batch_dice": False,
            **self._architecture_dict(),
        }

    def _architecture_dict(self) -> dict[str, Any]:
        dims, stages = len(self.patch_size), len(self.features)
        kernel = [3 if size >= 8 else 1 for size in self.patch_size]
        stride = [2 if size >= 8 else 1 for size in self.patch_size]
        kernels, strides = [kernel] * stages, [[1] * dims, *[stride] * (stages - 1)]
        if self.legacy_plans:
            return {
                "UNet_class_name": self.architecture,
                "UNet_base_num_features": self.features[0],
                "unet_max_num_features": self.features[-1],
                "n_conv_per_stage_encoder": [1] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "num_pool_per_axis": [1] * dims,
                "pool_op_kernel_sizes": strides,
                "conv_kernel_sizes": kernels,
            }
        module = "residual_unet" if self.architecture.startswith("Residual") else "unet"
        blocks = "n_blocks_per_stage" if module == "residual_unet" else "n_conv_per_stage"
        arch_kwargs = {
            "n_stages": stages,
            "features_per_stage": list(self.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": kernels,
            "strides": strides,
            blocks: [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        return {
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.{module}.{self.architecture}",
                "arch_kwargs": arch_kwargs,
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            }
        }


def write_model(folder: Path, spec: ModelSpec, image: Sequence[str], previous_stage: str | None = None) -> Path:
    """Write the model folder of `spec` with weights that partition the image in the files `image`; return `folder`."""
    folder.mkdir(parents=True)
    plans, dataset = spec.plans(), spec.dataset_json()
    save_json(plans, str(folder / "plans.json"), sort_keys=False)
    save_json(dataset, str(folder / "dataset.json"), sort_keys=False)
    network = _fitted_network(json.loads(json.dumps(plans)), dataset, spec, image, previous_stage)
    state = network.state_dict()
    for number, fold in enumerate(spec.folds):
        _save_checkpoint(folder / f"fold_{fold}", spec, fold, _perturbed(state, number))
    return folder


def _fitted_network(
    plans: dict[str, Any], dataset: dict[str, Any], spec: ModelSpec, image: Sequence[str], previous_stage: str | None
) -> nn.Module:
    manager = PlansManager(plans)
    configuration = manager.get_configuration(spec.configuration)
    labels = manager.get_label_manager(dataset)
    heads = labels.num_segmentation_heads
    channels = determine_num_input_channels(manager, configuration, dataset)
    network = nnUNetTrainer.build_network_architecture(*architecture(manager, configuration), channels, heads, False)
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, seg, _ = preprocessor.run_case(list(image), previous_stage, manager, configuration, dataset)
    if spec.previous_stage:
        data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels.foreground_labels, data.dtype)))
    rng = torch.Generator().manual_seed(len(plans["configurations"]) + heads)
    _smooth_weights(network, rng)
    features = _features(network, torch.from_numpy(data), dims=len(spec.patch_size))
    weight, bias = (_region_heads if labels.has_regions else _voronoi_heads)(features, heads, rng)
    head = network.decoder.seg_layers[-1]
    head.weight.data = weight.reshape(head.weight.shape)
    head.bias.data = bias
    return network.eval()


def architecture(manager: PlansManager, configuration: Any) -> tuple[Any, ...]:
    """What the installed nnU-Net's trainer builds its network from: before 2.6 the parts of the configuration."""
    if "architecture_class_name" not in inspect.signature(nnUNetTrainer.build_network_architecture).parameters:
        return manager, configuration
    return (
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
    )


def _smooth_weights(network: nn.Module, rng: torch.Generator) -> None:
    """Random mixtures of channels under a bell-shaped kernel, a little askew so that mirroring changes the output."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            shape = module.weight.shape
            bell = torch.ones(())
            for size in shape[2:]:
                bell = bell[..., None] * torch.tensor({1: [1.0], 2: [1.0, 1.0], 3: [0.25, 0.5, 0.25]}[size])
            mixture = torch.randn(shape[:2], generator=rng) / shape[1] ** 0.5
            askew = 0.02 * torch.randn(shape, generator=rng)
            module.weight.data = mixture.reshape(*shape[:2], *[1] * bell.ndim) * bell + askew
        elif isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d):
            module.weight.data = 1 + 0.2 * torch.randn(module.weight.shape, generator=rng)
            module.bias.data = 0.2 * torch.randn(module.bias.shape, generator=rng)


@torch.inference_mode()
def _features(network: nn.Module, data: torch.Tensor, dims: int) -> torch.Tensor:
    """Return what the head sees for the whole image, as (voxels, features)."""
    seen: list[torch.Tensor] = []
    head = network.decoder.seg_layers[-1]
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = data.transpose(0, 1) if dims == 2 else data[None]
    missing = [-size % 4 for size in batch.shape[2:]]
    network.eval()(nn.functional.pad(batch.float(), [n for size in reversed(missing) for n in (0, size)]))
    hook.remove()
    return seen[0].movedim(1, -1).flatten(0, -2).clone()


def _voronoi_heads(features: torch.Tensor, heads: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax of ``c_k . x - |c_k|^2 / 2`` is the nearest of the centres c_k, chosen far apart (k-means++ seeding)."""
    sample = features[torch.randperm(len(features), generator=rng)[:20000]]
    first = sample.mean(1).argmin()
    centres, distance = [sample[first]], (sample - sample[first]).square().sum(1)
    while len(centres) < heads:
        centres.append(sample[torch.multinomial(distance + 1e-12, 1, generator=rng)[0]])
        distance = torch.minimum(distance, (sample - centres[-1]).square().sum(1))
    stacked = torch.stack(centres)
    return 2 * stacked, -stacked.square().sum(1)


def _region_heads(features: torch.Tensor, heads: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearly parallel half-spaces of growing threshold: regions that overlap but do not quite nest."""
    common = torch.randn(features.shape[1], generator=rng)
    weight = common + 0.4 * torch.randn((heads, features.shape[1]), generator=rng)
    levels = torch.linspace(0.4, 0.85, heads)
    sample = features[torch.randperm(len(features), generator=rng)[:20000]]
    thresholds = torch.stack([(sample @ w).quantile(q) for w, q in zip(weight, levels, strict=True)])
    return 2 * weight, -2 * thresholds


def _perturbed(state: dict[str, torch.Tensor], fold: int) -> dict[str, torch.Tensor]:
    """Return the weights of one fold: alike, but not equal."""
    rng = torch.Generator().manual_seed(fold)
    shared = {v.data_ptr(): torch.randn(v.shape, generator=rng) for v in state.values()}
    return {k: v + (0.03 * shared[v.data_ptr()] if fold else 0) for k, v in state.items()}


def _save_checkpoint(folder: Path, spec: ModelSpec, fold: int | str, weights: dict[str, torch.Tensor]) -> None:
    """Store what nnUNetTrainer.save_checkpoint stores, without optimizer."""
    folder.mkdir()
    init_args = {"plans": spec.plans(), "configuration": spec.configuration, "fold": fold}
    checkpoint = {
        "network_weights": weights,
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float32(0.5)], "ema_fg_dice": [np.float64(0.5)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {**init_args, "dataset_json": spec.dataset_json(), "device": torch.device("cpu")},
        "trainer_name": spec.trainer,
        "inference_allowed_mirroring_axes": spec.mirror_axes,
    }
    torch.save(checkpoint, folder / "checkpoint_final.pth")
