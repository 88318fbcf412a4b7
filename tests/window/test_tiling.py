"""Tiles where stock nnU-Net puts them, in its order, and rows along the axis that rolls."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from numpy import array, empty

from nnunet_lowmem.window.tiling import axis_starts, tile_grid

STEP = st.one_of(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 1.0]), st.floats(0.05, 1.0))
WIDE_STEP = st.floats(0.25, 1.0)  # the number of tiles grows with the third power
SHAPE = st.tuples(*[st.integers(1, 24)] * 3)
PATCH = st.one_of(st.tuples(*[st.integers(3, 24)] * 2), st.tuples(*[st.integers(3, 24)] * 3))


def stock_slicers(padded_shape, patch_size, step_size):
    predictor = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch_size), tile_step_size=step_size, verbose=False
    )
    return nnUNetPredictor._internal_get_sliding_window_slicers(predictor, padded_shape)


def slicer_start(slicer):
    return tuple(place.start if isinstance(place, slice) else place for place in slicer[1:])


@settings(deadline=None)
@given(size=st.integers(1, 2000), tile=st.integers(1, 300), step=STEP)
def test_starts_are_stocks(size, tile, step):
    assume(size >= tile)
    assert list(axis_starts(size, tile, step)) == compute_steps_for_sliding_window((size,), (tile,), step)[0]


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH, step=WIDE_STEP)
def test_tiles_come_in_stocks_order(shape, patch, step):
    grid = tile_grid(shape, patch, step)
    ours = [start for row_start, _ in grid.rows() for start in grid.row_tiles(row_start)]
    assert ours == [slicer_start(slicer) for slicer in stock_slicers(grid.padded_shape, patch, step)]
    assert len(ours) == grid.tile_count


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH)
def test_padding_is_stocks(shape, patch):
    grid = tile_grid(shape, patch, 0.5)
    image = empty((1, *shape), dtype="uint8")
    padded, inverse = pad_nd_image(image, patch, "constant", {"constant_values": 0}, True, None)
    assert grid.padded_shape == padded.shape[1:]
    assert grid.padding == tuple(place.start for place in inverse[1:])


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH, step=STEP)
def test_rows_end_where_no_later_tile_reaches(shape, patch, step):
    grid = tile_grid(shape, patch, step)
    axis, rows = grid.roll_axis, list(grid.rows())
    assert rows[0][0] == 0
    assert rows[-1][1] == grid.padded_shape[axis]
    for (start, final), (following, _) in pairwise(rows):
        assert final == following
        assert final - start <= grid.tile_shape[axis]


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH, step=STEP)
def test_axes_before_the_one_that_rolls_have_a_single_tile(shape, patch, step):
    grid = tile_grid(shape, patch, step)
    assert all(len(grid.starts[axis]) == 1 for axis in range(grid.roll_axis))
    assert len(grid.starts[grid.roll_axis]) > 1 or grid.tile_count == 1


def test_rounding_can_repeat_a_start():
    starts = axis_starts(9, 8, 0.05)
    assert list(starts) == compute_steps_for_sliding_window((9,), (8,), 0.05)[0]
    assert len(set(starts)) < len(starts)


@pytest.mark.parametrize("step", [0, -0.5, 1.0001, float("nan"), float("inf")])
def test_step_size_outside_its_range_is_refused(step):
    with pytest.raises(AssertionError, match="tile step size must be larger than 0 and at most 1"):
        tile_grid((9, 9, 9), (4, 4, 4), step)


@pytest.mark.parametrize("patch", [(4,), (4, 4, 4, 4)])
def test_patch_of_other_dimensions_is_refused(patch):
    with pytest.raises(ValueError, match="patch size must have two or three entries"):
        tile_grid((9, 9, 9), patch, 0.5)


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH, step=WIDE_STEP, data=st.data())
def test_a_part_has_the_tiles_of_the_whole_that_touch_its_box(shape, patch, step, data):
    whole = tile_grid(shape, patch, step)
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    stops = [data.draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True)]
    part = whole.part(tuple(slice(*ends) for ends in zip(starts, stops, strict=True)))

    def tiles(grid, offset):
        return [tuple(array(tile) + offset) for row, _ in grid.rows() for tile in grid.row_tiles(row)]

    touching = [
        tile
        for tile in tiles(whole, whole.offset)
        if all(
            start < tile[axis] + whole.tile_shape[axis] and tile[axis] < stop
            for axis, (start, stop) in enumerate(zip(starts, stops, strict=True))
        )
    ]
    assert tiles(part, part.offset) == touching
    assert part.tile_count == len(touching)
    for axis in range(3):
        assert part.offset[axis] + part.padding[axis] == starts[axis]
        assert part.image_shape[axis] == stops[axis] - starts[axis]
        assert part.padding[axis] + part.image_shape[axis] <= part.padded_shape[axis]
    chosen = array([data.draw(st.booleans()) for _ in product(*part.starts)]).reshape([len(s) for s in part.starts])
    needed = {tile for tile, is_chosen in zip(product(*part.starts), chosen.flat, strict=True) if is_chosen}
    assert {tile for tile in product(*part.starts) if part.only(chosen).is_needed(tile)} == needed


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1.0), min_size=2, max_size=2), st.integers(1280, 3000), st.data())
def test_a_tenth_of_a_volume_of_ten_patches_an_axis_costs_three_tenths_of_its_tiles_at_most(shares, size, data):
    third = 0.1 / (shares[0] * shares[1])
    assume(0.1 <= third <= 1)
    whole = tile_grid((size,) * 3, (128,) * 3, 0.5)
    sides = [round(size * share) for share in (*shares, third)]
    starts = [data.draw(st.integers(0, size - side)) for side in sides]
    part = whole.part(tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
    assert part.tile_count <= 0.3 * whole.tile_count


@settings(deadline=None)
@given(shape=SHAPE, patch=PATCH, step=WIDE_STEP)
def test_columns_are_what_is_told_of_them_and_all_of_the_image(shape, patch, step):
    grid = tile_grid(shape, patch, step)
    for counts in grid.columns():
        assert counts[grid.roll_axis] == 1
        cuts = [grid.pieces(axis, count) for axis, count in enumerate(counts)]
        for pieces, size in zip(cuts, shape, strict=True):
            assert [voxel for start, stop in pieces for voxel in range(start, stop)] == list(range(size))
        largest, share = grid.cut(counts)
        parts = [grid.part(tuple(slice(max(0, start - 1), stop) for start, stop in box)) for box in product(*cuts)]
        assert round(share * grid.tile_count) == sum(part.tile_count for part in parts)
        for axis in range(3):
            assert largest.image_shape[axis] == max(part.image_shape[axis] for part in parts)
            assert largest.padded_shape[axis] == max(part.padded_shape[axis] for part in parts)
