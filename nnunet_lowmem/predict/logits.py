"""The final logits of a case, which come as slabs and never as a whole: folds, tiles, the rolling window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from nnunet_lowmem.budget.ladder import Recovery, near_device_or_in_ram
from nnunet_lowmem.errors import NetworkOutputError, NonFiniteLogitsError
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.tile_network import TileNetwork, grid_of
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Attempt, Place, PreprocessedCase, once
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.rolling import RollingWindow, average_folds, roll
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs
from nnunet_lowmem.window.tiles import PredictedTiles


class FoldLogits:
    """Makes the logits of one case.

    Parameters
    ----------
    setup : Setup
    case : PreprocessedCase
    clock : StageClock
        Its stage has as many steps as there are `tile_count` tiles.

    Attributes
    ----------
    network : TileNetwork
    grid : TileGrid
    """

    def __init__(self, setup: Setup, case: PreprocessedCase, clock: StageClock) -> None:
        self._setup = setup
        self._case = case
        self._clock = clock
        self.network = TileNetwork(setup, clock)
        self.grid = grid_of(setup, case)

    @property
    def tile_count(self) -> int:
        """Tiles of all folds."""
        return self.grid.tile_count * self._setup.weights.folds

    def folds(self) -> Iterator[PredictedTiles]:
        """Yield the tiles of each fold; its weights are loaded when it is asked for."""
        for fold in range(self._setup.weights.folds):
            self.network.load(fold)
            yield self.network.tiles(self._case, self.grid)

    @contextmanager
    def slabs(
        self, folds: Iterator[PredictedTiles], threads: RowThreads, folder: Path, recovery: Recovery
    ) -> Iterator[Iterator[LogitsSlab]]:
        """Give the slabs of the mean over all folds; the running sum between folds lives where the plan says."""
        setup = self._setup
        with ExitStack() as stack:
            store = None
            if setup.weights.folds > 1:
                place = folder if recovery.plan.placement.planes is Place.DISK else None
                store = PlaneStore(setup.heads, self.grid.image_shape, self.grid.roll_axis, place)
                stack.enter_context(store)

            window = recovery.run(lambda: self.window(threads, recovery.plan.placement.window, folder, recovery.run))
            moves = recovery.followed_by(lambda plan: window.move_to(plan.placement.window, folder))
            stack.enter_context(moves)
            stack.enter_context(self.network.threads())
            passes = (self._roll(tiles, window, fold) for fold, tiles in enumerate(folds))
            yield stack.enter_context(closing(average_folds(passes, setup.weights.folds, store)))

    def whole(self) -> torch.Tensor:
        """Return all logits of the current weights: half, shape (heads, z, y, x)."""
        with RowThreads(self._setup.kernel_threads) as threads, self.network.fast_threads():

            def logits(place: Place) -> torch.Tensor:
                with self._clock.stage("prediction", self.grid.tile_count):
                    tiles, window = self.network.tiles(self._case, self.grid), self.window(threads, place)
                    return collect_slabs(self._roll(tiles, window), self._setup.heads, self.grid.image_shape)

            on_device = self._setup.perform_everything_on_device
            return near_device_or_in_ram(logits) if on_device else logits(Place.RAM)

    def window(
        self, threads: RowThreads, place: Place, folder: Path | None = None, attempt: Attempt = once
    ) -> RollingWindow:
        """Return an empty window in a place."""
        setup = self._setup
        device = setup.device if place is Place.VRAM else torch.device("cpu")
        importance = stock_calls.importance(setup.configuration_manager, setup.use_gaussian, device)
        spill = folder if place is Place.DISK else None
        weights = importance.reshape(self.grid.tile_shape)
        return RollingWindow(self.grid, setup.heads, weights, threads, spill, attempt)

    def _roll(self, tiles: PredictedTiles, window: RollingWindow, fold: int | None = None) -> Iterator[LogitsSlab]:
        """Slabs of the final logits of one fold, which is named where they are no numbers."""
        slabs = roll(tiles, self.grid, window, self._clock.advance, self.network.head())
        try:
            yield from slabs
        except (NonFiniteLogitsError, NetworkOutputError) as error:
            if fold is None or self._setup.weights.parameters is None:
                raise
            raise type(error)(f"{self._setup.weights.name(fold)}: {error}") from error
