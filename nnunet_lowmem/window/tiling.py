"""Geometry of the sliding window: where tiles start, and along which axis the window rolls.

Equal to nnU-Net's ``compute_steps_for_sliding_window`` and tile order (axis 0 outermost; two-dimensional configurations
visit slice after slice), written as pure integers so that the planner can use it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.types import Box, Shape3, shape3


@dataclass(frozen=True)
class TileGrid:
    """Tiles over one padded image, or those of them that a box of the image needs.

    Attributes
    ----------
    image_shape : int, 3
        Shape in network space before padding; of the box.
    padding : int, 3
        Planes below each axis: added so that a tile fits, or what the tiles of a box hold before it.
    padded_shape : int, 3
        What the tiles cover.
    tile_shape : int, 3
        The patch size; (1, y, x) for a two-dimensional configuration.
    starts : 3 tuples of int
        Tile starts per axis in padded coordinates. Rounding can repeat a start; the repeated tile counts twice.
    flat : bool
        Two-dimensional configuration: the network takes tiles without axis 0.
    offset : int, 3
        Position in the whole image of position 0 in padded coordinates.
    needed : frozenset of starts, or None
        The tiles that are computed; None is all of them.
    rolls : int or None
        Along which axis finished planes leave the window; None is the outermost one with more than one tile.
    """

    image_shape: Shape3
    padding: Shape3
    padded_shape: Shape3
    tile_shape: Shape3
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    flat: bool
    offset: Shape3
    needed: frozenset[Shape3] | None = None
    rolls: int | None = None

    @property
    def roll_axis(self) -> int:
        """Along which axis finished planes leave the window."""
        if self.rolls is not None:
            return self.rolls
        return next((axis for axis in range(3) if len(self.starts[axis]) > 1), 0)

    @property
    def tile_count(self) -> int:
        """Number of tiles that are computed."""
        if self.needed is None:
            return math.prod(len(starts) for starts in self.starts)
        return sum(start in self.needed for start in product(*self.starts))

    def rows(self) -> Iterator[tuple[int, int]]:
        """(start, end of the planes that are final after this row) for each row of tiles along the roll axis."""
        axis = self.roll_axis
        starts = self.starts[axis]
        yield from zip(starts, (*starts[1:], self.padded_shape[axis]), strict=True)

    def row_tiles(self, row_start: int) -> Iterator[Shape3]:
        """Yield the starts of the tiles of one row, in nnU-Net's order."""
        axis = self.roll_axis
        choices = [(row_start,) if a == axis else self.starts[a] for a in range(3)]
        yield from product(*choices)

    def in_whole(self, position: Sequence[int]) -> Shape3:
        """Return a position in padded coordinates as it is in those of the whole image, in which errors speak."""
        return shape3(at + max(0, offset) for at, offset in zip(position, self.offset, strict=True))

    def is_needed(self, start: Shape3) -> bool:
        """Whether a tile is computed."""
        return self.needed is None or start in self.needed

    def part(self, box: Box) -> TileGrid:
        """Return the tiles that touch a box of the image, which holds a voxel at least.

        They are this grid's own, in the same order: what each voxel of the box gets does not depend on the box.
        """
        starts, padding, padded, offset = [], [], [], []
        for axis, within in enumerate(box):
            low, high = within.start - self.offset[axis], within.stop - self.offset[axis]
            touching = self.touching(axis, low, high)
            first = touching[0]
            starts.append(tuple(start - first for start in touching))
            padding.append(low - first)
            padded.append(starts[-1][-1] + self.tile_shape[axis])
            offset.append(self.offset[axis] + first)
        return replace(
            self,
            image_shape=shape3(within.stop - within.start for within in box),
            padding=shape3(padding),
            padded_shape=shape3(padded),
            starts=(starts[0], starts[1], starts[2]),
            offset=shape3(offset),
        )

    def touching(self, axis: int, low: int, high: int) -> tuple[int, ...]:
        """Return the starts of the tiles that reach into [low, high) along an axis, padded coordinates."""
        starts = self.starts[axis]
        return starts[bisect_right(starts, low - self.tile_shape[axis]) : bisect_left(starts, high)]

    def columns(self) -> Iterator[Shape3]:
        """Yield into how many pieces planes may be cut along each axis, into ever smaller ones with ever more tiles."""
        counts, rows = [1, 1, 1], [len(starts) for starts in self.starts]
        axes = [axis for axis in range(3) if axis != self.roll_axis and rows[axis] > 1]
        while axes and any(counts[axis] < rows[axis] for axis in axes):
            axis = max(axes, key=lambda axis: rows[axis] / counts[axis])
            counts[axis] = min(2 * counts[axis], rows[axis])
            yield shape3(counts)

    def pieces(self, axis: int, count: int, again: int = 0) -> list[tuple[int, int]]:
        """Cut the planes of the image into so many pieces at most: [start, stop), each where a row of tiles begins.

        Each but the first computes so many rows `again`, for which the first has as many more.
        """
        rows, size = self.starts[axis], self.image_shape[axis]
        shares = (again + number * (len(rows) - again) // count for number in range(1, count))
        firsts = (rows[share] - self.padding[axis] for share in shares)
        return list(pairwise(sorted({0, *(first for first in firsts if 0 < first < size), size})))

    def again(self, axis: int) -> int:
        """Return how many rows of tiles along an axis reach across where the middle one begins: what a cut costs."""
        middle = self.starts[axis][len(self.starts[axis]) // 2]
        return len(self.touching(axis, middle - 1, middle)) if middle else 0

    def cut(self, counts: Shape3) -> tuple[TileGrid, float]:
        """Return a grid as large as that of any piece, for its sizes, and how many times as many tiles all have.

        A piece holds the plane before its first, which resampling may need as a neighbour.
        """
        return _cut(self if self.needed is None else replace(self, needed=None), counts)

    def only(self, needed: NDArray[np.bool_]) -> TileGrid:
        """Return the grid of which some tiles are computed; `needed` has a value for each, along the three axes."""
        z, y, x = (np.asarray(starts)[chosen] for starts, chosen in zip(self.starts, np.nonzero(needed), strict=True))
        return replace(self, needed=frozenset(zip(z.tolist(), y.tolist(), x.tolist(), strict=True)))


@lru_cache(maxsize=128)  # asked again and again while a case is planned
def _cut(grid: TileGrid, counts: Shape3) -> tuple[TileGrid, float]:
    image, padded, starts, tiles = [], [], [], 1
    for axis, count in enumerate(counts):
        pieces = [(max(0, start - 1), stop) for start, stop in grid.pieces(axis, count)]
        padding, tile = grid.padding[axis], grid.tile_shape[axis]
        rows = [grid.touching(axis, start + padding, stop + padding) for start, stop in pieces]
        widest = max(rows, key=lambda row: row[-1] - row[0])
        image.append(max(stop - start for start, stop in pieces))
        padded.append(widest[-1] - widest[0] + tile if count > 1 else grid.padded_shape[axis])
        starts.append(tuple(start - widest[0] for start in widest))
        tiles *= sum(map(len, rows))
    largest = replace(
        grid,
        image_shape=shape3(image),
        padding=(0, 0, 0),
        padded_shape=shape3(padded),
        starts=(starts[0], starts[1], starts[2]),
        offset=(0, 0, 0),
    )
    return largest, tiles / grid.tile_count


def axis_starts(size: int, tile: int, step_size: float) -> tuple[int, ...]:
    """Tile starts along one axis: evenly spread, at most ``tile * step_size`` apart, rounded half to even."""
    steps = math.ceil((size - tile) / (tile * step_size)) + 1
    if steps == 1:
        return (0,)
    distance = (size - tile) / (steps - 1)
    return tuple(round(distance * step) for step in range(steps))


def tile_grid(image_shape: Shape3, patch_size: tuple[int, ...], step_size: float) -> TileGrid:
    """Lay tiles of `patch_size` (two or three entries) over an image in network space.

    Raises
    ------
    UsageError
        If `step_size` is not in (0, 1].
    ValueError
        If the patch has neither two nor three axes.
    """
    if not 0 < step_size <= 1:
        raise twin(UsageError, AssertionError)(f"tile step size must be larger than 0 and at most 1, got {step_size}")
    if len(patch_size) not in (2, 3):
        raise ValueError(f"patch size must have two or three entries, got {patch_size}")
    flat = len(patch_size) == 2
    patch = (1, *patch_size) if flat else patch_size
    tile_shape = shape3(patch)
    missing = [max(tile - size, 0) for tile, size in zip(tile_shape, image_shape, strict=True)]
    padded = tuple(size + extra for size, extra in zip(image_shape, missing, strict=True))
    starts = [axis_starts(size, tile, step_size) for size, tile in zip(padded, tile_shape, strict=True)]
    if flat:
        starts[0] = tuple(range(image_shape[0]))
    return TileGrid(
        image_shape=image_shape,
        padding=shape3(extra // 2 for extra in missing),
        padded_shape=shape3(padded),
        tile_shape=tile_shape,
        starts=(starts[0], starts[1], starts[2]),
        flat=flat,
        offset=shape3(-(extra // 2) for extra in missing),
    )
