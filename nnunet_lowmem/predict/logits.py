"""The final logits of a case, which come as slabs and never as a whole: the network tile by tile, folds, the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_lowmem.budget.arrays import ModelFacts
from nnunet_lowmem.budget.ladder import Recovery, near_device_or_in_ram
from nnunet_lowmem.errors import NetworkOutputError, NonFiniteLogitsError
from nnunet_lowmem.network.fast_network import FastNetwork, Head, fast_network, parts_of
from nnunet_lowmem.network.tile_memory import TileBytes, weight_bytes
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.weights import load_into
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.system.threads import RowThreads, torch_threads
from nnunet_lowmem.types import Attempt, Place, PreprocessedCase, once
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.rolling import RollingWindow, average_folds, roll
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource, measure_ahead
from nnunet_lowmem.window.tiling import TileGrid, tile_grid


class TileNetwork:
    """The network as it is when it is asked; what it is known to take is remembered with the predictor.

    Parameters
    ----------
    setup : Setup
    clock : StageClock or None
        Of the case under way: told of what somebody else's code raises.
    """

    def __init__(self, setup: Setup, clock: StageClock | None = None) -> None:
        self._setup = setup
        self._clock = clock

    def load(self, fold: int) -> None:
        """Load the weights of a fold, unless the network is used as it is."""
        weights = self._setup.weights
        if weights.parameters is not None:
            load_into(self._setup.steps.network(), weights.parameters[fold], weights.name(fold), self._clock)

    def tiles(self, case: PreprocessedCase, grid: TileGrid) -> PredictedTiles:
        """Return what the network, with its current weights, makes of the tiles of a case."""
        setup = self._setup
        with foreign(self._clock):
            setup.steps.place_network()
        empty_cache(setup.device)
        source = TileSource(case, grid, setup.label_manager.foreground_labels)
        return PredictedTiles(self.predict, source, grid, setup.device)

    def predict(self, tile: torch.Tensor) -> torch.Tensor:
        """Logits of one tile, or features where there is a `head`; autocast only on CUDA, as in stock."""
        setup = self._setup
        with foreign(self._clock), torch.autocast("cuda") if setup.device.type == "cuda" else nullcontext():
            if (fast := self.fast()) is not None:
                return fast.features(tile, setup.mirrored_axes)
            return setup.steps.predict_tile(tile)

    def head(self) -> Head | None:
        """Return what makes logits of its output, if that is features."""
        return None if (fast := self.fast()) is None else fast.head()

    def fast(self) -> FastNetwork | None:
        """Return how the network of now is run fast, if it is."""
        setup = self._setup
        if not setup.options.fast or setup.steps.replaced(Step.NETWORK):
            return None
        network = uncompiled(setup.steps.network())
        if setup.memo.fast[0] != (parts := parts_of(network)):
            setup.memo.fast = parts, fast_network(network, setup.tile_shape, setup.kernel_threads)
        return setup.memo.fast[1]

    def most_threads(self) -> int:
        """Return how many threads the network may use: as many as in stock or, run fast, all."""
        if self.fast() is not None:
            return usable_cores()
        most = self._setup.network_threads
        return stock_calls.network_threads() if most is None else most

    def fast_threads(self) -> AbstractContextManager[object]:
        """Give the network that is run fast its own threads in the block."""
        return nullcontext() if (fast := self.fast()) is None else fast.threads

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Give the network its threads in the block.

        Beside a GPU its output does not depend on them, and stock's command leaves torch one: a window in RAM, which
        torch adds to, has all that the kernels have.
        """
        least = self._setup.kernel_threads if self._setup.device.type == "cuda" else 1
        with torch_threads(self.most_threads(), least), self.fast_threads():
            yield

    def facts(self, tile: TileBytes | None = None, worker_bytes: int = 0) -> ModelFacts:
        """Tell the planner of the model; of a tile what is known by now, if it is not given."""
        setup, weights = self._setup, self._setup.weights
        tile = self.tile_bytes() if tile is None else tile
        kept_bytes = weights.movable_bytes + weights.missing_bytes
        return ModelFacts(
            heads=setup.heads,
            channels=setup.tile_shape[1],
            folds=weights.folds,
            weight_bytes=weight_bytes(setup.steps.network(), unless_on=setup.device),
            activation_bytes=tile.certain,
            unmeasured_bytes=tile.uncertain,
            label_bytes=1 if len(setup.label_manager.foreground_labels) < 255 else 2,
            threads=setup.kernel_threads,
            worker_bytes=worker_bytes,
            device=setup.device.type,
            window_on_device=setup.perform_everything_on_device,
            kept_bytes=kept_bytes,
            kept_place=Place.DISK if not kept_bytes and weights.are_on_disk else None,
        )

    def tile_bytes(self) -> TileBytes:
        """Tell what the network takes for a tile: what was measured, or what its tensors tell."""
        setup, network = self._setup, self._setup.steps.network()
        key = (setup.tile_shape, bool(setup.mirrored_axes), str(setup.device), setup.options.fast)
        known = setup.memo.tile
        if known is None or known[0] is not network or known[1] != key:
            body, channels = uncompiled(network), setup.heads
            if (fast := self.fast()) is not None:
                body, channels = fast.body, fast.channels
            copies = 2 * channels if setup.mirrored_axes else 0
            known = setup.memo.tile = network, key, TileBytes.bounded(body, setup.tile_shape, copies)
        return known[2]

    def measure(self, tiles: PredictedTiles, attempt: Callable[[Callable[[], Any]], Any]) -> TileBytes:
        """Predict the first tile ahead, and remember what the network took for it."""
        setup = self._setup
        with self.threads():
            taken = measure_ahead(tiles, attempt, setup.device)
        measured = self.tile_bytes().after(taken and taken.with_more(4 * math.prod(setup.tile_shape)))
        assert setup.memo.tile is not None, "it has just been asked for"
        setup.memo.tile = (*setup.memo.tile[:2], measured)
        return measured


def grid_of(setup: Setup, case: PreprocessedCase) -> TileGrid:
    """Return the tiles of a preprocessed case."""
    z, y, x = case.image.shape[1:]
    return tile_grid((z, y, x), setup.patch_size, setup.tile_step_size)


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
