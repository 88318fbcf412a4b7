"""Ensembling head by head against nnU-Net's own command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from factory import ModelSpec
from model_table import REGIONS
from nnunetv2.ensembling.ensemble import ensemble_folders as stock_ensemble
from oracle import INSTALLED, assert_same_folder, make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.cli import main
from nnunet_lowmem.ensembling import ensemble_folders
from nnunet_lowmem.errors import UsageError


@pytest.fixture(params=["labels", "regions"])
def predictions(request, images, models, tmp_path: Path) -> list[Path]:
    options = REGIONS if request.param == "regions" else {}
    files = images("head_margin")
    folders = []
    for number, step_size in enumerate((0.5, 1.0)):
        spec = ModelSpec(transpose_forward=(2, 0, 1), **options)
        predictor = make_predictor(LowMemPredictor, models(spec, files), (0,), tile_step_size=step_size)
        folders.append(tmp_path / str(number))
        predictor.predict_from_files([files], str(folders[-1]), save_probabilities=True)
    return folders


def test_equals_stock(predictions, tmp_path, request):
    if INSTALLED < (2, 7) and "regions" in request.node.name:
        pytest.skip("nnU-Net before 2.7 takes the sigmoid of the averaged probabilities: nearly all is foreground")
    (tmp_path / "stock").mkdir()
    stock_ensemble([str(folder) for folder in predictions], str(tmp_path / "stock"), True, num_processes=1)
    arguments = ["ensemble", "-i", *map(str, predictions), "-o", str(tmp_path / "ours"), "--save_npz"]
    assert main(arguments) == 0
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_missing_archive_is_named(predictions, tmp_path):
    shutil.copy(predictions[0] / "head_margin.npz", predictions[0] / "other.npz")
    with pytest.raises(UsageError, match=r"lacks 1 of 2 archives; the first is other\.npz"):
        ensemble_folders(predictions, tmp_path / "ours", False)


def test_archives_of_different_shape_are_refused_with_both_shapes(predictions, tmp_path):
    np.savez_compressed(predictions[1] / "head_margin.npz", probabilities=np.zeros((2, 3, 4, 5), np.float32))
    with pytest.raises(UsageError, match=r"\(2, 3, 4, 5\)"):
        ensemble_folders(predictions, tmp_path / "ours", False)


def test_damaged_archive_is_named(predictions, tmp_path):
    (predictions[1] / "head_margin.npz").write_bytes(b"PK no zip")
    with pytest.raises(UsageError, match=r"head_margin\.npz is no archive"):
        ensemble_folders(predictions, tmp_path / "ours", False)
