"""``fast``: labels that agree, a head that is found where there is one, and networks that are left as they are."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from images import BUNDLED_MODEL, CT, read
from oracle import make_predictor, read_voxels
from torch import nn

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import ModelError
from nnunet_lowmem.network.fast_layers import FastNorm
from nnunet_lowmem.network.fast_network import fast_network
from nnunet_lowmem.predict.ways import Ways

pytestmark = pytest.mark.timeout(240)


# -- agreement


def label_map(model: Any, files: Any, out: Path, folds: Any = (0,), **options: Any) -> np.ndarray:
    predictor = make_predictor(LowMemPredictor, str(model), folds, **options)
    predictor.predict_from_files([files], [str(out)])
    return read_voxels(out.with_name(out.name + ".nii.gz"))


@pytest.mark.parametrize(
    "part, mirroring",
    [
        (np.s_[20:100, 20:90, 40:90], False),
        pytest.param(np.s_[:], False, marks=pytest.mark.slow),
        pytest.param(np.s_[:], True, marks=pytest.mark.slow),
    ],
)
def test_labels_agree_on_the_real_ct(part, mirroring, tmp_path):
    SimpleITK.WriteImage(read(CT)[part], str(tmp_path / "ct_0000.nii.gz"))
    same, fast = (
        label_map(
            BUNDLED_MODEL, [str(tmp_path / "ct_0000.nii.gz")], tmp_path / str(flag), fast=flag, use_mirroring=mirroring
        )
        for flag in (False, True)
    )
    sizes = np.bincount(same.ravel(), minlength=118) + np.bincount(fast.ravel(), minlength=118)
    there = sizes > 0
    dice = 2 * np.bincount(same[same == fast], minlength=118)[there] / sizes[there]
    print(f"{np.count_nonzero(same != fast)} of {same.size} differ; {len(dice)} classes, least Dice {dice.min():.5f}")
    assert len(dice) > 40, "hardly a class is there to compare"
    assert np.mean(same == fast) >= 0.9999
    assert dice.min() >= 0.999


MR = ModelSpec(labels=5, mirror_axes=(0, 1, 2))
NETWORKS = {
    "plain": MR,
    "residual encoder": ModelSpec(labels=5, architecture="ResidualEncoderUNet", mirror_axes=(0,)),
    "two-dimensional": ModelSpec(labels=5, patch_size=(28, 20), spacing=(4.2, 4.3), mirror_axes=(0, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_close_and_no_tile_of_them_is_made(name, models, images):
    files = images("head")
    plain, fast = (make_predictor(LowMemPredictor, models(NETWORKS[name], files), fast=flag) for flag in (False, True))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    expected, found = (made.predict_sliding_window_return_logits(image).float() for made in (plain, fast))
    parts = Ways(fast.picture()).taken()
    assert parts.head_layer is not None
    assert parts.channels == parts.head().weights.shape[1]
    assert any(isinstance(module, FastNorm) for module in parts.body.modules())
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()
    assert not torch.equal(found, expected), "fast changes nothing here"


def test_every_fold_has_its_own_head(models, images, tmp_path):
    files = images("head")
    model = models(ModelSpec(labels=5, folds=(0, 1)), files)
    maps = [label_map(model, files, tmp_path / str(flag), (0, 1), fast=flag) for flag in (False, True)]
    assert np.mean(maps[0] == maps[1]) >= 0.999


# -- heads and networks that are none


class Network(nn.Module):
    """Two convolutions; `after` is what happens to their output."""

    def __init__(self, after=lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 1)
        self.after = after

    def forward(self, tile):
        return self.after(self.last(self.first(tile)))


TILE = (1, 1, 8, 8, 8)


def test_a_last_convolution_is_a_head():
    network = Network()
    fast = fast_network(network, TILE, 2)
    assert fast.head_layer is network.last
    assert fast.channels == 4


@pytest.mark.parametrize("after", [lambda x: x * 2, lambda x: x.clamp_(max=0.1), lambda x: x.flip(2)])
def test_a_convolution_that_something_follows_is_no_head(after):
    network = Network(after)
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(tile)
        fast = fast_network(network, TILE, 2)
        assert fast.head_layer is None
        torch.testing.assert_close(fast.features(tile, ()), expected)


def test_a_network_that_cannot_be_followed_is_left_alone(caplog):
    network = Network(lambda x: x if x.sum() > 0 else -x)
    with caplog.at_level(logging.WARNING):
        assert fast_network(network, TILE, 2) is None
    assert "fast: the network runs as it does without" in caplog.text
    assert network.first.weight.is_contiguous()


def test_a_network_that_needs_its_channels_first_says_so():
    needy = Network(lambda x: x.clone(memory_format=torch.channels_last_3d).view(-1))
    fast = replace(fast_network(Network(), TILE, 1), body=needy)
    with pytest.raises(ModelError, match="needs its channels first"), torch.inference_mode():
        fast.features(torch.zeros(TILE), ())
