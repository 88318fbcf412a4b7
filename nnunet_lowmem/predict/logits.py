"""The final logits of a case, which come as slabs and never as a whole: the network tile by tile, folds, the window."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_lowmem.budget.facts import ModelFacts
from nnunet_lowmem.budget.ladder import Recovery, near_device_or_in_ram
from nnunet_lowmem.errors import NetworkOutputError, NonFiniteLogitsError
from nnunet_lowmem.network.exact import ExactNetwork, constant_bits
from nnunet_lowmem.network.fast_network import FastNetwork, Head
from nnunet_lowmem.network.known import is_autocasting
from nnunet_lowmem.network.tile_memory import TileBytes, weight_bytes
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.predict.weights import load_into
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.system.threads import RowThreads, torch_threads
from nnunet_lowmem.types import Attempt, Place, PreprocessedCase, Shape3, once
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.rolling import RollingWindow, average_folds, roll
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource, measure_ahead
from nnunet_lowmem.window.tiling import TileGrid, tile_grid

logger = logging.getLogger(__name__)


class TileNetwork:
    """The network as it is when it is asked; what it is known to take is remembered with the predictor.

    Parameters
    ----------
    setup : Setup
    clock : StageClock or None
        Of the case under way: told of what somebody else's code raises.

    Attributes
    ----------
    ways : Ways
    """

    def __init__(self, setup: Setup, clock: StageClock | None = None) -> None:
        self._setup = setup
        self._clock = clock
        self.ways = Ways(setup)
        self._collapses = False

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
        self.ways.prepare()
        self._collapses = self.ways.is_unwatched()
        source = TileSource(case, grid, setup.label_manager.foreground_labels)
        return PredictedTiles(self.predict, source, grid, setup.device)

    def predict(self, tile: torch.Tensor) -> torch.Tensor:
        """Logits of one tile, or features where there is a `head`; autocast only on CUDA, as in stock."""
        setup = self._setup
        with foreign(self._clock), torch.autocast("cuda") if setup.device.type == "cuda" else nullcontext():
            way = self.ways.taken()
            if isinstance(way, FastNetwork):
                return way.features(tile, setup.mirrored_axes, self._collapses)
            if way is not None and self._is_exact(way, tile):
                return way.logits(tile, setup.mirrored_axes, self._collapses)
            return setup.steps.predict_tile(tile)

    def head(self) -> Head | None:
        """Return what makes logits of its output, if that is features."""
        return way.head() if isinstance(way := self.ways.taken(), FastNetwork) else None

    def _is_exact(self, way: ExactNetwork, tile: torch.Tensor) -> bool:
        """Whether a network is run its exact way: nothing changes it now, and what was taken off it changes no bit."""
        if is_autocasting() or any(module.training for module in way.network.modules()):
            return False
        axes = self._setup.mirrored_axes
        if self._setup.is_mirroring != bool(axes) or any(not 0 <= axis < tile.ndim - 2 for axis in axes):
            return False  # nnU-Net's to refuse
        return not way.weights.denormals or self._is_proven(way, tile)

    def _is_proven(self, way: ExactNetwork, tile: torch.Tensor) -> bool:
        """Whether a tile has the same bits without the denormal weights; found on the first one of each fold."""
        memo = self._setup.memo
        if memo.proven[0] != memo.ways[0]:
            memo.proven = memo.ways[0], {}
        state = way.weights.denormals, way.weights.checksum
        if state not in memo.proven[1]:
            if constant_bits(tile) is not None:  # whatever is multiplied with nothing shows nothing
                return False
            times_s = [time.perf_counter()]
            outputs = []
            for network in (way.network, way.body):
                outputs.append(network(tile))
                times_s.append(time.perf_counter())
            memo.proven[1][state] = same = torch.equal(*(output.view(torch.int32) for output in outputs))
            logger.info(
                "%s weights are below 1.2e-38; without them a tile takes %.2f s instead of %.2f s, %s",
                f"{way.weights.denormals:,}", times_s[2] - times_s[1], times_s[1] - times_s[0],
                "and has the same bits: they are left out"
                if same
                else "but has other bits: they stay. --fast leaves them out",
            )  # fmt: skip
        return memo.proven[1][state]

    # -- threads and memory --------------------------------------------------------------------------------------------

    def most_threads(self) -> int:
        """Return how many threads the network may use: as many as in stock or, run fast, all."""
        most = self._setup.network_threads
        if most is not None:
            return most
        return stock_calls.network_threads() if self.ways.arithmetic() is Arithmetic.EXACT else usable_cores()

    def way_threads(self) -> AbstractContextManager[object]:
        """Give the kernels that take part in running the network their threads in the block."""
        return nullcontext() if (way := self.ways.taken()) is None else way.threads

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Give the network its threads in the block.

        Beside a GPU its output does not depend on them, and stock's command leaves torch one: a window in RAM, which
        torch adds to, has all that the kernels have.
        """
        least = self._setup.kernel_threads if self._setup.device.type == "cuda" else 1
        with torch_threads(self.most_threads(), least), self.way_threads():
            yield

    def facts(self, tile: TileBytes | None = None, worker_bytes: int = 0) -> ModelFacts:
        """Tell the planner of the model; of a tile what is known by now, if it is not given."""
        setup, weights = self._setup, self._setup.weights
        tile = self.tile_bytes() if tile is None else tile
        kept_bytes = weights.movable_bytes + weights.missing_bytes
        network, way = setup.steps.network(), self.ways.taken()
        further_bytes = 0 if way is None else self._further_bytes(way)
        return ModelFacts(
            heads=setup.heads,
            channels=setup.tile_shape[1],
            folds=weights.folds,
            weight_bytes=weight_bytes(network, unless_on=setup.device) + further_bytes,
            activation_bytes=tile.certain,
            unmeasured_bytes=tile.uncertain,
            label_bytes=1 if len(setup.label_manager.foreground_labels) < 255 else 2,
            threads=setup.kernel_threads,
            worker_bytes=worker_bytes,
            device=setup.device.type,
            window_on_device=setup.perform_everything_on_device,
            tile_s=setup.memo.tile_s,
            kept_bytes=kept_bytes,
            kept_place=Place.DISK if not kept_bytes and weights.are_on_disk else None,
        )

    def _further_bytes(self, way: FastNetwork | ExactNetwork) -> int:
        """Of weights that a way has of its own: what is not in use yet, where none are read or a fold needs more."""
        if any(weight.is_meta for weight in way.network.parameters()):
            return way.own_bytes
        return max(0, self.ways.denormal_bytes() - way.weights.replaced_bytes)

    def tile_bytes(self) -> TileBytes:
        """Tell what the network takes for a tile: what was measured, or what its tensors tell."""
        setup, network, arithmetic = self._setup, self._setup.steps.network(), self.ways.arithmetic()
        way = type(self.ways.taken()).__name__
        key = (setup.tile_shape, bool(setup.mirrored_axes), str(setup.device), arithmetic, way)
        known = setup.memo.tile
        if known is None or known[0] is not network or known[1] != key:
            known = setup.memo.tile = network, key, self.ways.bounded(arithmetic)
        return known[2]

    def tile_facts(self) -> dict[str, float]:
        """Return what the planner has to know of a tile."""
        tile, tile_s = self.tile_bytes(), self._setup.memo.tile_s
        return {"activation_bytes": tile.certain, "unmeasured_bytes": tile.uncertain, "tile_s": tile_s}

    def output_bytes(self) -> int:
        """Bytes of what the network gives for a tile, as float32."""
        channels = way.channels if isinstance(way := self.ways.taken(), FastNetwork) else self._setup.heads
        return 4 * channels * math.prod(self._setup.patch_size)

    def measure(self, tiles: PredictedTiles, attempt: Attempt) -> TileBytes:
        """Predict the first tile ahead, and remember what the network took for it."""
        setup = self._setup
        collapses, self._collapses = self._collapses, False  # a constant tile takes no less than any other here
        with self.threads():
            since_s = time.perf_counter()
            taken = measure_ahead(tiles, attempt, setup.device)
            setup.memo.tile_s = time.perf_counter() - since_s
        self._collapses = collapses
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
    grid : TileGrid or None
        Which tiles; None is all of the case.

    Attributes
    ----------
    case : PreprocessedCase
    network : TileNetwork
    grid : TileGrid
    repeated : frozenset of starts
        Of tiles that are all the same: the network sees one of them.
    reused : int
        Tiles that no network saw, so far.
    """

    def __init__(self, setup: Setup, case: PreprocessedCase, clock: StageClock, grid: TileGrid | None = None) -> None:
        self._setup = setup
        self.case = case
        self._clock = clock
        self.network = TileNetwork(setup, clock)
        self.grid = grid_of(setup, case) if grid is None else grid
        self.repeated: frozenset[Shape3] = frozenset()
        self.reused = 0

    def seconds(self, grid: TileGrid) -> float:
        """About how long the network takes for all folds of a grid, by the tile that was measured; 0 where none was."""
        return self._setup.memo.tile_s * grid.tile_count * self._setup.weights.folds

    @property
    def tile_count(self) -> int:
        """Tiles of all folds."""
        return self.grid.tile_count * self._setup.weights.folds

    def folds(self) -> Iterator[PredictedTiles]:
        """Yield the tiles of each fold; its weights are loaded when it is asked for."""
        for fold in range(self._setup.weights.folds):
            self.network.load(fold)
            tiles = self.network.tiles(self.case, self.grid)
            self.reuse_in(tiles)
            yield tiles

    def reuse_in(self, tiles: PredictedTiles) -> None:
        """Let a pass leave out what is repeated."""
        tiles.reuse(self.repeated, self._note_reused)

    def _note_reused(self) -> None:
        self.reused += 1

    def find_repeated(self) -> bool:
        """Look for constant tiles that are all the same, where nobody would miss a pass; return whether there are."""
        if self.network.ways.is_unwatched():
            labels = self._setup.label_manager.foreground_labels
            self.repeated = TileSource(self.case, self.grid, labels).repeated()
        return bool(self.repeated)

    def forget_repeated(self) -> None:
        """Let the network see every tile."""
        self.repeated = frozenset()

    @contextmanager
    def slabs(
        self, folds: Iterator[PredictedTiles], threads: RowThreads, folder: Path, recovery: Recovery
    ) -> Iterator[Iterator[LogitsSlab]]:
        """Give the slabs of the mean over all folds; the running sum between folds lives where the plan says."""
        setup = self._setup
        empty_cache(setup.device)  # of a column before, whose window may have been smaller
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
            axis = self.grid.roll_axis
            first_plane = self.grid.offset[axis] + self.grid.padding[axis]
            yield stack.enter_context(closing(average_folds(passes, setup.weights.folds, store, first_plane)))

    def whole(self) -> torch.Tensor:
        """Return all logits of the current weights: half, shape (heads, z, y, x)."""
        self.network.ways.choose(self.network.tiles(self.case, self.grid).middle)
        with RowThreads(self._setup.kernel_threads) as threads, self.network.way_threads():

            def logits(place: Place) -> torch.Tensor:
                with self._clock.stage("prediction", self.grid.tile_count):
                    tiles, window = self.network.tiles(self.case, self.grid), self.window(threads, place)
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
