"""Tiles: cut out of a preprocessed case, brought to the network's device, and what the network makes of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, product
from typing import TypeVar

import numpy as np
import torch

from nnunet_lowmem.network.exact import constant_bits
from nnunet_lowmem.network.tile_memory import Taken, measured
from nnunet_lowmem.types import Attempt, PreprocessedCase, Shape3
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.window.host_buffer import HostBuffer
from nnunet_lowmem.window.tiling import TileGrid

T = TypeVar("T")
TileNetwork = Callable[[torch.Tensor], torch.Tensor]


class TileSource:
    """Cuts network input out of a preprocessed case.

    Padding and, in a cascade, the one-hot encoding of the previous stage are made per tile; neither ever exists for the
    whole volume.

    Parameters
    ----------
    case : PreprocessedCase
    grid : TileGrid
    stage_labels : sequence of int
        Foreground labels of the previous stage, one extra channel each; empty without a cascade.
    """

    def __init__(self, case: PreprocessedCase, grid: TileGrid, stage_labels: Sequence[int] = ()) -> None:
        self._case = case
        self._grid = grid
        self._stage_labels = stage_labels if case.previous_stage is not None else ()

    def tile(self, start: Shape3, buffer: HostBuffer | None = None) -> torch.Tensor:
        """Return the tile at `start` (padded coordinates) as float32, shape (1, channels, *patch_size).

        It is in the memory of `buffer` if one is given.
        """
        image = self._case.image
        inside, target = self._overlap(start)
        shape = (image.shape[0] + len(self._stage_labels), *self._grid.tile_shape)
        if buffer is None:
            tile = torch.zeros(shape, dtype=torch.float32, device="cpu")
        else:
            tile = buffer.room(shape, torch.float32).zero_()
        view = tile.numpy()[(slice(None), *target)]
        view[: image.shape[0]] = image[(slice(None), *inside)]
        if isinstance(image, np.memmap):
            give_back(image)
        if self._case.previous_stage is not None:
            stage = self._case.previous_stage[inside]
            for channel, label in enumerate(self._stage_labels, start=image.shape[0]):
                view[channel] = stage == label
        return tile[:, 0][None] if self._grid.flat else tile[None]

    def repeated(self) -> frozenset[Shape3]:
        """Return the starts of the tiles that are constant, and all the same: the largest such group, if it has two.

        Bit by bit, and each channel by itself. A few voxels of the image tell of most tiles that they are not.
        """
        groups: dict[bytes, list[Shape3]] = {}
        for start in _in_order(self._grid):
            if self._may_be_constant(start) and (values := constant_bits(self.tile(start))) is not None:
                groups.setdefault(values, []).append(start)
        largest = max(groups.values(), key=len, default=[])
        return frozenset(largest) if len(largest) > 1 else frozenset()

    def _may_be_constant(self, start: Shape3) -> bool:
        inside, _ = self._overlap(start)
        middle = self._voxel((part.start + part.stop) // 2 for part in inside)
        corners = product(*((part.start, part.stop - 1) for part in inside))
        return all(self._voxel(corner) == middle for corner in corners)

    def _voxel(self, place: Iterable[int]) -> float:
        """One of the first channel."""
        voxel = self._case.image[(slice(0, 1), *(slice(index, index + 1) for index in place))]
        return float(voxel.item())

    def _overlap(self, start: Shape3) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, target = [], []
        for axis, size in enumerate(self._case.image.shape[1:]):
            first = start[axis] + self._grid.offset[axis]
            low = max(first, 0)
            high = min(first + self._grid.tile_shape[axis], size)
            inside.append(slice(low, high))
            target.append(slice(low - first, high - first))
        return tuple(inside), tuple(target)


def _in_order(grid: TileGrid) -> Iterator[Shape3]:
    """Give the starts of all tiles that are computed, in stock's order; who holds this is not held by it."""
    return (start for row, _ in grid.rows() for start in grid.row_tiles(row) if grid.is_needed(start))


class PredictedTiles:
    """Logits of the tiles of one pass over a case: the network sees each tile once, in stock's order.

    On CUDA the host runs ahead of the device: two buffers in turn, so that a tile is cut out of the image while the
    network works on the one before, and at most two tiles are ahead.

    Parameters
    ----------
    network : callable
        Makes logits, shape (1, heads, *patch_size), of a tile.
    source : TileSource
    grid : TileGrid
    device : torch.device
        The network's.

    Attributes
    ----------
    count : int
        Of all tiles.
    """

    def __init__(self, network: TileNetwork, source: TileSource, grid: TileGrid, device: torch.device) -> None:
        self.count = grid.tile_count
        self._grid = grid
        self._network = network
        self._source = source
        self._device = device
        self._buffers = cycle((HostBuffer(device), HostBuffer(device)))
        self._starts = _in_order(grid)
        self._ahead: deque[torch.Tensor] = deque()
        self._repeated: frozenset[Shape3] = frozenset()
        self._kept: torch.Tensor | None = None
        self._on_reuse: Callable[[], object] = object
        self._last_repeated: Shape3 | None = None

    def reuse(self, repeated: frozenset[Shape3], on_reuse: Callable[[], object]) -> None:
        """Let the network see one of the tiles that start there: they are all the same, bit by bit.

        `on_reuse` is told of each that it does not see.
        """
        self._repeated, self._on_reuse = repeated, on_reuse
        self._last_repeated = (
            None if not repeated else [start for start in _in_order(self._grid) if start in repeated][-1]
        )

    def middle(self) -> torch.Tensor:
        """Return the tile in the middle of the volume, as the network gets it."""
        z, y, x = (starts[len(starts) // 2] for starts in self._grid.starts)
        return self._source.tile((z, y, x)).to(self._device)

    def next(self, attempt: Attempt) -> torch.Tensor:
        """Return the logits of the next tile, shape (heads, *patch_size); nobody here holds them afterwards.

        `attempt` calls what it is given, perhaps more than once: the network on a tile, which may run out of memory.
        """
        if self._ahead:
            return self._ahead.popleft()
        return self._predict(next(self._starts), attempt)

    def look_ahead(self, attempt: Attempt, watch: Attempt) -> None:
        """Predict a tile before it is asked for; `watch` calls the network alone."""
        self._ahead.append(self._predict(next(self._starts), attempt, watch))

    def _predict(self, start: Shape3, attempt: Attempt, watch: Attempt | None = None) -> torch.Tensor:
        if start not in self._repeated:
            return self._run(start, attempt, watch)
        if self._kept is None:
            logits = self._run(start, attempt, watch)
            self._kept = attempt(logits.clone)
            return logits
        self._on_reuse()
        kept = self._kept
        if start == self._last_repeated:
            self._kept = None
            return kept
        copy: torch.Tensor = attempt(kept.clone)
        return copy

    def _run(self, start: Shape3, attempt: Attempt, watch: Attempt | None) -> torch.Tensor:
        def predict() -> torch.Tensor:
            with torch.inference_mode(False):  # as stock's thread makes it: an override may ask for gradients
                tile = self._on_device(start)
            logits: torch.Tensor = self._network(tile)[0] if watch is None else watch(lambda: self._network(tile)[0])
            return logits

        with torch.inference_mode():
            logits: torch.Tensor = attempt(predict)
            return logits

    def _on_device(self, start: Shape3) -> torch.Tensor:
        """Return the tile at `start` on the device; the host does not wait for it to arrive."""
        if self._device.type != "cuda":
            return self._source.tile(start).to(self._device)
        buffer = next(self._buffers)
        return buffer.send(self._source.tile(start, buffer))


def measure_ahead(tiles: PredictedTiles, attempt: Attempt, device: torch.device) -> Taken | None:
    """Predict the first tile ahead and return what `measured` tells of it.

    Where cuDNN looks for its fastest algorithms the first tile takes more than any other, and the second tells.
    """
    taken: Taken | None = None

    def watch(run: Callable[[], T]) -> T:
        nonlocal taken
        logits, taken = measured(run, device)
        return logits

    searches = device.type == "cuda" and torch.backends.cudnn.benchmark
    for _ in range(2 if searches and tiles.count > 1 else 1):
        tiles.look_ahead(attempt, watch)
    return taken
