"""How much of a prediction is not the network: (wall - forward passes) / wall, with a network of realistic size.

    THP_MEM_ALLOC_ENABLE=1 python overhead.py work [--fast [bfloat16]] [--mirror] [--denormal] [--shape 512 512 250]

Six stages of 32 to 320 features, patch 128, 15 heads, random weights but for heads that tell quarters of the intensity
apart; the bundled CT at 0.8x0.8x2 mm, at 1.5 mm eight tiles, or 80 of the whole shape. With `--denormal` half of the
weights of every convolution are so small that float32
has no normal number for them, as where training with weight decay has switched filters off.

What a tile takes is timed around `TileNetwork.predict`, its mirrored copies and their mean included: hooks would make
the network one that is run as in stock. The memory that a tile takes is measured on the first one, so there are as many
passes as tiles; those that come on top, if any, come first, and count as overhead in the figure that is called strict.
A tile that need not be computed again is still a pass, of no time.

The commands have torch ask for huge pages, and this script does not, for it would have to before torch is imported:
hence the variable.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import SimpleITK as sitk  # noqa: N813
import torch
from make_case import make_case
from make_model import DATA, build_network, dataset_of, normalised, plans_of, resampled, save_fold
from torch import nn

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.predict.logits import TileNetwork

HEADS = 15
PATCH = 128
CROP = 64
# float32's least normal number is 1.2e-38
DENORMAL = 1e-40


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


def make_denormal(network: nn.Module) -> None:
    """Bring half of the weights of every convolution down to some `DENORMAL`, whichever chance takes."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            weight = layer.weight.data
            weight[torch.rand_like(weight) < 0.5] *= DENORMAL / weight.std().item()


def fit_head(network: nn.Module, plans: dict[str, Any]) -> None:
    """Let the first four heads tell quarters of the smoothed intensity apart, by least squares on a crop of the CT.

    With random heads every second voxel would lie between two labels, which no arithmetic keeps apart.
    """
    ct = torch.from_numpy(normalised(resampled(DATA / "ct_abdomen_3mm.nii.gz", 1.5), plans))
    middle = [(size - CROP) // 2 for size in ct.shape]
    crop = ct[tuple(slice(start, start + CROP) for start in middle)][None, None].contiguous()
    smooth = nn.functional.avg_pool3d(crop, 5, 1, 2).flatten()
    quarters = torch.bucketize(smooth, torch.quantile(smooth[::7], torch.tensor([0.25, 0.5, 0.75])))
    head: Any = network.get_submodule("decoder.seg_layers")[-1]  # type: ignore[index]  # a list of layers
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network.eval()(crop)
    handle.remove()
    features = torch.cat((seen[0][0].flatten(1), torch.ones(1, smooth.numel()))).double()
    targets = nn.functional.one_hot(quarters, 4).double()
    ridge = 1e-3 * smooth.numel() * torch.eye(len(features), dtype=torch.double)
    fitted = torch.linalg.solve(features @ features.T + ridge, features @ targets).float()
    head.weight.data.zero_()
    head.bias.data.fill_(-10)
    head.weight.data[:4] = fitted[:-1].T.reshape(4, -1, 1, 1, 1)
    head.bias.data[:4] = fitted[-1]


def write_inputs(work: Path, shape: list[int], denormal: bool) -> tuple[Path, Path]:
    """Write the model and the image unless they are there; return their folders."""
    model = work / ("model_denormal" if denormal else "model")
    images = work / f"images_{'x'.join(map(str, shape))}"
    if not model.exists():
        torch.manual_seed(0)
        plans, dataset = realistic_plans(), dataset_of(HEADS, regions=False)
        network = build_network(plans, HEADS)
        if denormal:
            make_denormal(network)
        fit_head(network, plans)
        save_fold(model / "fold_0", network, plans, dataset)
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
    if not images.exists():
        images.mkdir(parents=True)
        sitk.WriteImage(make_case(shape, [0.8, 0.8, 2.0]), str(images / "ct_0000.nii.gz"))
    return model, images


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Give a list that gets the seconds of every tile in the block."""
    passes_s: list[float] = []
    predict = TileNetwork.predict

    def timed(network: TileNetwork, tile: torch.Tensor) -> torch.Tensor:
        start_s = time.perf_counter()
        predicted = predict(network, tile)
        passes_s.append(time.perf_counter() - start_s)
        return predicted

    with mock.patch.object(TileNetwork, "predict", timed):
        yield passes_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--fast", nargs="?", const=True, default=False, choices=("bfloat16",))
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--denormal", action="store_true", help="half of the weights are denormal numbers")
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 300, 130], help="x y z of the image")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    model, images = write_inputs(options.work, options.shape, options.denormal)
    stages: dict[str, float] = {}
    totals: dict[str, int] = {}
    predictor = LowMemPredictor(
        device=torch.device("cpu"),
        use_mirroring=options.mirror,
        on_case=lambda report: stages.update(report.seconds),
        on_progress=lambda progress: totals.update({progress.stage: progress.total}),
        fast=options.fast,
    )
    start_s = time.perf_counter()
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    with timed_passes() as passes_s:
        predictor.predict_from_files(str(images), str(options.work / "out"))
    wall_s = time.perf_counter() - start_s
    tiles = totals["prediction"]
    further = max(0, len(passes_s) - tiles)
    tiles_s, further_s = sum(passes_s[further:]), sum(passes_s[:further])
    print(f"{len(passes_s)} passes for {tiles} tiles, {tiles_s:.1f} s of {wall_s:.1f} s")
    print(f"{further} passes for no tile, {further_s:.1f} s")
    print("stages: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()))
    print(f"overhead {1 - (tiles_s + further_s) / wall_s:.1%}; strict {1 - tiles_s / wall_s:.1%}")


if __name__ == "__main__":
    main()
