"""Boxes: what several leave of one, in as many pieces as it takes and with no voxel twice."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lowmem.boxes import bounds, common, joined, without

SIZE = 6
SIDE = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda ends: slice(min(ends), max(ends)))
BOX = st.tuples(SIDE, SIDE, SIDE)


def painted(boxes):
    counts = np.zeros((SIZE,) * 3, int)
    for box in boxes:
        counts[box] += 1
    return counts


@settings(deadline=None)
@given(box=BOX, taken=st.lists(BOX, max_size=4), order=st.sampled_from(list(permutations(range(3)))))
def test_what_is_left_of_a_box_is_there_once(box, taken, order):
    expected = (painted([box]) > 0) & (painted(taken) == 0)
    left = without(box, taken, order)
    assert np.array_equal(painted(left), expected)
    assert not painted([bounds(left)])[np.nonzero(~painted([box]).astype(bool))].any()


@given(one=BOX, other=BOX)
def test_what_two_share_and_join_to(one, other):
    shared = common(one, other)
    assert np.array_equal(painted([] if shared is None else [shared]), painted([one]) * painted([other]))
    both = joined(one, other)
    if both is not None:
        assert np.array_equal(painted([both]), painted([one, other]))


def test_the_last_axis_in_the_order_is_cut_most():
    """So that columns stay whole: of the one that was begun, what is behind is left, and of the others all."""
    whole = (slice(0, 6), slice(0, 6), slice(0, 6))
    begun = (slice(0, 2), slice(0, 3), slice(0, 6))
    assert without(whole, [begun], [1, 2, 0]) == [
        (slice(0, 6), slice(3, 6), slice(0, 6)),
        (slice(2, 6), slice(0, 3), slice(0, 6)),
    ]
