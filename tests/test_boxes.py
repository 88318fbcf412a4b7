from __future__ import annotations

from typing import Any

import pytest

from nnunet_lowmem.boxes import box_within, in_words, parse_box
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
