"""Labels of interpolated logits, slab by slab: equal to resampling every head and deciding afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import argmax_labels, cuts, region_labels, resample

from nnunet_lowmem.boxes import whole
from nnunet_lowmem.labels import cells_torch
from nnunet_lowmem.labels.labeller import Labelling, LabelMap, SlabLabeller
from nnunet_lowmem.labels.resampling import resampling_tables
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.window.slabs import LogitsSlab

KINDS = ("normal", "integers", "close", "smooth", "constant", "near_threshold", "largest")


@dataclass(frozen=True)
class Task:
    """Logits and how to label them; slabs run along `axis` and end at `places`."""

    logits: NDArray[np.float16]
    target: tuple[int, int, int]
    separate_axis: int | None
    ranked: bool
    axis: int = 0
    places: Sequence[int] = ()
    margin: tuple[int, int, int] = (0, 0, 0)
    threads: int = 1

    @property
    def rule(self) -> LabelRule:
        heads = len(self.logits)
        values = np.arange(heads + 1) if self.ranked else np.append(0, 1 + np.random.default_rng(0).permutation(heads))
        return LabelRule(self.ranked, values.astype(np.uint16), np.dtype(np.uint8 if heads < 255 else np.uint16))


def make_logits(kind: str, heads: int, shape: tuple[int, ...], scale: float, seed: int) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((heads, *shape))
    if kind == "integers":
        return rng.integers(-3, 4, noise.shape).astype(np.float16)
    if kind == "close":  # heads a few units in the last place apart, beside voxels of another magnitude
        base = (rng.standard_normal(shape) * scale * 2.0 ** rng.integers(-4, 5, shape)).astype(np.float16)
        return np.clip(base.view(np.int16) + rng.integers(0, 4, noise.shape, np.int16), -1025, 31743).view(np.float16)
    if kind == "smooth":
        grid = sum(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
        return (scale * (np.linspace(-1, 1, heads)[:, None, None, None] * grid + 0.1 * noise)).astype(np.float16)
    if kind == "constant":
        return np.broadcast_to(noise[:, :1, :1, :1] * scale, noise.shape).astype(np.float16)
    if kind == "near_threshold":
        return (rng.integers(-4, 5, noise.shape) * 2.0**-24).astype(np.float16)
    if kind == "largest":
        return rng.choice(np.array([65504, -65504, 65472, -65472, 2.0**-24, 0, -0.0], np.float16), noise.shape)
    return (noise * scale).astype(np.float16)


def expected_labels(task: Task) -> NDArray[np.integer]:
    resampled = resample(task.logits, task.target, task.separate_axis)
    if task.ranked:
        return argmax_labels(resampled)
    return region_labels(resampled, task.rule.values[1:])


def slab_of(task: Task, start: int, stop: int) -> LogitsSlab:
    """The planes in a buffer of their own, NaN around them: whatever is read outside shows."""
    first = max(start - 1, 0)
    chosen = [slice(None)] * 4
    chosen[task.axis + 1] = slice(first, stop)
    box = task.logits[tuple(chosen)]
    padding = [(0, 0), *((size, 2 * size) for size in task.margin)]
    buffer = torch.from_numpy(np.pad(box, padding, constant_values=np.nan))
    return LogitsSlab(task.axis, start, stop, first, buffer, task.margin, box.shape[1:])


def slab_labels(task: Task) -> NDArray[np.integer]:
    tables = resampling_tables(task.logits.shape[1:], task.target, task.separate_axis)
    labels = np.full(task.target, 251, task.rule.dtype)
    with RowThreads(task.threads) as threads:
        labeller = SlabLabeller(tables, Labelling(task.rule, threads), LabelMap(labels), whole(task.target))
        for start, stop in cuts(task.logits.shape[task.axis + 1], task.places):
            labeller.add(slab_of(task, start, stop))
        labeller.finish()
    return labels


def device_labels(task: Task, block_bytes: int = 1 << 28) -> NDArray[np.integer]:
    tables = resampling_tables(task.logits.shape[1:], task.target, task.separate_axis)
    winners = cells_torch.winners(torch.from_numpy(task.logits), tables, task.ranked, block_bytes)
    return task.rule.values[winners.numpy()]


@st.composite
def tasks(draw) -> Task:
    shape = draw(st.tuples(*[st.integers(1, 9)] * 3))
    return Task(
        logits=make_logits(
            draw(st.sampled_from(KINDS)),
            draw(st.one_of(st.integers(1, 5), st.just(40))),
            shape,
            10.0 ** draw(st.floats(-7, 3)),
            draw(st.integers(0, 2**32 - 1)),
        ),
        target=draw(st.one_of(st.just(shape), st.tuples(*[st.integers(1, 15)] * 3))),
        separate_axis=draw(st.sampled_from([None, 0, 1, 2])),
        ranked=draw(st.booleans()),
        axis=draw(st.integers(0, 2)),
        places=draw(st.lists(st.integers(1, 8), max_size=8)),
        margin=draw(st.tuples(*[st.integers(0, 2)] * 3)),
        threads=draw(st.integers(1, 2)),
    )


@settings(deadline=None, max_examples=400)
@given(task=tasks())
def test_slabs_give_stocks_labels(task):
    assert np.array_equal(slab_labels(task), expected_labels(task))


@settings(deadline=None, max_examples=100)
@given(task=tasks(), block_bytes=st.sampled_from([1, 2_000, 1 << 28]))
def test_device_path_gives_stocks_labels(task, block_bytes):
    assert np.array_equal(device_labels(task, block_bytes), expected_labels(task))


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("labels_of", [slab_labels, device_labels])
@pytest.mark.parametrize("separate_axis", [None, 0, 2])
@pytest.mark.parametrize("kind", ["normal", "integers", "close", "smooth"])
def test_larger_volumes(kind, separate_axis, labels_of, ranked):
    logits = make_logits(kind, 6, (17, 21, 24), 3.0, 7)
    task = Task(logits, (31, 34, 29), separate_axis, ranked, places=(3, 4, 11), threads=2)
    assert np.array_equal(labels_of(task), expected_labels(task))


@pytest.mark.parametrize("ranked", [True, False])
def test_many_heads_and_sixteen_bit_labels(ranked):
    task = Task(make_logits("normal", 300, (4, 5, 6), 1.0, 0), (7, 9, 8), None, ranked, axis=1, places=(2,))
    labels = slab_labels(task)
    assert labels.dtype == np.uint16
    assert labels.max() > 255
    assert np.array_equal(labels, expected_labels(task))
    assert np.array_equal(device_labels(task), expected_labels(task))


def test_label_map_may_be_a_transposed_view():
    task = Task(make_logits("normal", 4, (5, 6, 7), 1.0, 0), (9, 8, 11), None, True)
    labels = np.zeros((11, 9, 8), np.uint8).transpose(1, 2, 0)
    with RowThreads(2) as threads:
        tables = resampling_tables((5, 6, 7), task.target, None)
        labeller = SlabLabeller(tables, Labelling(task.rule, threads), LabelMap(labels), whole(task.target))
        labeller.add(slab_of(task, 0, 5))
    assert np.array_equal(labels, expected_labels(task))


# -- the margin for rounding

BOTH = pytest.mark.parametrize("labels_of", [slab_labels, device_labels])


def two_corners(winner: tuple[float, float], rival: tuple[float, float], target: int) -> Task:
    """Head 1 is larger than head 0 at both positions of the last axis."""
    logits = np.array([rival, winner], np.float16).reshape(2, 1, 1, 2)
    assert np.array_equal(logits.astype(float).ravel(), [*rival, *winner]), "the values are not halves"
    assert (logits[1] > logits[0]).all()
    return Task(logits, (1, 1, target), None, True)


@BOTH
def test_rounding_lets_a_lower_class_win_a_tie(labels_of):
    """One unit in the last place at every corner is too little: without a margin all would be 1."""
    task = two_corners((1026.0, 1027.0), (1025.0, 1026.0), 1)
    expected = expected_labels(task)
    assert 0 in expected
    assert np.array_equal(labels_of(task), expected)


@BOTH
def test_margin_takes_its_unit_from_the_largest_corner(labels_of):
    """Head 1 leads by eight units of the small corner, and by one of the large one."""
    task = two_corners((100.5, 1401.0), (100.0, 1400.0), 8)
    expected = expected_labels(task)
    assert 0 in expected
    assert np.array_equal(labels_of(task), expected)


@BOTH
def test_margin_regards_every_lower_class(labels_of):
    """The best rival differs from corner to corner; neither of them is close at both."""
    logits = np.array([[1025.0, 0.0], [0.0, 1026.0], [1026.0, 1027.0]], np.float16).reshape(3, 1, 1, 2)
    task = Task(logits, (1, 1, 9), None, True)
    assert np.array_equal(labels_of(task), expected_labels(task))


@BOTH
def test_a_higher_class_never_wins_a_tie(labels_of):
    logits = np.array([[1026.0, 1027.0], [1025.0, 1026.0]], np.float16).reshape(2, 1, 1, 2)
    task = Task(logits, (1, 1, 8), None, True)
    assert not expected_labels(task).any()
    assert not labels_of(task).any()


def test_slabs_that_end_early_are_noticed():
    task = Task(make_logits("normal", 2, (6, 5, 6), 1.0, 0), (7, 8, 9), None, True)
    with RowThreads(1) as threads:
        tables = resampling_tables((6, 5, 6), task.target, None)
        labeller = SlabLabeller(
            tables, Labelling(task.rule, threads), LabelMap(np.zeros(task.target, np.uint8)), whole(task.target)
        )
        labeller.add(slab_of(task, 0, 4))
        with pytest.raises(AssertionError):
            labeller.finish()
