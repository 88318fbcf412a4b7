"""Masks of nonzero voxels: holes are those of scipy, whatever planes are looked at together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from scipy.ndimage import binary_fill_holes

from nnunet_lowmem.preprocessing import crop
from nnunet_lowmem.volumes.mapped import spilled_array


@settings(deadline=None, max_examples=300)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    share=st.floats(0, 1),
    slab_voxels=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_holes_are_scipys(shape, share, slab_voxels, seed):
    mask = np.random.default_rng(seed).random(shape) < share
    expected = binary_fill_holes(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crop, "SLAB_VOXELS", slab_voxels)
        crop.fill_holes(mask)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("opened", [False, True])
def test_a_hole_that_winds_through_all_slabs(opened, monkeypatch):
    """A tube down, along and up again: only its last voxel tells whether it leads out."""
    monkeypatch.setattr(crop, "SLAB_VOXELS", 2 * 7 * 7)
    image = np.ones((1, 20, 7, 7))
    image[0, 3:18, 2, 2] = image[0, 17, 2, 2:5] = image[0, 5:18, 2, 4] = 0
    if opened:
        image[0, 5, :3, 4] = 0
    expected = create_nonzero_mask(image)
    assert expected.all() != opened
    assert np.array_equal(crop.nonzero_mask(list(image)), expected)


def test_channels_are_joined_before_holes_are_filled():
    image = np.zeros((2, 5, 6, 7), np.int16)
    image[0, 1:4, 1:5, 1:3] = image[1, 1:4, 1:5, 3:6] = -4
    image[:, 2, 2:4, 2:4] = 0
    assert np.array_equal(crop.nonzero_mask(list(image)), create_nonzero_mask(image))


def test_a_mask_may_lie_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(crop, "SLAB_VOXELS", 60)
    image = (np.random.default_rng(1).random((1, 12, 9, 8)) < 0.6).astype(np.uint8)
    mask = crop.nonzero_mask(list(image), lambda shape, dtype: spilled_array(shape, dtype, tmp_path))
    assert isinstance(mask, np.memmap)
    assert np.array_equal(mask, create_nonzero_mask(image))
