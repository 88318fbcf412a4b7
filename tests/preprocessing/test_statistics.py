"""Statistics of a volume read in pieces against numpy's own of the whole: the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_lowmem.preprocessing import statistics
from nnunet_lowmem.preprocessing.statistics import extremes, matches_numpy, mean_and_deviation

ORDERS = list(itertools.permutations(range(3)))
VALUES: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "ct": lambda random, shape: random.integers(-1024, 3000, shape, dtype=np.int16),
    "mri": lambda random, shape: random.gamma(2, 300, shape).astype(np.float32),
    "float64": lambda random, shape: random.normal(0, 1e-3, shape),
    "big_endian": lambda random, shape: random.normal(1e6, 1e6, shape).astype(">f4"),
    "nothing_is_left_of_the_sum": lambda random, shape: (
        np.sign(random.normal(size=shape)) * random.lognormal(0, 9, shape)
    ),
    "constant": lambda random, shape: np.full(shape, random.normal(), np.float32),
    "negative_zeros": lambda random, shape: np.full(shape, -0.0, np.float32),
    "denormal": lambda random, shape: random.normal(0, 1e-44, shape).astype(np.float32),
    "overflow": lambda random, shape: random.normal(1e38, 1e38, shape).clip(-3e38, 3e38).astype(np.float32),
    "infinite": lambda random, shape: np.where(random.random(shape) < 0.01, np.inf, 1).astype(np.float32),
    "nan": lambda random, shape: np.where(random.random(shape) < 0.01, np.nan, 1).astype(np.float32),
}

many = settings(
    max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    leaf, buffer = statistics._LEAF, np.getbufsize()
    with np.errstate(all="ignore"):
        yield
    statistics._LEAF = leaf
    np.setbufsize(buffer)


def assert_same_bits(ours: tuple[np.float32, np.float32], numpys: tuple[np.float32, np.float32]) -> None:
    for a, b in zip(ours, numpys, strict=True):
        assert type(a) is type(b) is np.float32
        assert a.tobytes() == b.tobytes() or (np.isnan(a) and np.isnan(b)), (ours, numpys)


def cut(volume: np.ndarray, size: int) -> Callable[[], Iterator[np.ndarray]]:
    """Pieces of at most that many values, in one buffer that each overwrites."""

    def pieces() -> Iterator[np.ndarray]:
        buffer = np.empty(size, volume.dtype)
        flat = volume.reshape(-1)
        for i in range(0, len(flat), size):
            piece = buffer[: len(flat[i : i + size])]
            piece[:] = flat[i : i + size]
            yield piece

    return pieces


def check(part: np.ndarray, whole: tuple[int, ...], size: int, orders: list[tuple[int, ...]] = ORDERS) -> None:
    """Ours of a part of a volume against numpy's of the float32 volume, transposed before or after it is cropped."""
    is_cropped = part.shape[1] < whole[1], part.shape[2] < whole[2]
    ours = mean_and_deviation(cut(part, size), part.shape, is_cropped)
    volume = np.zeros((1, *whole), np.float32)
    image = volume[0, -part.shape[0] :, -part.shape[1] :, -part.shape[2] :]
    image[...] = part
    for order in orders:
        seen = image.transpose(order)
        assert_same_bits(ours, (seen.mean(), seen.std()))


def test_the_order_of_the_installed_numpy_is_known() -> None:
    assert matches_numpy()


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    length = st.one_of(st.sampled_from([1, 2]), st.integers(1, 70))
    shape = draw(st.tuples(length, length, length))
    return shape, tuple(n + draw(st.sampled_from([0, 0, 1, 9])) for n in shape)


@many
@given(
    parts(),
    st.sampled_from(sorted(VALUES)),
    st.sampled_from([16, 160, 1024, 8192]),
    st.integers(1, 30_000),
    st.integers(0, 99),
)
def test_part(shapes, values, buffer, size, seed) -> None:
    shape, whole = shapes
    statistics._LEAF = 128 + 37 * (seed % 9)
    np.setbufsize(buffer)
    check(VALUES[values](np.random.default_rng(seed), shape), whole, max(size, np.prod(shape) // 200))


@pytest.mark.parametrize("margin", [(0, 0, 0), (3, 0, 0), (0, 2, 0), (0, 0, 1), (1, 1, 7)])
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, n) for n in (1, 7, 8, 127, 128, 129, 1025, 8191, 8192, 8193, 100_003)],
        *[(n, 1, 1) for n in (129, 8193, 20_011)],
        *[(1, n, 1) for n in (129, 8193, 20_011)],
        (40, 64, 128),  # a plane is numpy's buffer
        (40, 63, 130),
        (40, 64, 129),
        (7, 331, 331),
        (3, 5, 8192),
        (3, 5, 8193),
        (3, 9000, 2),
        (300, 1, 97),
        (1, 300, 97),
        (300, 97, 1),
    ],
)
def test_shapes_at_the_edges_of_numpys_blocks(shape, margin) -> None:
    values = VALUES["nothing_is_left_of_the_sum"](np.random.default_rng(1), shape).astype(np.float32)
    whole = tuple(n + m for n, m in zip(shape, margin, strict=True))
    check(values, whole, 50_021, orders=[(0, 1, 2), (2, 0, 1)])


@many
@given(parts(), st.floats(0, 1), st.sampled_from(ORDERS), st.integers(1, 5000), st.integers(0, 99))
def test_mask(shapes, share, order, size, seed) -> None:
    random = np.random.default_rng(seed)
    image = random.normal(300, 100, shapes[1]).astype(np.float32)[tuple(map(slice, shapes[0]))].transpose(order)
    mask = random.random(image.shape) < share
    statistics._LEAF = 200
    if mask.any():
        masked = image[mask]
        ours = mean_and_deviation(cut(masked, size), (1, 1, len(masked)))
        assert_same_bits(ours, (image[mask].mean(), image[mask].std()))


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Degrees of freedom")
def test_empty_mask() -> None:
    assert np.isnan(mean_and_deviation(list, (1, 1, 0))).all()


def test_larger_than_leaves() -> None:
    volume = np.random.default_rng(2).integers(-1000, 2000, (50, 300, 200), dtype=np.int16)
    check(volume, (50, 300, 200), 8 * 300 * 200, orders=[(0, 1, 2)])
    check(volume, (50, 301, 201), 8 * 300 * 200, orders=[(1, 0, 2)])


@pytest.mark.parametrize("count", [999, 1001])
def test_pieces_must_hold_as_many_values_as_the_shape(count) -> None:
    with pytest.raises(ValueError, match="values than the shape"):
        mean_and_deviation(cut(np.zeros(count, np.float32), 100), (10, 10, 10))


def test_an_unknown_order_is_not_taken_for_a_known_one(monkeypatch) -> None:
    find, by_axes = statistics._chunks_of_numpy.__wrapped__, statistics._chunks_by_axes
    names = ["_chunks_by_axes", "_chunks_of_buffer"]
    other = next(law for law in map(vars(statistics).get, names) if law is not find())
    one_by_one, across_planes = (
        lambda runs: iter([1] * int(np.prod(runs))),
        lambda runs: by_axes([runs[0], int(np.prod(runs[1:]))] if len(runs) > 1 else runs),
    )
    for wrong in (other, one_by_one, across_planes):
        for name in names:
            monkeypatch.setattr(statistics, name, wrong)
        assert find() is None


@many
@given(parts(), st.sampled_from(sorted(VALUES)), st.integers(1, 5000), st.integers(0, 99))
def test_extremes(shapes, values, size, seed) -> None:
    volume = VALUES[values](np.random.default_rng(seed), shapes[0])
    image = volume.astype(np.float32)
    ours = extremes(cut(volume, size))
    assert [type(v) for v in ours] == [np.float32] * 2
    np.testing.assert_array_equal(ours, (image.min(), image.max()))
