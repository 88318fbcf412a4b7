"""Runs every kernel once on a few voxels, so that what compilers take counts as reserved and not as a case's."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import nn

from nnunet_lowmem.boxes import whole
from nnunet_lowmem.labels import cells_cpu
from nnunet_lowmem.labels.labeller import Labelling, LabelMap, SlabLabeller
from nnunet_lowmem.labels.resampling import flat_tables, resampling_tables
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.network import denormals, tile_memory
from nnunet_lowmem.network.exact import add_flipped
from nnunet_lowmem.network.fast_layers import FastNorm
from nnunet_lowmem.network.fast_network import Head
from nnunet_lowmem.network.kernels import channels_first
from nnunet_lowmem.preprocessing import spline
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.window.rolling import RollingWindow
from nnunet_lowmem.window.tiling import tile_grid


@cache
def warm_up(ranked: bool, label_type: str, dimensions: int, fast: bool = False) -> None:
    """Load or compile the kernels that a model of this kind needs; does nothing the second time."""
    tile_memory.warm_up(dimensions)
    spline.matches_scipy()
    grid = tile_grid((4, 4, 4), (4, 4, 4), 0.5)
    labels = np.zeros((7, 7, 7), label_type)
    rule = LabelRule(ranked, np.arange(3, dtype=np.uint16), labels.dtype)
    with RowThreads(1) as threads:
        window = RollingWindow(grid, 2, torch.ones(grid.tile_shape, dtype=torch.half, device="cpu"), threads)
        window.add(_voxels((2, *grid.tile_shape)), (0, 0, 0))
        tensor = _voxels((1, 2, *grid.tile_shape))
        denormals.count(tensor)
        add_flipped(tensor, tensor.clone(), (2,), threads)
        threads.run(channels_first, 1, np.zeros((8, 2), np.float32), np.empty((2, 8), np.float32))
        if fast:
            norm = nn.InstanceNorm3d(2, dtype=torch.float32, device="cpu")
            window.restart(Head(np.zeros((2, 1), np.float32), np.zeros(2, np.float32)))
            for features in (_voxels((1, 2, *grid.tile_shape)), _voxels((1, 2, *grid.tile_shape)).to(torch.bfloat16)):
                last = features.contiguous(memory_format=torch.channels_last_3d)
                FastNorm(norm, 0.01, False, threads)(last)
                add_flipped(last.float(), last, (2,), threads)
                window.add(features[0, :1].clone(), (0, 0, 0))
        tables = resampling_tables((4, 4, 4), (6, 6, 6), None)
        # probabilities, and heads that have to be whole
        head, out = np.zeros((1, 4, 4, 4), np.uint16), np.empty((6, 6, 6), np.uint16)
        threads.run(cells_cpu.resample_rows, 36, head, *flat_tables(tables), out)
        slab = window.finish(4)
        assert slab is not None, "its planes are asked for"
        for target in (labels[1:, 1:, 1:], np.zeros((6, 6, 6), label_type)):  # cropped, and not: other memory layouts
            labeller = SlabLabeller(tables, Labelling(rule, threads), LabelMap(target), whole(target.shape))
            labeller.add(slab)
            labeller.finish()


def _voxels(shape: tuple[int, ...]) -> torch.Tensor:
    """Return numbers that differ, and leave torch's random state, types and devices alone: these are the program's."""
    size = math.prod(shape)
    return torch.from_numpy(np.linspace(0, 1, size, dtype=np.float32).reshape(shape))
