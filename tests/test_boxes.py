from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lowmem.boxes import bounds, box_within, common, in_words, joined, parse_box, without
from nnunet_lowmem.errors import UsageError


@pytest.mark.parametrize(
    "value",
    [
        "10:50,0:128,:",
        " 10 : 50 , 0:128 , : ",
        [slice(10, 50), slice(0, 128), slice(None)],
        ((10, 50), (0, 128), (None, None)),
    ],
)
def test_a_box_is_text_or_three_ranges(value: Any):
    assert parse_box(value) == ((10, 50), (0, 128), (None, None))
    assert in_words(parse_box(value) or ()) == "10:50,0:128,:"


@pytest.mark.parametrize("value", [None, "", ()])
def test_nothing_is_no_box(value: Any):
    assert parse_box(value) is None


@pytest.mark.parametrize(
    "value", ["3", "1:2,3:4", "1:2:3,:,:", "a:b,:,:", "-1:3,:,:", 7, [slice(0, 4, 2)] * 3, [(1,)] * 3, [(0.5, 3)] * 3]
)
def test_what_is_no_box_is_refused_in_a_line_that_says_how(value: Any):
    with pytest.raises(UsageError, match="write z0:z1,y0:y1,x0:x1 in voxels of the file, the stop excluded") as raised:
        parse_box(value)
    assert "\n" not in str(raised.value)


def test_ends_that_are_left_out_are_the_volumes():
    assert box_within(((10, None), (None, 5), (None, None)), (12, 9, 7)) == (slice(10, 12), slice(0, 5), slice(0, 7))


@pytest.mark.parametrize(("bbox", "told"), [
    (((0, 13), (0, 1), (0, 1)), "along z it goes from 0 to 13, there are 12"),
    (((0, 1), (9, None), (0, 1)), "along y it goes from 9 to 9, there are 9"),
    (((0, 1), (0, 1), (5, 4)), "along x it goes from 5 to 4, there are 7"),
])  # fmt: skip
def test_a_box_that_is_not_in_the_volume_is_refused_with_both_numbers(bbox: Any, told: str):
    with pytest.raises(UsageError, match=told):
        box_within(bbox, (12, 9, 7))


# -- what several leave of one

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
