"""``fast``: labels that agree, a head that is found where there is one, and networks that are left as they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from conftest import CT, read
from factory import ModelSpec
from oracle import make_predictor, read_voxels
from torch import nn

import nnunet_lowmem
from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.fast_network import fast_network

BUNDLED = Path(nnunet_lowmem.__file__).parent / "data" / "ct118"

pytestmark = pytest.mark.timeout(240)


def predict(images: Path, out: Path, **options) -> np.ndarray:
    predictor = LowMemPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(BUNDLED), (0,))
    predictor.predict_from_files(str(images), str(out))
    return read_voxels(next(out.glob("*.nii.gz")))


@pytest.fixture(scope="module")
def real_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    SimpleITK.WriteImage(read(CT), str(folder / "ct_0000.nii.gz"))
    return folder


@pytest.mark.parametrize("mirroring", [False, True])
def test_labels_agree_on_the_real_ct(mirroring, real_images, tmp_path, record_property):
    same, fast = (
        predict(real_images, tmp_path / str(flag), fast=flag, use_mirroring=mirroring) for flag in (False, True)
    )
    equal = np.mean(same == fast)
    sizes = np.bincount(same.ravel(), minlength=118) + np.bincount(fast.ravel(), minlength=118)
    both = np.bincount(same[same == fast], minlength=118)
    dice = 2 * both[sizes > 0] / sizes[sizes > 0]
    record_property("equal", equal)
    record_property("lowest_dice", dice.min())
    print(f"{np.count_nonzero(same != fast)} of {same.size} differ, {len(dice)} classes, lowest Dice {dice.min():.5f}")
    assert np.count_nonzero(sizes) > 50, "hardly a class is there to compare"
    assert equal >= 0.9999
    assert dice.min() >= 0.999
