"""Half-precision conversions and kernels bit for bit, and the facts of numpy, scipy and torch they rest on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from numba import njit
from reference import accumulate, axis_by_axis, half_of, product_of_weights, resample, sum_of_corners
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from nnunet_lowmem.labels import cells_cpu
from nnunet_lowmem.labels.cells_torch import round_to_half
from nnunet_lowmem.labels.resampling import flat_tables, nearest_axis, resampling_tables
from nnunet_lowmem.window import halves, kernels

ALL_BITS = np.arange(65536, dtype=np.uint32).astype(np.uint16)
ALL_HALVES = ALL_BITS.view(np.float16)
FINITE = ALL_HALVES[np.isfinite(ALL_HALVES)]


def each(function, values, dtype):
    """Call a compiled scalar function for every element."""

    @njit
    def loop(values, out):
        for i in range(values.size):
            out[i] = function(values[i])

    out = np.empty(values.shape, dtype)
    loop(values, out)
    return out


def midpoints() -> np.ndarray:
    """The float64 between every two neighbouring finite halves, and its float64 neighbours."""
    ordered = np.sort(FINITE[FINITE >= 0].astype(np.float64))
    middle = np.append((ordered[1:] + ordered[:-1]) / 2, 65520.0)
    return np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)])


def doubles() -> np.ndarray:
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal(200_000) * 10.0 ** rng.uniform(-9, 4.2, 200_000)
    ordinary = ordinary[np.abs(ordinary) < 65520]
    tiny = np.array([0.0, 5e-324, 2.0**-1074, 2.0**-25, np.nextafter(2.0**-25, 1), 2.0**-24, 2.0**-14, 1e-300])
    positive = np.concatenate([midpoints(), FINITE[FINITE >= 0].astype(np.float64), tiny])
    return np.concatenate([ordinary, positive, -positive])


def singles() -> np.ndarray:
    wide = doubles().astype(np.float32)
    edges = np.array([65504, 65519.996, 65520, 65536, 1e30, np.finfo(np.float32).max, np.inf, 1e-45, 1e-38], np.float32)
    neighbours = np.concatenate([np.nextafter(wide[:50_000], np.float32(0)), np.nextafter(wide[:50_000], edges[6])])
    return np.concatenate([wide, neighbours, edges, -edges])


# -- conversions


def test_half_to_single_is_exact_for_all_halves():
    actual = each(halves.half_to_single, ALL_BITS, np.float32)
    expected = ALL_HALVES.astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(actual[~number]).all()


def test_single_to_half_rounds_as_numpy():
    values = singles()
    assert np.array_equal(each(halves.single_to_half, values, np.uint16), half_of(values).view(np.uint16))


def test_single_to_half_keeps_nan():
    nan = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(each(halves.single_to_half, nan, np.uint16).view(np.float16)).all()


def test_halves_survive_the_way_to_single_and_back():
    bits = FINITE.view(np.uint16)
    assert np.array_equal(each(halves.single_to_half, each(halves.half_to_single, bits, np.float32), np.uint16), bits)


def test_keys_order_halves_as_their_values_do():
    keys = each(halves.half_key, ALL_BITS, np.int16)[~np.isnan(ALL_HALVES)].astype(int)
    values = ALL_HALVES[~np.isnan(ALL_HALVES)].astype(np.float64)
    order = np.argsort(values, kind="stable")
    assert np.array_equal(np.sign(np.diff(keys[order])), np.sign(np.diff(values[order])))


def test_double_to_half_key_rounds_once():
    values = doubles()
    expected = each(halves.half_key, half_of(values).view(np.uint16), np.int16)
    assert np.array_equal(each(halves.double_to_half_key, values, np.int16), expected)


def test_keys_lead_back_to_their_halves():
    keys = each(halves.half_key, FINITE.view(np.uint16), np.int16)
    assert np.array_equal(each(halves.key_to_double, keys, np.float64), FINITE.astype(np.float64))
    assert np.array_equal(each(halves.key_to_half, keys, np.uint16).view(np.float16), FINITE)


def test_torch_round_to_half_rounds_once():
    values = doubles()
    actual = round_to_half(torch.from_numpy(values)).numpy()
    assert np.array_equal(actual.view(np.uint16), half_of(values).view(np.uint16))


def test_torch_itself_rounds_doubles_twice():
    values = doubles()
    actual = torch.from_numpy(values).half().numpy()
    assert np.array_equal(actual.view(np.uint16), half_of(values.astype(np.float32)).view(np.uint16))
    assert not np.array_equal(actual, half_of(values))


# -- accumulation


def compiled_accumulate(window: torch.Tensor, tile: torch.Tensor, importance: torch.Tensor, origin, parts: int):
    arguments = window.numpy().view(np.uint16), tile.numpy(), importance.float().numpy(), tuple(origin)
    in_parts(kernels.accumulate, tile.shape[0] * tile.shape[1], parts, *arguments)


def in_parts(kernel: Callable[..., None], rows: int, parts: int, *arguments: Any) -> None:
    for start, stop in pairwise(np.linspace(0, rows, parts + 1).astype(int)):
        kernel(*arguments, int(start), int(stop))


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the sign of a zero; what is no number in both is not looked at."""
    number = ~expected.isnan()
    numbers = actual[number].view(torch.int16), expected[number].view(torch.int16)
    return torch.equal(actual.isnan(), ~number) and torch.equal(*numbers)


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    room=st.tuples(*[st.integers(0, 3)] * 3),
    exponent=st.floats(-7, 5),
    parts=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_accumulate_has_torchs_bits(heads, shape, room, exponent, parts, seed):
    """Tile after tile into overlapping places; large values overflow to infinity and then to NaN, as in torch."""
    rng = torch.Generator().manual_seed(seed)
    importance = (10 * torch.rand(shape, generator=rng) ** 40).half().clamp_min(2.0**-24)
    size = [a + b for a, b in zip(shape, room, strict=True)]
    expected = torch.zeros((heads, *size), dtype=torch.half)
    actual = expected.clone()
    for _ in range(4):
        tile = torch.randn((heads, *shape), generator=rng) * 10.0**exponent
        origin = [int(torch.randint(0, extra + 1, (), generator=rng)) for extra in room]
        compiled_accumulate(actual, tile, importance, origin, parts)
        accumulate(expected, tile, importance, origin)
    assert same_bits(actual, expected)


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    box=st.tuples(*[st.tuples(st.floats(0, 1), st.floats(0, 1))] * 3),
    parts=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_divide_has_torchs_bits_and_finds_what_is_not_finite(heads, shape, box, parts, seed):
    """Any bits by any weights, zero among them, in a box; what lies around it stays."""
    rng = np.random.default_rng(seed)
    window = torch.from_numpy(rng.choice(ALL_HALVES if seed % 2 else FINITE, (heads, *shape)))
    weights = torch.from_numpy(rng.choice(np.arange(0 if seed % 3 == 0 else 0.5, 90, 0.5).astype(np.float16), shape))
    origin = tuple(int(low * (size - 1)) for size, (low, _) in zip(shape, box, strict=True))
    sizes = tuple(1 + int(s * (size - 1 - o)) for size, o, (_, s) in zip(shape, origin, box, strict=True))
    expected, finite = window.clone(), np.empty(heads * sizes[0], np.bool_)
    inside = tuple(slice(first, first + size) for first, size in zip(origin, sizes, strict=True))
    expected[(slice(None), *inside)] /= weights[inside]
    arguments = window.numpy().view(np.uint16), weights.numpy().view(np.uint16), origin, sizes, finite
    in_parts(kernels.divide, len(finite), parts, *arguments)
    assert same_bits(window, expected)
    assert finite.tolist() == expected[(slice(None), *inside)].isfinite().all(-1).all(-1).flatten().tolist()


def test_accumulate_with_nnunets_gaussian_and_its_subnormal_corners():
    importance = compute_gaussian((40, 32, 24), sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    assert 0 < importance.min() < 2.0**-14
    rng = torch.Generator().manual_seed(1)
    expected = torch.zeros((2, 60, 32, 30), dtype=torch.half)
    actual = expected.clone()
    for start in (0, 7, 20, 20):
        tile = torch.randn((2, 40, 32, 24), generator=rng) * 20
        compiled_accumulate(actual, tile, importance, (start, 0, 6), 3)
        accumulate(expected, tile, importance, (start, 0, 6))
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))


def test_float_tiles_are_rounded_once_and_half_tiles_twice():
    rng = torch.Generator().manual_seed(2)
    importance = torch.rand((8, 8, 8), generator=rng).half()
    tile = (torch.randn((1, 8, 8, 8), generator=rng)).half()
    start = torch.randn((1, 8, 8, 8), generator=rng).half()
    once, twice = start.clone(), start.clone()
    accumulate(once, tile.float(), importance, (0, 0, 0))
    accumulate(twice, tile.clone(), importance, (0, 0, 0))
    product = tile.float() * importance.float()
    assert torch.equal(once, (start.float() + product).half())
    assert torch.equal(twice, (start.float() + product.half().float()).half())
    assert not torch.equal(once, twice)


# -- resampling one head


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    target=st.tuples(*[st.integers(1, 17)] * 3),
    axis=st.sampled_from([None, 0, 1, 2]),
    exponent=st.floats(-7, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_resampled_head_has_stocks_bits(shape, target, axis, exponent, seed):
    rng = np.random.default_rng(seed)
    logits = np.clip(rng.standard_normal((1, *shape)) * 10.0**exponent, -65504, 65504).astype(np.float16)
    out = np.empty(target, np.uint16)
    tables = flat_tables(resampling_tables(shape, target, axis))
    cells_cpu.resample_rows(logits.view(np.uint16), *tables, out, 0, target[0] * target[1])
    assert np.array_equal(out.view(np.float16), resample(logits, target, axis)[0])


# -- what the kernels rest on


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((9, 7, 8)).astype(np.float16).astype(np.float64)


TARGET = (23, 19, 31)


def resized(volume: np.ndarray, shape=TARGET) -> np.ndarray:
    return resize(volume, shape, 1, mode="edge", anti_aliasing=False)


def test_resize_sums_eight_products_in_turn(volume):
    assert np.array_equal(resized(volume), sum_of_corners(volume, TARGET))


def test_resize_does_not_clamp_the_coordinate(volume):
    assert not np.array_equal(resized(volume), sum_of_corners(volume, TARGET, clamp=True))


def test_resize_does_not_multiply_the_weights_first(volume):
    assert not np.array_equal(resized(volume), sum_of_corners(volume, TARGET, product_of_weights))


def test_resize_does_not_go_axis_by_axis(volume):
    assert not np.array_equal(resized(volume), axis_by_axis(volume, TARGET))


SHORTCUTS = {
    "clamped coordinate": lambda volume, shape: sum_of_corners(volume, shape, clamp=True),
    "weights multiplied first": lambda volume, shape: sum_of_corners(volume, shape, product_of_weights),
    "axis by axis": axis_by_axis,
    "by way of float32": lambda volume, shape: resized(volume, shape).astype(np.float32),
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_every_shortcut_reaches_the_half(shortcut):
    """Logits on a coarse grid of values meet the middle between two halves often."""
    volume = np.random.default_rng(4).integers(-40, 40, (30, 30, 30)) / 8.0
    shape = (44, 48, 56)
    exact = half_of(resized(volume, shape))
    assert np.array_equal(half_of(sum_of_corners(volume, shape)), exact)
    assert not np.array_equal(half_of(SHORTCUTS[shortcut](volume, shape)), exact)


def test_order_z_zero_breaks_ties_upwards():
    coordinates = 2.0 * (np.arange(4) + 0.5) - 0.5
    picked = map_coordinates(np.arange(8.0), coordinates[None], order=0, mode="nearest")
    assert picked.tolist() == [1, 3, 5, 7]
    assert nearest_axis(8, 4).low.tolist() == [1, 3, 5, 7]


@settings(deadline=None)
@given(n_in=st.integers(1, 60), n_out=st.integers(1, 120))
def test_nearest_axis_is_map_coordinates(n_in, n_out):
    coordinates = (n_in / n_out) * (np.arange(n_out) + 0.5) - 0.5
    picked = map_coordinates(np.arange(float(n_in)), coordinates[None], order=0, mode="nearest")
    assert nearest_axis(n_in, n_out).low.tolist() == picked.tolist()


@pytest.mark.parametrize("length", [1, 3, 65536])
def test_region_threshold_is_torchs_sigmoid(length):
    """Whole vectors and their remainders take different code in torch."""
    singles = torch.from_numpy(ALL_HALVES.copy()).float()[: 65536 // length * length]
    above = torch.cat([torch.sigmoid(part) for part in singles.split(length)]) > 0.5
    keys = each(halves.half_key, ALL_BITS, np.int16)[: len(above)]
    number = ~np.isnan(ALL_HALVES[: len(above)])
    assert np.array_equal(above.numpy()[number], (keys >= cells_cpu.REGION_THRESHOLD_KEY)[number])
    assert np.array([cells_cpu.REGION_THRESHOLD_KEY], np.uint16).view(np.float16)[0] == 2.0**-23
