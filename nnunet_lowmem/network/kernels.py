"""Compiled CPU kernels of a normalisation that leaves the channels last; same conventions as in `window.kernels`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.system.compiler import jit


@jit
def channel_sums(features: NDArray[np.float32], sums: NDArray[np.float64], part_start: int, part_stop: int) -> None:
    """Sum each channel and its squares, part by part.

    Parameters
    ----------
    features : float32, shape (voxels, channels)
    sums : float64, shape (parts, 2, channels)
        Gets the sum and the sum of squares of every part.
    part_start, part_stop : int
        Range of the parts.
    """
    voxels, channels = features.shape
    parts = len(sums)
    for part in range(part_start, part_stop):
        total, squares = np.zeros(channels), np.zeros(channels)
        for voxel in range(part * voxels // parts, (part + 1) * voxels // parts):
            for channel in range(channels):
                value = np.float64(features[voxel, channel])
                total[channel] += value
                squares[channel] += value * value
        sums[part, 0], sums[part, 1] = total, squares


@jit
def scale_and_bend(
    features: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    slope: np.float32,
    voxel_start: int,
    voxel_stop: int,
) -> None:
    """Replace x by ``x * scale + shift``, times `slope` where that is negative.

    Parameters
    ----------
    features : float32, shape (voxels, channels)
    scale, shift : float32, shape (channels,)
    slope : float32
    voxel_start, voxel_stop : int
        Range of the voxels.
    """
    for voxel in range(voxel_start, voxel_stop):
        for channel in range(features.shape[1]):
            value = features[voxel, channel] * scale[channel] + shift[channel]
            features[voxel, channel] = value if value > 0 else value * slope
