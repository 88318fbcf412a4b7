"""Compiled CPU kernels that work on a network's features; same conventions as in `window.kernels`.

numba has no bfloat16: arrays of such numbers are their ``uint16`` bits, which are the upper half of a float32's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.system.compiler import jit

# so many voxels are added up in single precision before their sum joins a total in double precision, or moved at once
BLOCK = 256


@jit
def bits_to_single(bits: np.uint16) -> np.float32:
    """Value of a bfloat16, given as its 16 bits, as float32 (exact)."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@jit
def single_to_bits(value: np.float32) -> np.uint16:
    """Bits of the bfloat16 nearest to a float32, ties to even; every NaN becomes the same one."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(0x7FC0) if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint16(rounded)


@jit
def count_denormals(bits: NDArray[np.uint32]) -> int:
    """Count the denormal numbers among the bits of float32 numbers, shape (n,)."""
    found = 0
    for number in range(len(bits)):
        magnitude = bits[number] & np.uint32(0x7FFFFFFF)
        found += 1 if np.uint32(0) < magnitude < np.uint32(0x00800000) else 0
    return found


@jit
def widen(bits: NDArray[np.uint16], values: NDArray[np.float32], row_start: int, row_stop: int) -> None:
    """Turn bfloat16 numbers into float32.

    Parameters
    ----------
    bits : uint16, shape (rows, columns)
    values : float32, shape (rows, columns)
    row_start, row_stop : int
        Range of the rows.
    """
    for row in range(row_start, row_stop):
        for column in range(bits.shape[1]):
            values[row, column] = bits_to_single(bits[row, column])


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
def channel_sums_of_bits(bits: NDArray[np.uint16], sums: NDArray[np.float64], part_start: int, part_stop: int) -> None:
    """As `channel_sums`, of bfloat16 numbers less the first of their channel, so that equal numbers sum to zero.

    Parameters
    ----------
    bits : uint16, shape (voxels, channels)
    sums : float64, shape (parts, 2, channels)
        Gets the sum and the sum of squares of every part.
    part_start, part_stop : int
        Range of the parts.
    """
    voxels, channels = bits.shape
    parts = len(sums)
    first = np.empty(channels, np.float32)
    for channel in range(channels):
        first[channel] = bits_to_single(bits[0, channel])
    total, squares = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for part in range(part_start, part_stop):
        sums[part] = 0.0
        stop = (part + 1) * voxels // parts
        for start in range(part * voxels // parts, stop, BLOCK):
            total[:], squares[:] = np.float32(0), np.float32(0)
            for voxel in range(start, min(start + BLOCK, stop)):
                for channel in range(channels):
                    value = bits_to_single(bits[voxel, channel]) - first[channel]
                    total[channel] += value
                    squares[channel] += value * value
            for channel in range(channels):
                sums[part, 0, channel] += total[channel]
                sums[part, 1, channel] += squares[channel]


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
def scale_and_bend_bits(
    bits: NDArray[np.uint16],
    centre: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    slope: np.float32,
    voxel_start: int,
    voxel_stop: int,
) -> None:
    """Replace bfloat16 numbers x by ``(x - centre) * scale + shift``, times `slope` where that is negative.

    Computed in single precision and rounded once; next to a centre that is one of the numbers little is lost.

    Parameters
    ----------
    bits : uint16, shape (voxels, channels)
    centre, scale, shift : float32, shape (channels,)
    slope : float32
    voxel_start, voxel_stop : int
        Range of the voxels.
    """
    for voxel in range(voxel_start, voxel_stop):
        for channel in range(bits.shape[1]):
            value = (bits_to_single(bits[voxel, channel]) - centre[channel]) * scale[channel] + shift[channel]
            bits[voxel, channel] = single_to_bits(value if value > 0 else value * slope)


@jit
def add_flipped(
    total: NDArray[np.float32],
    added: NDArray[np.float32],
    flips: tuple[bool, bool, bool, bool],
    row_start: int,
    row_stop: int,
) -> None:
    """Add one array to another along flipped axes, without a flipped copy.

    Parameters
    ----------
    total, added : float32, shape (a, b, c, d)
    flips : bool, 4
        Which axes of `added` are read backwards.
    row_start, row_stop : int
        Range of the flattened (a, b) rows.
    """
    first, second, third, fourth = total.shape
    for row in range(row_start, row_stop):
        i, j = divmod(row, second)
        source = added[first - 1 - i if flips[0] else i, second - 1 - j if flips[1] else j]
        target = total[i, j]
        for k in range(third):
            values = source[third - 1 - k if flips[2] else k]
            sums = target[k]
            if flips[3]:
                for column in range(fourth):
                    sums[column] += values[fourth - 1 - column]
            else:
                for column in range(fourth):
                    sums[column] += values[column]


@jit
def add_flipped_bits(
    total: NDArray[np.float32],
    added: NDArray[np.uint16],
    flips: tuple[bool, bool, bool, bool],
    row_start: int,
    row_stop: int,
) -> None:
    """As `add_flipped`, where the array that is added holds the bits of bfloat16 numbers.

    Parameters
    ----------
    total : float32, shape (a, b, c, d)
    added : uint16, shape (a, b, c, d)
    flips : bool, 4
    row_start, row_stop : int
        Range of the flattened (a, b) rows.
    """
    first, second, third, fourth = total.shape
    plane = np.empty((1, 1, third, fourth), np.float32)
    inner = (False, False, flips[2], flips[3])
    for row in range(row_start, row_stop):
        i, j = divmod(row, second)
        widen(added[first - 1 - i if flips[0] else i, second - 1 - j if flips[1] else j], plane[0, 0], 0, third)
        add_flipped(total[i : i + 1, j : j + 1], plane, inner, 0, 1)


@jit
def channels_first(features: NDArray[np.float32], out: NDArray[np.float32], block_start: int, block_stop: int) -> None:
    """Put channels that come last first.

    Parameters
    ----------
    features : float32, shape (voxels, channels)
    out : float32, shape (channels, voxels)
    block_start, block_stop : int
        Range of the blocks of `BLOCK` voxels.
    """
    voxels, channels = features.shape
    for block in range(block_start, block_stop):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, voxels)
        for channel in range(channels):
            for voxel in range(start, stop):
                out[channel, voxel] = features[voxel, channel]
