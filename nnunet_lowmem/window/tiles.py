"""Tiles: cut out of a preprocessed case, brought to the network's device, and what the network makes of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TypeVar

import torch

from nnunet_lowmem.network.tile_memory import Taken, measured
from nnunet_lowmem.types import Attempt, PreprocessedCase, Shape3, once
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
        if self._case.previous_stage is not None:
            stage = self._case.previous_stage[inside]
            for channel, label in enumerate(self._stage_labels, start=image.shape[0]):
                view[channel] = stage == label
        return tile[:, 0][None] if self._grid.flat else tile[None]

    def _overlap(self, start: Shape3) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, target = [], []
        for axis in range(3):
            first = start[axis] - self._grid.padding[axis]
            low = max(first, 0)
            high = min(first + self._grid.tile_shape[axis], self._grid.image_shape[axis])
            inside.append(slice(low, high))
            target.append(slice(low - first, high - first))
        return tuple(inside), tuple(target)


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
        self._network = network
        self._source = source
        self._device = device
        self._buffers = cycle((HostBuffer(device), HostBuffer(device)))
        self._starts: Iterator[Shape3] = (start for row, _ in grid.rows() for start in grid.row_tiles(row))
        self._ahead: deque[torch.Tensor] = deque()

    def next(self, attempt: Attempt) -> torch.Tensor:
        """Return the logits of the next tile, shape (heads, *patch_size); nobody here holds them afterwards.

        `attempt` calls what it is given, perhaps more than once: the network on a tile, which may run out of memory.
        """
        if self._ahead:
            return self._ahead.popleft()
        return self._predict(next(self._starts), attempt, once)

    def look_ahead(self, attempt: Attempt, watch: Attempt) -> None:
        """Predict a tile before it is asked for; `watch` calls the network alone."""
        self._ahead.append(self._predict(next(self._starts), attempt, watch))

    def _predict(self, start: Shape3, attempt: Attempt, watch: Attempt) -> torch.Tensor:
        def predict() -> torch.Tensor:
            with torch.inference_mode(False):  # as stock's thread makes it: an override may ask for gradients
                tile = self._on_device(start)
            logits: torch.Tensor = watch(lambda: self._network(tile)[0])
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
