"""A part of a case: a box of the output grid, and what of the case it needs.

The tiles of a part are tiles of the whole case, in the same order, and its voxels are interpolated from the same
neighbours: each gets the label that it has in a whole run, bit by bit. A whole case is the part that is everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import along_last, common, whole
from nnunet_lowmem.labels.resampling import AxisTable, linear_axis
from nnunet_lowmem.labels.rules import CaseGeometry, LogitsResampling
from nnunet_lowmem.types import Box, Shape3, Wanted, shape3
from nnunet_lowmem.window.tiling import TileGrid


@dataclass(frozen=True)
class Part:
    """What is computed of a case, axes of the network.

    Attributes
    ----------
    grid : TileGrid
        The tiles.
    geometry : CaseGeometry
        Of the box: its shapes, and where in it something is labelled.
    resampling : LogitsResampling
        From the box of the network grid to that of the cropped one.
    frame : 3 slices
        Of the original grid: what is given back.
    crop : 3 slices
        Where in the frame something is labelled at most.
    network : 3 slices
        Of the network grid: what shows that; a voxel where there is nothing.
    tiles_of_case : int
        How many tiles the whole case has.
    mask : bool, shape of the frame, or None
        Where something is labelled.
    needs_all : bool
        All of the case is computed, since its logits are needed as a whole: the frame is cut out at the end.
    """

    grid: TileGrid
    geometry: CaseGeometry
    resampling: LogitsResampling
    frame: Box
    crop: Box
    network: Box
    tiles_of_case: int
    mask: NDArray[np.bool_] | None = None
    needs_all: bool = False

    @property
    def shape(self) -> Shape3:
        """Of the frame."""
        return _shape(self.frame)

    @property
    def is_cut(self) -> bool:
        """Whether the frame is cut out at the end."""
        return self.needs_all and self.shape != self.geometry.original_shape

    def along(self, axis: int) -> Part:
        """Return the part with a window that rolls along an axis: that of the whole of which it is a box."""
        return replace(self, grid=replace(self.grid, rolls=axis))

    def framed(self, values: NDArray[Any], outside: float = 0) -> NDArray[Any]:
        """Return what of `values` is asked for, `outside` beyond the mask; may change them."""
        if self.is_cut and values.shape != self.shape:
            values = np.array(values[self.frame])
        if self.mask is not None:
            for plane, inside in zip(values, self.mask, strict=True):
                plane[~inside] = outside
        return values


def part_of(
    grid: TileGrid,
    geometry: CaseGeometry,
    resampling: LogitsResampling,
    wanted: Wanted | None,
    as_a_whole: bool = False,
    within: Box | None = None,
) -> Part:
    """Return the part that is wanted of a case.

    Parameters
    ----------
    grid : TileGrid
        All tiles of the case.
    geometry, resampling
        Of the whole case.
    wanted : Wanted or None
        None is everything.
    as_a_whole : bool
        All logits are needed, whatever is wanted. They are, too, where the resampling is not known as tables.
    within : 3 slices or None
        Only this box of the frame is labelled now.
    """
    needs_all = as_a_whole or resampling.tables is None or not resampling.per_head
    if wanted is None and within is None:
        frame, network = whole(geometry.original_shape), whole(geometry.network_shape)
        parts = grid, geometry, resampling, frame, geometry.crop, network, grid.tile_count
        return Part(*parts, needs_all=needs_all)
    wanted = wanted or Wanted(whole(geometry.original_shape))
    mask = None if wanted.mask is None else wanted.mask[wanted.box]
    inside = _inside(wanted.box, mask, geometry.crop, within)
    crop = _in_frame(inside, geometry.crop, wanted.box)
    if needs_all or resampling.tables is None:
        sizes = zip(geometry.network_shape, geometry.cropped_shape, strict=True)
        network = _network_box([linear_axis(n_in, n_out) for n_in, n_out in sizes], inside)
        return Part(grid, geometry, resampling, wanted.box, crop, network, grid.tile_count, mask, needs_all)
    network = _network_box(resampling.tables, inside)
    tables = tuple(
        table.part(part.start, part.stop, needed.start)
        for table, part, needed in zip(resampling.tables, inside, network, strict=True)
    )
    own = CaseGeometry(_shape(network), _shape(inside), _shape(wanted.box), crop)
    tiles = grid.part(network)
    if mask is not None:
        tiles = tiles.only(_needed(tiles, mask[crop], tables))
    elif _is_empty(inside):
        tiles = tiles.only(np.zeros([len(starts) for starts in tiles.starts], np.bool_))
    return Part(tiles, own, replace(resampling, tables=tables), wanted.box, crop, network, grid.tile_count, mask)


def cut(part: Part, counts: Shape3, rest: Sequence[Box], evenly: bool = False) -> list[Box]:
    """Cut what is labelled of a part, as far as it is left to do, into so many boxes along each axis, or fewer.

    Each begins with the first voxel that is interpolated from a row of tiles, so that two need as few of the same tiles
    as can be. Those of a column follow each other.

    Parameters
    ----------
    part : Part
    counts : int, 3
    rest : sequence of boxes
        What is left to do.
    evenly : bool
        With as many tiles in each box as can be, the repeated ones among them; else with as many rows of its own.

    Returns
    -------
    list of boxes
        Of the frame. Empty where all logits are needed as a whole.
    """
    if part.needs_all or part.resampling.tables is None:
        return []
    ends = []
    for axis, (count, crop, table) in enumerate(zip(counts, part.crop, part.resampling.tables, strict=True)):
        again = part.grid.again(axis) if evenly else 0
        firsts = [start for start, _ in part.grid.pieces(axis, count, again)][1:]
        inner = {crop.start + int(np.searchsorted(table.high, first)) for first in firsts}
        ends.append(list(pairwise(sorted({crop.start, *inner, crop.stop}))))
    order = along_last(part.grid.roll_axis)
    found = [_box(box[order.index(axis)] for axis in range(3)) for box in product(*(ends[axis] for axis in order))]
    return [shared for box in found for left in rest if (shared := common(box, left)) is not None]


def _inside(frame: Box, mask: NDArray[np.bool_] | None, crop: Box, within: Box | None = None) -> Box:
    """Return the box of the cropped grid in which something is labelled; (0, 0, 0) voxels if there is none."""
    if within is not None:
        ends = ((at.start + part.start, at.start + part.stop) for at, part in zip(frame, within, strict=True))
        frame, mask = _box(ends), None if mask is None else mask[within]
    bounds = []
    for axis, (wanted, cropped) in enumerate(zip(frame, crop, strict=True)):
        low, high = wanted.start, wanted.stop
        if mask is not None:
            at = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
            low, high = (low + int(at[0]), low + int(at[-1]) + 1) if at.size else (low, low)
        bounds.append((max(low, cropped.start) - cropped.start, min(high, cropped.stop) - cropped.start))
    return _box([(0, 0)] * 3 if any(low >= high for low, high in bounds) else bounds)


def _in_frame(inside: Box, crop: Box, frame: Box) -> Box:
    """Return where in the frame a box of the cropped grid lies."""
    if _is_empty(inside):
        return inside
    shifts = [cropped.start - wanted.start for cropped, wanted in zip(crop, frame, strict=True)]
    return _box((part.start + shift, part.stop + shift) for part, shift in zip(inside, shifts, strict=True))


def _network_box(tables: Sequence[AxisTable], inside: Box) -> Box:
    """Return the network voxels that a box of the cropped grid is interpolated from; one voxel for an empty box."""
    return _box(
        (int(table.low[part.start]), int(table.high[part.stop - 1]) + 1) if part.stop > part.start else (0, 1)
        for table, part in zip(tables, inside, strict=True)
    )


def _needed(grid: TileGrid, mask: NDArray[np.bool_], tables: Sequence[AxisTable]) -> NDArray[np.bool_]:
    """Tell of each tile whether a voxel that is set in `mask` is interpolated from one of its voxels."""
    found = mask
    for axis, table in enumerate(tables):
        tile, padding = grid.tile_shape[axis], grid.padding[axis]
        spans = []
        for start in grid.starts[axis]:
            low, high = start - padding, start - padding + tile
            # of the output positions: the first that reads from the tile, and the first behind it that does not
            first, behind = int(np.searchsorted(table.high, low)), int(np.searchsorted(table.low, high))
            spans.append(np.moveaxis(found, axis, 0)[first:behind].any(0))
        found = np.stack(spans, axis)
    return found


def _is_empty(box: Box) -> bool:
    return 0 in _shape(box)


def _box(bounds: Iterable[tuple[int, int]]) -> Box:
    z, y, x = (slice(int(start), int(stop)) for start, stop in bounds)
    return z, y, x


def _shape(box: Box) -> Shape3:
    return shape3(part.stop - part.start for part in box)
