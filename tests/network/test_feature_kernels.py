"""Kernels that work on features and on bfloat16 bits, beside torch and numpy, for every number of channels."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_lowmem.network import denormals, kernels
from nnunet_lowmem.network.exact import add_flipped, constant_bits, flips_of, mirrored_mean
from nnunet_lowmem.network.fast_layers import FastNorm, bits_of
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.window import kernels as window_kernels

EXTREME = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81],
    np.uint16,
)
CHANNELS = range(1, 41)


def random_bits(*shape: int, seed: int = 0) -> np.ndarray:
    """Any bits, the extreme ones among them: denormals, both zeros and infinities, NaN."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    chosen = rng.random(shape) < 0.1
    bits[chosen] = rng.choice(EXTREME, int(chosen.sum()))
    return bits


def moderate_bits(*shape: int, seed: int = 0) -> np.ndarray:
    return bits_of(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16))


def values_of(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


def rounded(values: np.ndarray) -> np.ndarray:
    return bits_of(torch.from_numpy(values).to(torch.bfloat16))


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit, but for which NaN it is."""
    nan = np.isnan(values_of(expected))
    assert np.array_equal(np.isnan(values_of(found)), nan)
    assert np.array_equal(found[~nan], expected[~nan])


def test_every_number_is_widened_as_torch_does():
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).reshape(256, 256)
    values = np.empty(every.shape, np.float32)
    kernels.widen(every, values, 0, 256)
    assert np.array_equal(values.view(np.uint32), values_of(every).view(np.uint32))


def test_singles_are_rounded_to_even_as_torch_does():
    rng = np.random.default_rng(0)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    bits = np.concatenate([rng.integers(0, 2**32, 10**5, dtype=np.uint32), ties, ties - 1, ties + 1])
    values = bits.view(np.float32).reshape(-1, 1)
    found = np.array([kernels.single_to_bits(value) for value in values[:, 0]], np.uint16)
    assert_same_bits(found, rounded(values)[:, 0])


@pytest.mark.parametrize("channels", CHANNELS)
def test_scaled_and_bent_as_in_single_precision(channels):
    bits = random_bits(70, channels, seed=channels)
    rng = np.random.default_rng(channels)
    centre, scale, shift = rng.standard_normal((3, channels)).astype(np.float32)
    with np.errstate(all="ignore"):
        single = (values_of(bits) - centre) * scale + shift
        expected = rounded(np.where(single > 0, single, single * np.float32(0.01)))
    kernels.scale_and_bend_bits(bits, centre, scale, shift, np.float32(0.01), 0, 70)
    assert_same_bits(bits, expected)


@pytest.mark.parametrize("channels", CHANNELS)
def test_sums_are_those_of_double_precision(channels):
    bits = moderate_bits(1000, channels, seed=channels)
    sums = np.empty((7, 2, channels))
    kernels.channel_sums_of_bits(bits, sums, 0, 7)
    values = values_of(bits).astype(np.float64)
    values -= values[0]
    np.testing.assert_allclose(sums.sum(axis=0), [values.sum(axis=0), (values**2).sum(axis=0)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 16, 33])
@pytest.mark.parametrize("affine", [False, True])
def test_normalisation_is_torchs_rounded_once(channels, affine):
    torch.manual_seed(channels)
    norm = nn.InstanceNorm3d(channels, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    features = torch.randn(1, channels, 9, 8, 7).mul_(3).add_(50).to(torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        expected = nn.functional.leaky_relu(norm(features.float()), 0.01)
        with RowThreads(2) as threads:
            found = FastNorm(norm, 0.01, False, threads)(features)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-8, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, 3.0e4, -1.0e-3])
def test_normalisation_of_a_constant_is_what_is_added(value):
    """Sums of squares less squared sums would leave anything here, and the root of a negative number."""
    norm = nn.InstanceNorm3d(2, affine=True)
    nn.init.constant_(norm.bias, 0.5)
    features = torch.full((1, 2, 6, 6, 6), value, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = FastNorm(norm, 1.0, False, RowThreads(1))(features.contiguous(memory_format=torch.channels_last_3d))
    assert torch.equal(found, torch.full_like(found, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6, 7), (1, 1, 3, 4, 5), (1, 3, 6, 7)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_flipped_sums_are_torchs(dtype, shape, last):
    axes = range(2, len(shape))
    order = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    for flips in product([False, True], repeat=len(axes)):
        total = torch.randn(shape, generator=generator).contiguous(memory_format=order)
        added = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=order)
        flipped = [axis for axis, flip in zip(axes, flips, strict=True) if flip]
        expected = total + added.float().flip(flipped)
        with RowThreads(2) as threads:
            add_flipped(total, added, flipped, threads)
        assert torch.equal(total, expected)


def test_mean_over_mirrors_is_stocks_and_a_constant_tile_is_one_pass():
    weights = torch.randn(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    passes = []

    def network(tile: torch.Tensor) -> torch.Tensor:
        passes.append(tile)
        return tile.repeat(1, 2, 1, 1, 1) * weights + 1

    varied = torch.randn(1, 1, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    constant = torch.full_like(varied, -1.5)
    for tile, collapses, expected_passes in ((varied, True, 8), (constant, True, 1), (constant, False, 8)):
        expected = network(tile)
        for axes in flips_of((0, 1, 2)):
            expected += network(tile.flip(axes)).flip(axes)
        expected /= 8
        passes.clear()
        with RowThreads(1) as threads:
            assert torch.equal(mirrored_mean(network, tile, (0, 1, 2), threads, collapses), expected)
        assert len(passes) == expected_passes


def test_a_tile_is_constant_bit_by_bit():
    tile = torch.zeros(1, 2, 3, 4, 5)
    tile[0, 1] = 2.5
    assert constant_bits(tile) == torch.tensor([0.0, 2.5]).numpy().tobytes()
    tile[0, 0, 1, 2, 3] = -0.0
    assert constant_bits(tile) is None
    assert constant_bits(torch.full((1, 1, 2, 2), float("nan"))) is not None


@pytest.mark.parametrize("channels", [1, 5, 32])
def test_channels_are_put_first(channels):
    features = np.random.default_rng(0).standard_normal((kernels.BLOCK * 2 + 3, channels)).astype(np.float32)
    out = np.empty(features.shape[::-1], np.float32)
    with RowThreads(2) as threads:
        threads.run(kernels.channels_first, 3, features, out)
    assert np.array_equal(out, features.T)


def test_denormals_are_counted_and_left_out():
    tiny = np.finfo(np.float32).tiny
    numbers = np.array([0, -0.0, tiny, -tiny, tiny / 2, -tiny / 2, 1e-45, 1, np.inf, np.nan], np.float32)
    weights = torch.from_numpy(numbers)
    assert denormals.count(weights) == 3
    found = denormals.without(weights).numpy()
    assert np.array_equal(found[[4, 5, 6]], np.zeros(3, np.float32))
    kept = [2, 3, 7, 8]
    assert np.array_equal(found[kept], numbers[kept])
    assert np.isnan(found[9])


@pytest.mark.parametrize("channels", [1, 7, 32])
def test_a_head_of_bits_is_that_of_the_numbers(channels):
    rng = np.random.default_rng(channels)
    bits = moderate_bits(3, 9, 5, channels)
    weights, bias = rng.standard_normal((4, channels)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    importance = rng.random((3, 9, 5)).astype(np.float32)
    windows = [np.zeros((4, 5, 12, 8), np.uint16) for _ in range(2)]
    window_kernels.accumulate_head(windows[0], values_of(bits), weights, bias, importance, (1, 2, 3), 0, 3)
    window_kernels.accumulate_head_of_bits(windows[1], bits, weights, bias, importance, (1, 2, 3), 0, 3)
    assert windows[0].any()
    assert np.array_equal(*windows)
