"""Compiled CPU kernels on half-precision arrays: accumulate tiles, interpolate a head.

Arrays of halves are their ``uint16`` bits (see `halves`). No kernel uses ``fastmath``: the order of operations is what
makes the results equal to stock nnU-Net's. All work on a range of rows, so that a thread pool can share the work; none
starts threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.halves import double_to_half_key, half_to_single, jit, key_to_half, single_to_half

_BLOCK_ROWS = 8


@jit
def accumulate(
    window: NDArray[np.uint16],
    tile: NDArray[np.float32],
    importance: NDArray[np.float32],
    origin: tuple[int, int, int],
    row_start: int,
    row_stop: int,
) -> None:
    """Add ``tile * importance`` to the half-precision `window`, rounding as torch's ``half += float32`` does.

    Parameters
    ----------
    window : uint16 bits of halves, shape (heads, a, b, c)
    tile : float32, shape (heads, d, e, f)
    importance : float32, shape (d, e, f)
    origin : int, 3
        Where the tile starts in the window.
    row_start, row_stop : int
        Range of the flattened (head, d) planes of the tile to add.
    """
    planes, rows, columns = importance.shape
    for flat in range(row_start, row_stop):
        head = flat // planes
        plane = flat % planes
        for row in range(rows):
            target = window[head, origin[0] + plane, origin[1] + row, origin[2] : origin[2] + columns]
            source = tile[head, plane, row]
            weight = importance[plane, row]
            for column in range(columns):
                target[column] = single_to_half(half_to_single(target[column]) + source[column] * weight[column])


@jit
def accumulate_head(
    window: NDArray[np.uint16],
    features: NDArray[np.float32],
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    importance: NDArray[np.float32],
    origin: tuple[int, int, int],
    plane_start: int,
    plane_stop: int,
) -> None:
    """Add ``(weights @ features + bias) * importance`` to the half-precision `window`, row by row.

    Parameters
    ----------
    window : uint16 bits of halves, shape (heads, a, b, c)
    features : float32, shape (d, e, f, channels)
    weights : float32, shape (heads, channels)
    bias : float32, shape (heads,)
    importance : float32, shape (d, e, f)
    origin : int, 3
        Where the tile starts in the window.
    plane_start, plane_stop : int
        Range of the planes of the tile to add.
    """
    _, rows, columns = importance.shape
    heads, channels = weights.shape
    # a few rows of all channels stay in the cache for all heads
    block = np.empty((_BLOCK_ROWS, channels, columns), np.float32)
    logits = np.empty(columns, np.float32)
    for plane in range(plane_start, plane_stop):
        for first in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - first)
            for row in range(count):
                block[row] = features[plane, first + row].T
            for head in range(heads):
                for row in range(count):
                    logits[:] = bias[head]
                    for channel in range(channels):
                        scale = weights[head, channel]
                        source = block[row, channel]
                        for column in range(columns):
                            logits[column] += scale * source[column]
                    y = origin[1] + first + row
                    target = window[head, origin[0] + plane, y, origin[2] : origin[2] + columns]
                    weight = importance[plane, first + row]
                    for column in range(columns):
                        total = half_to_single(target[column]) + logits[column] * weight[column]
                        target[column] = single_to_half(total)


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


@jit
def interpolate(
    logits: NDArray[np.uint16],
    head: int,
    corner_rows: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    x0: int,
    x1: int,
    wx0: float,
    wx1: float,
) -> np.int16:
    """Key of the interpolated logit; corners in C order, each ((v * w0) * w1) * w2, plain additions (scipy's order)."""
    z0, z1, y0, y1 = corner_rows
    wz0, wz1, wy0, wy1 = weights
    r00, r01, r10, r11 = logits[head, z0, y0], logits[head, z0, y1], logits[head, z1, y0], logits[head, z1, y1]
    total = ((np.float64(half_to_single(r00[x0])) * wz0) * wy0) * wx0
    total += ((np.float64(half_to_single(r00[x1])) * wz0) * wy0) * wx1
    total += ((np.float64(half_to_single(r01[x0])) * wz0) * wy1) * wx0
    total += ((np.float64(half_to_single(r01[x1])) * wz0) * wy1) * wx1
    total += ((np.float64(half_to_single(r10[x0])) * wz1) * wy0) * wx0
    total += ((np.float64(half_to_single(r10[x1])) * wz1) * wy0) * wx1
    total += ((np.float64(half_to_single(r11[x0])) * wz1) * wy1) * wx0
    total += ((np.float64(half_to_single(r11[x1])) * wz1) * wy1) * wx1
    return double_to_half_key(total)  # type: ignore[no-any-return]  # numba has no types


@jit
def resample_rows(
    logits: NDArray[np.uint16],
    index: tuple[NDArray[np.int32], ...],
    weight: tuple[NDArray[np.float64], ...],
    out: NDArray[np.uint16],
    row_start: int,
    row_stop: int,
) -> None:
    """Interpolate one head, shape (1, a, b, c), onto the whole output grid `out`, shape (z, y, x); both uint16 bits.

    The other parameters are as in `label_rows`.
    """
    rows = out.shape[1]
    for flat in range(row_start, row_stop):
        z = flat // rows
        y = flat % rows
        corner_rows = (index[0][z], index[1][z], index[2][y], index[3][y])
        weights = (weight[0][z], weight[1][z], weight[2][y], weight[3][y])
        for x in range(out.shape[2]):
            key = interpolate(
                logits, 0, corner_rows, weights, index[4][x], index[5][x], weight[4][x], weight[5][x]
            )  # fmt: skip
            out[z, y, x] = key_to_half(key)
