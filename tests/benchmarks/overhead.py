"""How much of a prediction is not the network: (wall - forward passes) / wall, with a network of realistic size.

    python overhead.py work [--fast] [--mirror] [--shape 512 512 250]

Six stages of 32 to 320 features, patch 128, 15 heads, random weights; the bundled CT at 0.8x0.8x2 mm, at 1.5 mm eight
tiles, or 80 of the whole shape. The forward passes are timed by hooks inside the run. One of them is made on an empty
tile, to measure what the network takes: it is told apart, and counts as overhead in the figure that is called strict.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813
import torch
from make_case import make_case
from make_model import build_network, dataset_of, plans_of, save_fold
from torch import nn

from nnunet_lowmem import LowMemPredictor

HEADS = 15
PATCH = 128


def realistic_plans() -> dict[str, Any]:
    plans = plans_of(PATCH, 1.5)
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        n_stages=6,
        features_per_stage=[32, 64, 128, 256, 320, 320],
        kernel_sizes=[[3, 3, 3]] * 6,
        strides=[[1, 1, 1], *[[2, 2, 2]] * 5],
        n_conv_per_stage=[2] * 6,
        n_conv_per_stage_decoder=[2] * 5,
    )
    return plans


def write_inputs(work: Path, shape: list[int]) -> tuple[Path, Path]:
    """Write the model and the image unless they are there; return their folders."""
    model, images = work / "model", work / f"images_{shape[-1]}"
    if not model.exists():
        torch.manual_seed(0)
        plans, dataset = realistic_plans(), dataset_of(HEADS, regions=False)
        save_fold(model / "fold_0", build_network(plans, HEADS), plans, dataset)
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
    if not images.exists():
        images.mkdir()
        sitk.WriteImage(make_case(shape, [0.8, 0.8, 2.0]), str(images / "ct_0000.nii.gz"))
    return model, images


def timed_passes(network: nn.Module) -> list[float]:
    """Return a list that gets the seconds of every forward pass; copies on the meta device compute nothing."""
    begun: list[float] = []
    passes_s: list[float] = []

    def end(_network: nn.Module, _tile: object, output: torch.Tensor) -> None:
        seconds = time.perf_counter() - begun.pop()
        if not output.is_meta:
            passes_s.append(seconds)

    network.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    network.register_forward_hook(end)
    return passes_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 300, 130], help="x y z of the image")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    model, images = write_inputs(options.work, options.shape)
    stages: dict[str, float] = {}
    predictor = LowMemPredictor(
        device=torch.device("cpu"),
        use_mirroring=options.mirror,
        on_case=lambda report: stages.update(report.seconds),
        fast=options.fast,
    )
    start_s = time.perf_counter()
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    passes_s = timed_passes(predictor.network)
    predictor.predict_from_files(str(images), str(options.work / "out"))
    wall_s = time.perf_counter() - start_s
    # the pass that measures runs once without a mirror, or twice with one, before the first tile
    measuring_s = sum(passes_s[: 2 if options.mirror else 1])
    network_s = sum(passes_s) - measuring_s
    print(f"{len(passes_s)} passes, {network_s:.1f} s of {wall_s:.1f} s for tiles, {measuring_s:.1f} s to measure one")
    print("stages: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()))
    print(f"overhead {1 - (network_s + measuring_s) / wall_s:.1%}; strict {1 - network_s / wall_s:.1%}")


if __name__ == "__main__":
    main()
