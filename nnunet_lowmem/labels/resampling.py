"""Where every output voxel of a resampling comes from: the rule of nnU-Net's default function, order 1.

``skimage.transform.resize(order=1, mode="edge", anti_aliasing=False)`` ends in ``scipy.ndimage.zoom(grid_mode=True,
mode="nearest")``. Along each axis output position ``o`` reads from coordinate ``(o + 0.5) * (n_in / n_out) - 0.5``. The
coordinate itself is not clamped, so the weights at the border are those of the unclamped position; only the two indices
are. With a separate z axis nnU-Net interpolates in the plane and takes the nearest slice along the axis, ties upwards
(``scipy.ndimage.map_coordinates(order=0, mode="nearest")``).

Both are the same thing here, a table of two neighbours and two weights per axis, so one kernel serves all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.types import Shape3


@dataclass(frozen=True)
class AxisTable:
    """Neighbours and weights of the output positions of one axis.

    Attributes
    ----------
    low, high : int32, shape (positions,)
        The two input positions; both rise monotonically.
    weight_low, weight_high : float64, shape (positions,)
        Their weights, both in [0, 1].
    """

    low: NDArray[np.int32]
    high: NDArray[np.int32]
    weight_low: NDArray[np.float64]
    weight_high: NDArray[np.float64]

    @property
    def interpolates(self) -> bool:
        """Whether any position mixes two inputs; otherwise each copies one."""
        return bool(np.any(self.low != self.high))

    def ready(self, planes: int) -> int:
        """Count the output positions that need none but the first `planes` input positions."""
        return int(np.searchsorted(self.high, planes))

    def part(self, start: int, stop: int, offset: int) -> AxisTable:
        """Positions [start, stop), with input positions counted from `offset`."""
        shift = np.int32(offset)
        return AxisTable(
            self.low[start:stop] - shift,
            self.high[start:stop] - shift,
            self.weight_low[start:stop],
            self.weight_high[start:stop],
        )

    @cached_property
    def cells(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """The distinct neighbour pairs: low and high, each (cells,), and their first positions, (cells + 1,)."""
        changes = np.flatnonzero((np.diff(self.low) != 0) | (np.diff(self.high) != 0)) + 1
        first = np.concatenate(([0], changes)).astype(np.int32)
        return self.low[first], self.high[first], np.append(first, np.int32(self.low.size))


def linear_axis(n_in: int, n_out: int) -> AxisTable:
    """Table of linear interpolation from `n_in` to `n_out` positions (scipy's ``grid_mode``, edges repeated)."""
    if n_in == n_out:
        return copy_axis(np.arange(n_in))
    coordinate = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    floor = np.floor(coordinate)
    fraction = coordinate - floor
    low = np.clip(floor, 0, n_in - 1).astype(np.int32)
    high = np.clip(floor + 1, 0, n_in - 1).astype(np.int32)
    return AxisTable(low, high, 1.0 - fraction, fraction)


def nearest_axis(n_in: int, n_out: int) -> AxisTable:
    """Table that takes the nearest of `n_in` positions; a tie takes the upper one (``floor(x + 0.5)``)."""
    coordinate = (n_in / n_out) * (np.arange(n_out) + 0.5) - 0.5
    return copy_axis(np.clip(np.floor(coordinate + 0.5), 0, n_in - 1))


def copy_axis(source: NDArray[np.integer] | NDArray[np.floating]) -> AxisTable:
    """Table that copies position ``source[o]`` to output position ``o``."""
    index = source.astype(np.int32)
    return AxisTable(index, index, np.ones(index.size), np.zeros(index.size))


def resampling_tables(shape_in: Shape3, shape_out: Shape3, separate_axis: int | None) -> tuple[AxisTable, ...]:
    """Tables of nnU-Net's default resampling of logits, one per axis.

    Parameters
    ----------
    shape_in, shape_out : int, 3
        Network and cropped grid, axis order of the network.
    separate_axis : int or None
        The axis that nnU-Net resamples separately with order 0, from ``determine_do_sep_z_and_axis``.
    """
    return tuple(
        nearest_axis(n_in, n_out) if axis == separate_axis else linear_axis(n_in, n_out)
        for axis, (n_in, n_out) in enumerate(zip(shape_in, shape_out, strict=True))
    )


def flat_tables(
    tables: tuple[AxisTable, ...],
) -> tuple[tuple[NDArray[np.int32], ...], tuple[NDArray[np.float64], ...]]:
    """Return the tables as the kernels take them: (low, high) indices and weights, axis by axis, six of each."""
    index = tuple(neighbour for table in tables for neighbour in (table.low, table.high))
    weight = tuple(weights for table in tables for weights in (table.weight_low, table.weight_high))
    return index, weight
