"""The part of the predictor that makes logits: model, weights, rolling window, folds."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.helpers import empty_cache

from nnunet_lowmem.budget.arrays import ModelFacts
from nnunet_lowmem.budget.ladder import Recovery, near_device_or_in_ram
from nnunet_lowmem.budget.machine import ram_limit, spill_bytes
from nnunet_lowmem.budget.planner import Plan
from nnunet_lowmem.errors import LowMemError, ModelError, NetworkOutputError, NonFiniteLogitsError, because
from nnunet_lowmem.network.fast_network import FastNetwork, fast_network, parts_of
from nnunet_lowmem.network.tile_memory import TileBytes, weight_bytes
from nnunet_lowmem.nnunet import adapter, model_files, stock_calls
from nnunet_lowmem.nnunet.model import load_model, uncompiled, why_not_loaded
from nnunet_lowmem.nnunet.trust import Trust
from nnunet_lowmem.options import OPTIONS, Options, with_options
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.overrides.lookup import as_installed, found, replaced, unless_replaced
from nnunet_lowmem.predict.progress import Listener, logging_prints, observed
from nnunet_lowmem.predict.weights import FoldWeights, fold_count
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.system.threads import RowThreads, torch_threads, usable_cores
from nnunet_lowmem.types import Attempt, Place, PreprocessedCase, once
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.rolling import RollingWindow, average_folds, roll
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource, measure_ahead
from nnunet_lowmem.window.tiling import TileGrid, tile_grid

logger = logging.getLogger(__name__)

Folds = Sequence[int | str] | int | str | None


class LogitsPredictor(Options, FoldWeights, nnUNetPredictor):  # type: ignore[misc]  # nnU-Net ships no types
    """nnU-Net's predictor up to the final logits, which come as slabs and never as a whole.

    Parameters
    ----------
    tile_step_size, use_gaussian, use_mirroring, perform_everything_on_device, device, verbose, verbose_preprocessing, \
    allow_tqdm
        As in nnU-Net. `perform_everything_on_device` says where the rolling window lives; without `allow_tqdm` there
        are neither bars nor, where no terminal is, lines in the log.
    **more : any
        Our options by their names, described in `nnunet_lowmem.options`; and what only the installed nnU-Net knows.

    Attributes
    ----------
    foreign_ends_run : bool
        What the network, an override or a callback raises ends a run at once. For commands it is a failure of the case.
    network_threads : int or None
        At most; None takes stock's number, which it sets for predictions and not for validations.
    """

    network: Any
    foreign_ends_run = True
    network_threads: int | None = None

    _clock: StageClock | None = None  # of the case under way
    _fast_network: tuple[Any, FastNetwork | None] = (None, None)
    _listener: Listener | None = None
    _known_tile: tuple[Any, tuple[Any, ...], TileBytes] | None = None

    @as_installed
    @with_options
    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  # stock's signature, read by tools that embed nnU-Net
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        **more: Any,
    ) -> None:
        own = {option.name: more.pop(option.name, option.default) for option in OPTIONS}
        on_device = perform_everything_on_device and device.type == "cuda"
        # nnU-Net says of every other device that CUDA alone keeps logits, whatever it was asked for
        with logging_prints(logging.DEBUG):
            super().__init__(
                tile_step_size=tile_step_size, use_gaussian=use_gaussian, use_mirroring=use_mirroring,
                perform_everything_on_device=on_device, device=device, verbose=verbose,
                verbose_preprocessing=verbose_preprocessing, allow_tqdm=allow_tqdm, **more,
            )  # fmt: skip
        vars(self).update(own)
        self.fast = self.fast and device.type == "cpu"

    @unless_replaced
    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Folds,
        checkpoint_name: str = "checkpoint_final.pth",
        trainer_class: Any = None,  # in nnunetv2-neuropoly: in the place of the trainer that the checkpoint names
    ) -> None:
        """Build the network from a model folder, and read the weights of all folds; no file of it is read later.

        Raises
        ------
        ModelError
            If a file is missing or unreadable, or the weights do not fit the network of the plans.
        """
        limit, in_use = ram_limit(self.max_ram)
        free_bytes = max(0, limit - in_use)
        self._describe(model_training_output_dir, use_folds, checkpoint_name, "cpu", free_bytes, trainer_class)
        self._load_weights(self.list_of_parameters[0], 0)
        if os.environ.get("nnUNet_compile", "").lower() in ("true", "1", "t"):  # noqa: SIM112  # nnU-Net's spelling
            self.network = torch.compile(self.network)

    def describe_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Folds,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """As `initialize_from_trained_model_folder`, but read no weights: enough for `estimate`, and for nothing else.

        Raises
        ------
        ModelError
            If a file is missing or unreadable.
        """
        self._describe(model_training_output_dir, use_folds, checkpoint_name, "meta")

    def _describe(
        self, folder: str, folds: Folds, checkpoint_name: str, device: str, free_bytes: int = 0, trainer: Any = None
    ) -> None:
        """Set the attributes that describe the model, once all of it is read; its network has no weights yet."""
        folds = stock_calls.find_folds(folder, checkpoint_name) if folds is None else folds
        checkpoints = model_files.checkpoint_files(folder, folds, checkpoint_name, stock_calls.reads_files())
        trust = Trust((self.trust,) if isinstance(self.trust, str) else tuple(self.trust), self.trust_model)
        if trust.everything:
            logger.warning("%s is trusted: the code it holds or names is run", folder)
        try:
            model = load_model(Path(folder), checkpoints[0], trust, device, trainer)
        except LowMemError:
            raise
        except Exception as error:
            raise because(ModelError, why_not_loaded(checkpoints[0], error), error) from error
        adapter.check_reader(model.plans_manager)
        others = (trust.load_checkpoint(path, device)["network_weights"] for path in checkpoints[1:])
        self._keep_weights(chain([model.weights], others), free_bytes, spill_bytes(self.tmp_dir))
        self._checkpoints = tuple(checkpoints)
        self.plans_manager, self.configuration_manager = model.plans_manager, model.configuration_manager
        self.label_manager, self.dataset_json = model.label_manager, model.dataset_json
        self.trainer_name, self.allowed_mirroring_axes = model.trainer_name, model.mirroring_axes
        self.network = model.network

    def _network_tile(self, tile: torch.Tensor) -> torch.Tensor:
        """Logits of one tile, or features where the window has a head; autocast only on CUDA, as in stock."""
        with foreign(self._clock), torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            if (fast := self._fast()) is not None:
                return fast.features(tile, self._mirrored_axes())
            return self._internal_maybe_mirror_and_predict(tile)  # type: ignore[no-any-return]  # stock's

    def _mirrored_axes(self) -> tuple[int, ...]:
        axes = self.allowed_mirroring_axes  # or an array of numpy; what is no collection is the network's to refuse
        return tuple(map(int, axes)) if isinstance(axes, Iterable) and self.use_mirroring else ()

    def _fast(self) -> FastNetwork | None:
        """How the network that is loaded is run fast, if it is."""
        if not self.fast or found(Step.NETWORK, self):
            return None
        network = uncompiled(self.network)
        if self._fast_network[0] != (parts := parts_of(network)):
            self._fast_network = parts, fast_network(network, self._tile_shape(), self._kernel_threads())
        return self._fast_network[1]

    def _fast_threads(self) -> AbstractContextManager[object]:
        return nullcontext() if (fast := self._fast()) is None else fast.threads

    @contextmanager
    def _threads_for_tiles(self) -> Iterator[None]:
        with torch_threads(self._threads_of_network()), self._fast_threads():
            yield

    def _threads_of_network(self) -> int:
        most = stock_calls.network_threads() if self.network_threads is None else self.network_threads
        return most if self._fast() is None else usable_cores()

    def _kernel_threads(self) -> int:
        return self.kernel_threads or usable_cores()

    def _tile_shape(self) -> tuple[int, ...]:
        return (1, self._input_channels(), *self.configuration_manager.patch_size)

    @unless_replaced
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Return the logits of the current weights, half, shape (heads, z, y, x): stock's method, stock's bits.

        All heads on the whole grid are what the caller asks for here; `predict_from_files` never makes them.
        """
        if input_image.dtype != torch.float32 or replaced(self, Step.WINDOW):
            return super().predict_sliding_window_return_logits(input_image)  # type: ignore[no-any-return]  # stock's
        assert input_image.ndim == 4, "input_image must be a 4D torch.Tensor (c, x, y, z)"
        case = PreprocessedCase(input_image.detach().cpu().numpy(), None, {})
        grid = self._grid(case)
        clock = StageClock("image")
        with ExitStack() as stack:
            threads = stack.enter_context(RowThreads(self._kernel_threads()))
            stack.enter_context(self._fast_threads())
            stack.enter_context(self._observed(clock))

            def logits(place: Place) -> torch.Tensor:
                with clock.stage("prediction", grid.tile_count):
                    slabs = self._roll(self._predicted(case, grid), grid, self._window(grid, threads, place), clock)
                    return collect_slabs(slabs, self.label_manager.num_segmentation_heads, grid.image_shape)

            return near_device_or_in_ram(logits) if self.perform_everything_on_device else logits(Place.RAM)

    def _grid(self, case: PreprocessedCase) -> TileGrid:
        z, y, x = case.image.shape[1:]
        return tile_grid((z, y, x), tuple(self.configuration_manager.patch_size), self.tile_step_size)

    def _window(
        self, grid: TileGrid, threads: RowThreads, place: Place, folder: Path | None = None, attempt: Attempt = once
    ) -> RollingWindow:
        device = self.device if place is Place.VRAM else torch.device("cpu")
        importance = stock_calls.importance(self.configuration_manager, self.use_gaussian, device)
        heads = self.label_manager.num_segmentation_heads
        spill = folder if place is Place.DISK else None
        return RollingWindow(grid, heads, importance.reshape(grid.tile_shape), threads, spill, attempt)

    def _predicted(self, case: PreprocessedCase, grid: TileGrid) -> PredictedTiles:
        """Return what the network, with its current weights, makes of the tiles of a case."""
        with foreign(self._clock):
            self.network = self.network.to(self.device)
            self.network.eval()
        empty_cache(self.device)
        source = TileSource(case, grid, self.label_manager.foreground_labels)
        return PredictedTiles(self._network_tile, source, grid, self.device)

    def _roll(
        self, tiles: PredictedTiles, grid: TileGrid, window: RollingWindow, clock: StageClock
    ) -> Iterator[LogitsSlab]:
        """Slabs of the final logits of one fold."""
        window.head = None if (fast := self._fast()) is None else fast.head()
        return roll(tiles, grid, window, clock.advance)

    def _folds(self, case: PreprocessedCase, grid: TileGrid) -> Iterator[PredictedTiles]:
        """Yield the tiles of each fold; its weights are loaded when it is asked for."""
        if self.list_of_parameters is None:
            yield self._predicted(case, grid)
            return
        for number, weights in enumerate(self.list_of_parameters):
            self._load_weights(weights, number)
            del weights
            yield self._predicted(case, grid)

    @contextmanager
    def _final_slabs(
        self,
        fold_tiles: Iterator[PredictedTiles],
        grid: TileGrid,
        plan: Plan,
        threads: RowThreads,
        folder: Path,
        clock: StageClock,
        recovery: Recovery | None = None,
    ) -> Iterator[Iterator[LogitsSlab]]:
        """Slabs of the mean over all folds; the running sum between folds lives where the plan says."""
        folds = fold_count(self.list_of_parameters)
        heads = self.label_manager.num_segmentation_heads
        with ExitStack() as stack:
            store = None
            if folds > 1:
                place = folder if plan.placement.planes is Place.DISK else None
                store = stack.enter_context(PlaneStore(heads, grid.image_shape, grid.roll_axis, place))
            # nothing here holds the window but the recovery, which forgets it after the last slab
            passes = self._passes(fold_tiles, grid, self._watched_window(grid, plan, threads, folder, recovery), clock)
            stack.enter_context(self._threads_for_tiles())
            yield stack.enter_context(closing(average_folds(passes, folds, store)))

    def _watched_window(
        self, grid: TileGrid, plan: Plan, threads: RowThreads, folder: Path, recovery: Recovery | None
    ) -> RollingWindow:
        if recovery is None:
            return self._window(grid, threads, plan.placement.window, folder)
        window = recovery.run(lambda: self._window(grid, threads, recovery.plan.placement.window, folder, recovery.run))
        recovery.listeners.append(lambda following: window.move_to(following.placement.window, folder))
        return window

    def _passes(
        self, fold_tiles: Iterator[PredictedTiles], grid: TileGrid, window: RollingWindow, clock: StageClock
    ) -> Iterator[Iterator[LogitsSlab]]:
        for number, tiles in enumerate(fold_tiles):
            slabs = self._roll(tiles, grid, window, clock)
            yield slabs if self.list_of_parameters is None else self._naming_fold(slabs, number)

    def _naming_fold(self, slabs: Iterator[LogitsSlab], number: int) -> Iterator[LogitsSlab]:
        try:
            yield from slabs
        except (NonFiniteLogitsError, NetworkOutputError) as error:
            raise type(error)(f"{self._weights_name(number)}: {error}") from error

    def _tiles(self, grid: TileGrid) -> int:
        """Tiles of all folds."""
        return grid.tile_count * fold_count(self.list_of_parameters)

    def _observed(self, clock: StageClock) -> AbstractContextManager[PeakSampler | None]:
        """Show and tell the progress of a case; give its memory where somebody asks for that."""
        page = None if self._listener is None else self._listener.case
        asked = self.on_case is not None or self.on_progress is not None
        return observed(clock, self.allow_tqdm, asked, self.on_progress, page)

    def _model_facts(self, tile: TileBytes | None = None) -> ModelFacts:
        """Tell the planner of the model; of the network's memory what is known by now."""
        tile = self._tile_bytes() if tile is None else tile
        facts = ModelFacts(
            heads=self.label_manager.num_segmentation_heads,
            channels=self._input_channels(),
            folds=1,
            weight_bytes=weight_bytes(self.network, unless_on=self.device),
            activation_bytes=tile.certain,
            unmeasured_bytes=tile.uncertain,
            label_bytes=1 if len(self.label_manager.foreground_labels) < 255 else 2,
            threads=self._kernel_threads(),
        )
        return self._with_weights(facts)

    def _input_channels(self) -> int:
        return stock_calls.input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)

    def _tile_bytes(self) -> TileBytes:
        """Tell what the network takes for a tile: what was measured, or what its tensors tell."""
        key = (self._tile_shape(), bool(self._mirrored_axes()), str(self.device), self.fast)
        if self._known_tile is None or self._known_tile[0] is not self.network or self._known_tile[1] != key:
            network, channels = uncompiled(self.network), self.label_manager.num_segmentation_heads
            if (fast := self._fast()) is not None:
                network, channels = fast.body, fast.channels
            copies = 2 * channels if self._mirrored_axes() else 0
            self._known_tile = self.network, key, TileBytes.bounded(network, self._tile_shape(), copies)
        return self._known_tile[2]

    def _measure(self, tiles: PredictedTiles, attempt: Callable[[Callable[[], Any]], Any]) -> TileBytes:
        """Predict the first tile ahead, and remember what the network took for it."""
        with self._threads_for_tiles():
            taken = measure_ahead(tiles, attempt, self.device)
        before = self._tile_bytes()
        assert self._known_tile is not None, "it has just been asked for"
        self._known_tile = (*self._known_tile[:2], before.after(taken and taken + 4 * math.prod(self._tile_shape())))
        return self._known_tile[2]
