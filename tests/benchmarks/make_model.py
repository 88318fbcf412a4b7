"""Write a model folder with a network so small that it does not hide the rest: two stages of 8 and 16 features.

    python make_model.py models/heads15 --heads 15 --patch 96

A real nnU-Net folder (plans, data set, one checkpoint per fold), made by nnU-Net's own network builder. Each fold is
fitted for some steps to layers of the bundled CT's smoothed intensity, so that its label maps have areas with smooth
boundaries instead of noise. (Anatomical labels are beyond so small a network: it would call everything background.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from scipy.ndimage import gaussian_filter
from torch import nn

import nnunet_lowmem

DATA = Path(nnunet_lowmem.__file__).parent / "data"
CONFIGURATION = "3d_fullres"
CROP = 64
LAYERS = torch.tensor([-1.5, -0.2, 0.3, 0.8, 1.5, 2.5, 4.0])
VISIBLE = len(LAYERS) + 1


def plans_of(patch: int, spacing: float) -> dict[str, Any]:
    """Return the bundled model's plans with another patch, spacing and a smaller network."""
    plans = json.loads((DATA / "ct118" / "plans.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    configuration.update(patch_size=[patch] * 3, spacing=[spacing] * 3)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=2,
        features_per_stage=[8, 16],
        kernel_sizes=[[3, 3, 3]] * 2,
        strides=[[1, 1, 1], [2, 2, 2]],
        n_conv_per_stage=[1, 1],
        n_conv_per_stage_decoder=[1],
    )
    return plans


def dataset_of(heads: int, regions: bool) -> dict[str, Any]:
    """Return dataset.json; regions have no head for the background, and each of them holds the last label, too."""
    common = {"channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".nii.gz"}
    if not regions:
        return common | {"labels": {"background": 0} | {f"label_{value}": value for value in range(1, heads)}}
    values = range(1, heads + 1)
    labels = {"background": 0} | {f"region_{value}": [value, heads] for value in values[:-1]} | {"last": heads}
    return common | {"labels": labels, "regions_class_order": [*values]}


def build_network(plans: dict[str, Any], heads: int) -> nn.Module:
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        heads,
        deep_supervision=False,
    )


def resampled(file: Path, spacing: float) -> np.ndarray:
    image = sitk.ReadImage(str(file))
    shape = [int(size * step / spacing) for size, step in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    args = (sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [spacing] * 3, image.GetDirection(), 0.0)
    return sitk.GetArrayFromImage(sitk.Resample(image, shape, *args))


def normalised(ct: np.ndarray, plans: dict[str, Any]) -> np.ndarray:
    """Return the CT as nnU-Net's CTNormalization gives it."""
    stats = plans["foreground_intensity_properties_per_channel"]["0"]
    clipped = np.clip(ct.astype(np.float32), stats["percentile_00_5"], stats["percentile_99_5"])
    return (clipped - stats["mean"]) / stats["std"]


def layers(crop: torch.Tensor) -> torch.Tensor:
    """Return labels that a network of such a small field of view can learn: layers of the smoothed intensity.

    In units of the crop's own mean and deviation, because instance normalisation leaves the network nothing else.
    Air and fat fall into the lowest layer, dense bone into the highest.
    """
    smooth = torch.from_numpy(gaussian_filter(crop.numpy(), 2.0))
    return torch.bucketize((smooth - smooth.mean()) / (smooth.std() + 1e-3), LAYERS)


def fit(network: nn.Module, image: torch.Tensor, steps: int, seed: int) -> float:
    """Fit on random crops of shape (64, 64, 64); return the mean loss of the last quarter."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    losses = []
    for _ in range(steps):
        corner = [int(rng.integers(0, size - CROP + 1)) for size in image.shape]
        crop = image[tuple(slice(start, start + CROP) for start in corner)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(crop[None, None]), layers(crop)[None])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-steps // 4 :]))


def with_heads(fitted: nn.Module, plans: dict[str, Any], heads: int) -> nn.Module:
    """Return the network with more heads: the fitted ones spread over them, the others like these but far below.

    So do most classes behave in any one place of a real map.
    """
    network = build_network(plans, heads)
    weights = fitted.state_dict()
    count = min(heads, VISIBLE)
    visible, shown = (np.linspace(0, last, count).round().astype(int) for last in (heads - 1, VISIBLE - 1))
    for name in [name for name in weights if "seg_layers" in name]:
        old = weights[name]
        new = old[torch.arange(heads) % VISIBLE] * 0.5
        if name.endswith("bias"):
            new -= 8 + torch.rand(heads)
        new[visible] = old[shown]
        weights[name] = new
    network.load_state_dict(weights)
    return network


def save_fold(folder: Path, network: nn.Module, plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": CONFIGURATION, "fold": 0, "dataset_json": dataset, "plans": plans},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "checkpoint_final.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=15)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--spacing", type=float, default=1.5)
    parser.add_argument("--ending", default=".nii.gz", help="of images and label maps (default: %(default)s)")
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--regions", action="store_true", help="as many regions instead of labels")
    parser.add_argument("--steps", type=int, default=200, help="of fitting, per fold")
    args = parser.parse_args()
    if args.heads < 2:
        parser.error(f"--heads {args.heads}: at least 2")
    plans, dataset = plans_of(args.patch, args.spacing), dataset_of(args.heads, args.regions)
    image = torch.from_numpy(normalised(resampled(DATA / "ct_abdomen_3mm.nii.gz", args.spacing), plans))
    for fold in range(args.folds):
        torch.manual_seed(fold)
        fitted = build_network(plans, VISIBLE)
        print(f"fold {fold}: loss {fit(fitted, image, args.steps, fold):.3f}")
        save_fold(args.folder / f"fold_{fold}", with_heads(fitted, plans, args.heads), plans, dataset)
    (args.folder / "plans.json").write_text(json.dumps(plans, indent=1))
    dataset["file_ending"] = args.ending
    (args.folder / "dataset.json").write_text(json.dumps(dataset, indent=1))


if __name__ == "__main__":
    main()
