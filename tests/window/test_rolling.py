"""The rolling window against stock's sliding window: same network, same tiles, same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from factory import ModelSpec
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import ModelError, NonFiniteLogitsError
from nnunet_lowmem.network.tile_memory import LiveTensorBytes
from nnunet_lowmem.predict.logits import TileNetwork
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import PreprocessedCase
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.rolling import RollingWindow, average_folds, roll
from nnunet_lowmem.window.slabs import LogitsSlab, collect_slabs
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource
from nnunet_lowmem.window.tiling import TileGrid, tile_grid

HEADS = 3
CPU = torch.device("cpu")


class SmallNetwork(nn.Module):
    """Two convolutions with random weights; `half` gives what autocast gives on CUDA, half tiles."""

    def __init__(self, dims: int = 3, half: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.layers = nn.Sequential(conv(1, 4, 3, padding=1), nn.LeakyReLU(), conv(4, HEADS, 1))
        self.half_output = half

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        logits = 5 * self.layers(tile)
        return logits.half() if self.half_output else logits


def predictor(
    cls: type[nnUNetPredictor],
    patch: tuple[int, ...],
    network: nn.Module,
    folds: int = 1,
    mirror: Any = None,
    **options,
) -> nnUNetPredictor:
    spec = ModelSpec(labels=HEADS, patch_size=patch)
    plans, dataset = PlansManager(spec.plans()), spec.dataset_json()
    weights = [SmallNetwork(len(patch), seed=fold).state_dict() for fold in range(folds)]
    made = cls(device=CPU, allow_tqdm=False, **options)
    configuration = plans.get_configuration(spec.configuration)
    made.manual_initialization(network, plans, configuration, weights, dataset, "nnUNetTrainer", mirror)
    return made


def both(patch: tuple[int, ...], half: bool = False, **options) -> list[nnUNetPredictor]:
    return [
        predictor(cls, patch, SmallNetwork(len(patch), half), **options) for cls in (nnUNetPredictor, LowMemPredictor)
    ]


def image(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def assert_same_bits(ours: torch.Tensor, stock: torch.Tensor):
    assert ours.dtype == stock.dtype == torch.half
    assert torch.equal(ours.view(torch.int16), stock.contiguous().view(torch.int16))


IMAGES_AND_PATCHES = {
    "one_tile": ((8, 10, 6), (8, 10, 6)),
    "smaller_than_patch": ((5, 9, 3), (8, 10, 6)),
    "smaller_along_one_axis": ((20, 7, 15), (8, 10, 6)),
    "several_along_axis_0": ((23, 10, 6), (8, 10, 6)),
    "several_along_axis_1": ((8, 27, 6), (8, 10, 6)),
    "several_along_axis_2": ((6, 10, 17), (8, 10, 6)),
    "several_along_1_and_2": ((7, 16, 13), (8, 10, 6)),
    "several_everywhere": ((19, 23, 14), (8, 10, 6)),
    "one_plane_more": ((9, 11, 7), (8, 10, 6)),
    "long": ((90, 10, 6), (8, 10, 6)),
    "odd_patch": ((17, 12, 13), (7, 5, 9)),
    "patch_of_one_plane": ((7, 12, 13), (1, 8, 8)),
    "flat": ((7, 21, 19), (8, 10)),
    "flat_one_slice": ((1, 21, 19), (8, 10)),
    "flat_smaller": ((4, 5, 19), (8, 10)),
    "flat_one_tile": ((5, 8, 10), (8, 10)),
}


@pytest.mark.parametrize("shape, patch", IMAGES_AND_PATCHES.values(), ids=IMAGES_AND_PATCHES)
@pytest.mark.parametrize("half", [False, True], ids=["float_tiles", "half_tiles"])
def test_logits_are_stocks(shape, patch, half):
    stock, ours = (p.predict_sliding_window_return_logits(image(shape)) for p in both(patch, half))
    assert_same_bits(ours, stock)


@pytest.mark.parametrize("step", [0.1, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("gaussian", [True, False])
def test_step_sizes_and_weighting(step, gaussian):
    pair = both((6, 8, 5), tile_step_size=step, use_gaussian=gaussian)
    stock, ours = (p.predict_sliding_window_return_logits(image((15, 11, 12))) for p in pair)
    assert_same_bits(ours, stock)


def test_repeated_starts_count_twice():
    pair = both((8, 8, 8), tile_step_size=0.05)
    starts = tile_grid((9, 8, 8), (8, 8, 8), 0.05).starts[0]
    assert len(set(starts)) < len(starts)
    stock, ours = (p.predict_sliding_window_return_logits(image((9, 8, 8))) for p in pair)
    assert_same_bits(ours, stock)


def test_mirroring():
    stock, ours = (
        p.predict_sliding_window_return_logits(image((15, 11, 12))) for p in both((6, 8, 5), mirror=(0, 1, 2))
    )
    assert_same_bits(ours, stock)


@pytest.mark.parametrize("folds", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_folds_of_stocks_own_method(folds, threads):
    stock = predictor(nnUNetPredictor, (8, 10, 6), SmallNetwork(), folds)
    ours = predictor(LowMemPredictor, (8, 10, 6), SmallNetwork(), folds, kernel_threads=threads)
    logits = [p.predict_logits_from_preprocessed_data(image((19, 12, 14))) for p in (stock, ours)]
    assert_same_bits(logits[1], logits[0])


# -- slabs


@contextmanager
def rolling(
    stock: nnUNetPredictor, case: PreprocessedCase, step: float = 0.5
) -> Iterator[tuple[TileGrid, RollingWindow]]:
    patch = tuple(stock.configuration_manager.patch_size)
    grid = tile_grid(case.image.shape[1:], patch, step)
    importance = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=CPU)
    with RowThreads(2) as threads:
        yield grid, RollingWindow(grid, HEADS, importance.reshape(grid.tile_shape), threads)


def slabs_of(network: Callable, case: PreprocessedCase, grid: TileGrid, window: RollingWindow) -> Iterator[LogitsSlab]:
    return roll(PredictedTiles(network, TileSource(case, grid), grid, CPU), grid, window, lambda: None, None)


def case_of(shape: tuple[int, ...]) -> PreprocessedCase:
    return PreprocessedCase(image(shape).numpy(), None, {})


@pytest.mark.parametrize("shape, patch", IMAGES_AND_PATCHES.values(), ids=IMAGES_AND_PATCHES)
def test_slabs_follow_each_other_and_keep_the_plane_before(shape, patch):
    """The labeller needs the last plane of the slab before as a neighbour."""
    stock = predictor(nnUNetPredictor, patch, SmallNetwork(len(patch)))
    whole = stock.predict_sliding_window_return_logits(image(shape))
    done = 0
    with rolling(stock, case_of(shape)) as (grid, window):
        for slab in slabs_of(stock.network, case_of(shape), grid, window):
            assert slab.start == done < slab.stop
            assert slab.first == max(0, slab.start - 1)
            box = slab.buffer
            for axis in range(3):
                box = box.narrow(axis + 1, slab.origin[axis], slab.shape[axis])
            assert_same_bits(box.contiguous(), whole.narrow(slab.axis + 1, slab.first, slab.stop - slab.first))
            assert torch.equal(slab.logits, whole.narrow(slab.axis + 1, slab.start, slab.stop - slab.start))
            done = slab.stop
    assert done == shape[slab.axis]


@pytest.mark.parametrize("shape", [(19, 12, 14), (8, 27, 6), (6, 10, 17), (5, 9, 3)], ids=str)
@pytest.mark.parametrize("folds", [1, 2, 3, 5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_mean_over_folds_is_stocks(shape, folds, on_disk, tmp_path: Path):
    stock = predictor(nnUNetPredictor, (8, 10, 6), SmallNetwork(), folds)
    expected = stock.predict_logits_from_preprocessed_data(image(shape))
    case = case_of(shape)

    def passes(grid: TileGrid, window: RollingWindow) -> Iterator[Iterator[LogitsSlab]]:
        for weights in stock.list_of_parameters:
            stock.network.load_state_dict(weights)
            yield slabs_of(stock.network, case, grid, window)

    with (
        rolling(stock, case) as (grid, window),
        PlaneStore(HEADS, grid.image_shape, grid.roll_axis, tmp_path if on_disk else None) as store,
    ):
        slabs = average_folds(passes(grid, window), folds, store if folds > 1 else None)
        assert_same_bits(collect_slabs(slabs, HEADS, shape), expected)


def test_stopping_halfway_and_rolling_again_starts_afresh():
    stock = predictor(nnUNetPredictor, (8, 10, 6), SmallNetwork())
    case = case_of((30, 12, 8))
    with rolling(stock, case) as (grid, window):
        half_done = slabs_of(stock.network, case, grid, window)
        next(half_done)
        half_done.close()
        again = collect_slabs(slabs_of(stock.network, case, grid, window), HEADS, (30, 12, 8))
    assert_same_bits(again, stock.predict_sliding_window_return_logits(image((30, 12, 8))))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_memory_does_not_grow_with_the_length(axis):
    peaks = []
    for length in (40, 400):
        shape = [8, 8, 8]
        shape[axis] = length
        network = SmallNetwork()
        stock = predictor(nnUNetPredictor, (8, 8, 8), network)
        case = case_of(tuple(shape))
        compute_gaussian.cache_clear()
        with LiveTensorBytes() as counter, rolling(stock, case) as (grid, window):
            planes = sum(slab.stop - slab.start for slab in slabs_of(network, case, grid, window))
        assert planes == length
        peaks.append(counter.peak_bytes)
    window_bytes = 2 * (HEADS + 1) * 9 * 8 * 8
    assert peaks[1] == peaks[0] > window_bytes


# -- network input


@pytest.mark.parametrize("shape", [(19, 12, 14), (5, 9, 3), (8, 27, 6)], ids=str)
def test_tiles_of_a_cascade_are_stocks(shape):
    """Stock stacks the one-hot previous stage on the whole image and pads it all."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((2, *shape)).astype(np.float32)
    stage = rng.integers(-1, 4, shape).astype(np.int8)
    stacked = np.vstack((data, convert_labelmap_to_one_hot(stage, [1, 2, 3], data.dtype)))
    padded = pad_nd_image(torch.from_numpy(stacked), (8, 10, 6), "constant", {"value": 0}, False, None)
    grid = tile_grid(shape, (8, 10, 6), 0.5)
    source = TileSource(PreprocessedCase(data, stage, {}), grid, (1, 2, 3))
    for row, _ in grid.rows():
        for start in grid.row_tiles(row):
            place = tuple(slice(first, first + size) for first, size in zip(start, (8, 10, 6), strict=True))
            assert torch.equal(source.tile(start)[0], padded[(slice(None), *place)])


def test_image_may_be_read_only():
    data = image((19, 12, 14)).numpy()
    data.flags.writeable = False
    grid = tile_grid((19, 12, 14), (8, 10, 6), 0.5)
    tile = TileSource(PreprocessedCase(data, None, {}), grid).tile((0, 2, 6))
    assert torch.equal(tile[0], torch.from_numpy(data[:, :8, 2:12, 6:12].copy()))


# -- what goes wrong


class Spoiling(SmallNetwork):
    """Does `spoil` to the output of the third tile."""

    def __init__(self, spoil: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.spoil = spoil
        self.calls = 0

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tile)
        self.calls += 1
        if self.calls == 3:
            self.spoil(logits)
        return logits


def put(value: float) -> Callable[[torch.Tensor], None]:
    def spoil(logits: torch.Tensor) -> None:
        logits[0, 1, 4, 5, 3] = value

    return spoil


@pytest.mark.parametrize(
    "value, words", [(np.nan, "0 infinite and 1 NaN"), (np.inf, "1 infinite"), (1e30, "1 infinite")]
)
def test_logits_that_are_not_finite_are_an_error(value, words):
    ours = predictor(LowMemPredictor, (8, 10, 6), Spoiling(put(value)))
    with pytest.raises(NonFiniteLogitsError, match=f"{words}.* in plane .* of axis 0"):
        ours.predict_sliding_window_return_logits(image((40, 10, 6)))


@pytest.mark.parametrize("box, plane", [(None, 0), ("12:28,:,:", 8)], ids=str)
def test_what_is_not_finite_in_a_part_is_named_as_in_the_whole_image(box, plane):
    """All is infinite: the first plane of the first tile tells."""
    ours = predictor(LowMemPredictor, (8, 10, 6), SmallNetwork())
    ours.bbox = box
    ours.list_of_parameters[0]["layers.2.bias"].fill_(1e30)
    told = rf"in plane {plane} of axis 0 .* at \({plane}, 0, 0\) in the tiles that start at \({plane}, 0, 0\) to"
    with pytest.raises(NonFiniteLogitsError, match=told):
        ours.predict_single_npy_array(image((40, 10, 6)).numpy(), {"spacing": [3.9, 4.2, 4.3]})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_error(value):
    network = SmallNetwork()
    ours = predictor(LowMemPredictor, (8, 10, 6), network)
    network.layers[2].bias.data[1] = value
    with pytest.raises(NonFiniteLogitsError):
        ours.predict_sliding_window_return_logits(image((20, 10, 6)))


class Reshaping(SmallNetwork):
    """Gives something else than logits of the tile's shape."""

    def __init__(self, dims: int, reshape: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(dims)
        self.reshape = reshape

    def forward(self, tile: torch.Tensor) -> Any:
        return self.reshape(super().forward(tile))


RESHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "fewer heads": lambda y: y[:, :2].contiguous(),
    "more heads": lambda y: torch.cat([y, y], 1),
    "one head": lambda y: y[:, 1:2],
    "half the resolution": lambda y: y[..., ::2, ::2].contiguous(),
    "a voxel narrower": lambda y: y[..., :-1].contiguous(),
    "a voxel": lambda y: y[..., :1],
    "larger": lambda y: nn.functional.pad(y, (2, 2)),
    "axes exchanged": lambda y: y.transpose(-1, -2),
    "no batch axis": lambda y: y[0],
    "no batch axis and one head": lambda y: y[0, :1],
    "one axis more": lambda y: y[None],
    "batch of two": lambda y: torch.cat([y, y + 1]),
    "list of resolutions": lambda y: [y, y[..., ::2]],
    "with something beside": lambda y: (y, None),
    "integers": lambda y: (10 * y).int(),
    "complex": lambda y: y.to(torch.complex64),
    "numpy": lambda y: y.numpy(),
    "double": lambda y: y.double() / 3,
    "bfloat16": lambda y: y.bfloat16(),
    "not contiguous": lambda y: y.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize(
    "patch", [pytest.param((8, 10, 6), id="3d"), pytest.param((10, 6), id="2d", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", RESHAPES)
def test_output_of_another_shape_does_what_it_does_in_stock(kind, patch, caplog):
    """Broadcasting included; what does not fit is an error and never read or written beside the buffer."""
    stock, ours = (
        predictor(c, patch, Reshaping(len(patch), RESHAPES[kind])) for c in (nnUNetPredictor, LowMemPredictor)
    )
    data = image((11, 13, 9))
    try:
        expected = stock.predict_sliding_window_return_logits(data)
    except Exception:  # an AttributeError of a list, say
        with pytest.raises(RuntimeError, match=r"network's output for the tile at \(0, 0, 0\).*\(3, .*10, 6\)"):
            ours.predict_sliding_window_return_logits(data)
    else:
        assert_same_bits(ours.predict_sliding_window_return_logits(data), expected)
        assert ("every head gets it" in caplog.text) == ("one head" in kind or kind == "no batch axis")


def test_output_of_another_shape_names_the_fold():
    ours = predictor(LowMemPredictor, (8, 10, 6), SmallNetwork(), folds=2)
    second = ours.list_of_parameters[1]["layers.2.bias"]
    network = Reshaping(3, lambda y: y[:, :2] if torch.equal(network.layers[2].bias, second) else y)
    ours.network = network
    with pytest.raises(RuntimeError, match=r"entry 1 of list_of_parameters: .*\(2, 8, 10, 6\).*\(3, 8, 10, 6\)"):
        ours.predict_single_npy_array(image((8, 20, 9)).numpy(), {"spacing": [3.9, 4.2, 4.3]})


@pytest.mark.parametrize("shape", [(16, 10, 12), (8, 30, 6)], ids=str)
@pytest.mark.parametrize("values", [(40000.0, 40000.0), (-40000.0, -40000.0), (65000.0, 40000.0, -65000.0)], ids=str)
def test_sum_over_folds_that_is_infinite_is_an_error(shape, values):
    """Stock takes labels from it without a word; here the kernels need numbers."""
    ours = predictor(LowMemPredictor, (8, 10, 6), SmallNetwork(), folds=len(values))
    for weights, value in zip(ours.list_of_parameters, values, strict=True):
        weights["layers.2.weight"].zero_()
        weights["layers.2.bias"].fill_(value / 5)
    # no voxel in two tiles, or one fold's own sum would be infinite
    ours.use_gaussian, ours.tile_step_size = False, 1
    for bbox, plane in ((None, 0), ("3:,:,:", 3) if shape[0] > 8 else (":,11:,:", 11)):
        ours.bbox = bbox
        with pytest.raises(NonFiniteLogitsError, match=f"of {len(values)} folds is infinite in plane {plane}"):
            ours.predict_single_npy_array(image(shape).numpy(), {"spacing": [3.9, 4.2, 4.3]})


def test_infinity_is_an_error_in_stock_too():
    stock = predictor(nnUNetPredictor, (8, 10, 6), Spoiling(put(np.inf)))
    with pytest.raises(RuntimeError, match="Encountered inf"):
        stock.predict_sliding_window_return_logits(image((40, 10, 6)))
    assert issubclass(NonFiniteLogitsError, RuntimeError)


def test_exception_of_the_network_passes_through_and_no_thread_stays():
    class UnusualError(Exception):
        pass

    error = UnusualError("third tile")

    def fail(logits: torch.Tensor) -> None:
        raise error

    ours = predictor(LowMemPredictor, (8, 10, 6), Spoiling(fail), kernel_threads=3)
    before = set(threading.enumerate())
    with pytest.raises(UnusualError) as caught:
        ours.predict_sliding_window_return_logits(image((40, 10, 6)))
    assert caught.value is error
    assert ours.network.calls == 3
    assert set(threading.enumerate()) == before


def test_second_fold_that_does_not_fit_is_named():
    ours = predictor(LowMemPredictor, (8, 10, 6), nn.Conv3d(1, HEADS, 1), folds=2)
    ours.list_of_parameters = [ours.network.state_dict(), nn.Conv3d(1, HEADS + 1, 1).state_dict()]
    with pytest.raises(ModelError, match=r"entry 1 of list_of_parameters do not fit.*size mismatch"):
        TileNetwork(ours.picture()).load(1)


def test_tile_outside_the_window_is_caught_before_the_kernel_writes():
    grid = tile_grid((20, 8, 8), (8, 8, 8), 0.5)
    with RowThreads(1) as threads:
        window = RollingWindow(grid, HEADS, torch.ones(8, 8, 8, dtype=torch.half), threads)
        with pytest.raises(AssertionError, match="outside"):
            window.add(torch.zeros(HEADS, 8, 8, 8), (4, 0, 0))
