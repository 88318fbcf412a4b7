"""Compiled CPU kernels that accumulate tiles in half precision.

Arrays of halves are their ``uint16`` bits (see `halves`). No kernel uses ``fastmath``: the order of operations is what
makes the results equal to stock nnU-Net's. All work on a range of rows, so that a thread pool can share the work; none
starts threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.network.kernels import widen
from nnunet_lowmem.system.compiler import jit
from nnunet_lowmem.window.halves import half_to_single, single_to_half

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
        head, plane = divmod(flat, planes)
        for row in range(rows):
            target = window[head, origin[0] + plane, origin[1] + row, origin[2] : origin[2] + columns]
            source = tile[head, plane, row]
            weight = importance[plane, row]
            for column in range(columns):
                target[column] = single_to_half(half_to_single(target[column]) + source[column] * weight[column])


@jit
def divide(
    window: NDArray[np.uint16],
    weight_sum: NDArray[np.uint16],
    origin: tuple[int, int, int],
    shape: tuple[int, int, int],
    finite: NDArray[np.bool_],
    row_start: int,
    row_stop: int,
) -> None:
    """Divide a box of the half-precision `window` by the weights of its voxels, rounding as torch's ``half / half``.

    Parameters
    ----------
    window : uint16 bits of halves, shape (heads, a, b, c)
    weight_sum : uint16 bits of halves, shape (a, b, c)
    origin, shape : int, 3
        Of the box in the window.
    finite : bool, shape (heads * shape[0],)
        Of each plane: set to False where a quotient is infinite or NaN.
    row_start, row_stop : int
        Range of the flattened (head, plane) planes of the box to divide.
    """
    for flat in range(row_start, row_stop):
        head, plane = divmod(flat, shape[0])
        largest = np.uint16(0)
        for row in range(shape[1]):
            first, last = origin[2], origin[2] + shape[2]
            target = window[head, origin[0] + plane, origin[1] + row, first:last]
            weight = weight_sum[origin[0] + plane, origin[1] + row, first:last]
            for column in range(shape[2]):
                # of numpy, since Python's operator raises ZeroDivisionError
                quotient = single_to_half(np.divide(half_to_single(target[column]), half_to_single(weight[column])))
                target[column] = quotient
                largest = max(largest, np.uint16(quotient & 0x7FFF))
        finite[flat] = largest < 0x7C00


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
def accumulate_head_of_bits(
    window: NDArray[np.uint16],
    bits: NDArray[np.uint16],
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    importance: NDArray[np.float32],
    origin: tuple[int, int, int],
    plane_start: int,
    plane_stop: int,
) -> None:
    """As `accumulate_head`, of the bits of bfloat16 features, shape (d, e, f, channels)."""
    _, rows, columns, channels = bits.shape
    features = np.empty((1, rows, columns, channels), np.float32)
    for plane in range(plane_start, plane_stop):
        for row in range(rows):
            widen(bits[plane, row], features[0, row], 0, columns)
        first = (origin[0] + plane, origin[1], origin[2])
        accumulate_head(window, features, weights, bias, importance[plane : plane + 1], first, 0, 1)
