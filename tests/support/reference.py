"""Slow twins of the fast paths, as close to stock nnU-Net's own calls as can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from numpy.typing import NDArray


def half_of(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Round once, ties to even: numpy converts float64 directly, torch goes by way of float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16)


def accumulate(window: torch.Tensor, tile: torch.Tensor, importance: torch.Tensor, origin: Sequence[int]) -> None:
    """Stock's two lines: the tile's dtype decides where halves are rounded."""
    place = tuple(slice(start, start + size) for start, size in zip(origin, importance.shape, strict=True))
    tile *= importance
    window[(slice(None), *place)] += tile


def resample(
    logits: NDArray[np.float16], shape: Sequence[int], separate_axis: int | None = None
) -> NDArray[np.float16]:
    """Stock's resampling of half logits (heads, z, y, x) with order 1, order_z 0."""
    return resample_data_or_seg(
        logits, shape, is_seg=False, axis=separate_axis, order=1, do_separate_z=separate_axis is not None, order_z=0
    )


def argmax_labels(logits: NDArray[np.floating]) -> NDArray[np.integer]:
    return logits.argmax(0)


def region_labels(logits: NDArray[np.floating], order: Sequence[int]) -> NDArray[np.uint16]:
    probabilities = torch.sigmoid(torch.from_numpy(logits).float()).numpy()
    labels = np.zeros(logits.shape[1:], np.uint16)
    for region, value in enumerate(order):
        labels[probabilities[region] > 0.5] = value
    return labels


def products_in_turn(value: NDArray[np.float64], weights: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return ((value * weights[0]) * weights[1]) * weights[2]


def product_of_weights(value: NDArray[np.float64], weights: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return value * (weights[0] * weights[1] * weights[2])


def sum_of_corners(
    volume: NDArray[np.float64],
    shape: Sequence[int],
    multiply: Callable[..., NDArray[np.float64]] = products_in_turn,
    clamp: bool = False,
) -> NDArray[np.float64]:
    """Order-1 resize of one volume as a sum over 8 corners in C order; `clamp` clamps the coordinate itself."""
    total = np.zeros(shape)
    for corner in product((0, 1), repeat=3):
        neighbours = [
            _neighbour(n_in, n_out, clamp)[bit] for n_in, n_out, bit in zip(volume.shape, shape, corner, strict=True)
        ]
        index = np.ix_(*(index for index, _ in neighbours))
        total += multiply(
            volume[index], [weight.reshape(axis) for (_, weight), axis in zip(neighbours, _AXES, strict=True)]
        )
    return total


def axis_by_axis(volume: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Order-1 resize, one axis after the other: what most libraries do."""
    for axis, n_out in enumerate(shape):
        (low, low_weight), (high, high_weight) = _neighbour(volume.shape[axis], n_out, False)
        weights = [weight.reshape(_AXES[axis]) for weight in (low_weight, high_weight)]
        volume = volume.take(low, axis) * weights[0] + volume.take(high, axis) * weights[1]
    return volume


_AXES = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))


def _neighbour(n_in: int, n_out: int, clamp: bool) -> list[tuple[NDArray[np.integer], NDArray[np.float64]]]:
    coordinate = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    if clamp:
        coordinate = np.clip(coordinate, 0, n_in - 1)
    floor = np.floor(coordinate).astype(int)
    fraction = coordinate - floor
    return [(np.clip(floor, 0, n_in - 1), 1.0 - fraction), (np.clip(floor + 1, 0, n_in - 1), fraction)]


def cuts(length: int, places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split [0, length) at the given places (any order, any number, out of range ignored)."""
    inner = sorted({place for place in places if 0 < place < length})
    yield from zip([0, *inner], [*inner, length], strict=True)
