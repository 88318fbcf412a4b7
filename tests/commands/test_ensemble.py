"""Ensembling head by head against nnU-Net's own command."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json
from factory import ModelSpec
from model_table import REGIONS
from nnunetv2.ensembling.ensemble import ensemble_folders as stock_ensemble
from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from oracle import INSTALLED, assert_same_folder, make_predictor, predict_stock

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands.cli import main
from nnunet_lowmem.commands.ensemble import _mean, ensemble_folders, open_heads
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
    if "regions" in request.node.name:
        skip_where_probabilities_are_squashed_again()
    (tmp_path / "stock").mkdir()
    stock_ensemble([str(folder) for folder in predictions], str(tmp_path / "stock"), True, num_processes=1)
    arguments = ["ensemble", "-i", *map(str, predictions), "-o", str(tmp_path / "ours"), "--save_npz"]
    assert main(arguments) == 0
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def skip_where_probabilities_are_squashed_again() -> None:
    if INSTALLED < (2, 7):
        pytest.skip("nnU-Net before 2.7 takes the sigmoid of the averaged probabilities: nearly all is foreground")


@pytest.fixture
def one_head(request, images, models, tmp_path: Path) -> list[Path]:
    """What stock leaves of a model with a single region: numpy stores its array backwards if its axes were reversed."""
    files, transpose = images(request.param[0]), request.param[1]
    spec = ModelSpec(transpose_forward=transpose, labels={"background": 0, "whole": [1, 2]}, regions_class_order=(1,))
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, step_size in zip(folders, (0.5, 1.0), strict=True):
        folder.mkdir()
        predictor = make_predictor(nnUNetPredictor, models(spec, files), (0,), tile_step_size=step_size)
        predict_stock(predictor, [files], str(folder), save_probabilities=True)
    return folders


def is_fortran(folder: Path) -> bool:
    (path,) = folder.glob("*.npz")
    with open_heads(path) as archive:
        return archive.fortran_order


@pytest.mark.parametrize(
    ("one_head", "fortran"),
    [
        (("head_margin", (2, 1, 0)), True),
        (("head_margin", (0, 2, 1)), False),
        pytest.param(("head_margin", (0, 1, 2)), False, marks=pytest.mark.slow),
        (("one_slice", (0, 2, 1)), True),
    ],
    indirect=["one_head"],
    ids=str,
)
def test_single_region_equals_stock(one_head, fortran, tmp_path):
    skip_where_probabilities_are_squashed_again()
    assert [is_fortran(folder) for folder in one_head] == [fortran] * 2
    stock, name = tmp_path / "stock", next(one_head[0].glob("*.npz")).stem
    stock.mkdir()
    dataset_json, plans = (load_json(str(one_head[0] / f"{what}.json")) for what in ("dataset", "plans"))
    manager = PlansManager(plans)
    reader, labels = manager.image_reader_writer_class(), manager.get_label_manager(dataset_json)
    files = [str(folder / f"{name}.npz") for folder in one_head]
    # what the command does for each case, here without its pool
    merge_files(files, str(stock / name), dataset_json["file_ending"], reader, labels, True)
    shutil.copy(one_head[0] / "dataset.json", stock)
    list(ensemble_folders(one_head, tmp_path / "ours", True))
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_numpy_stores_backwards_only_what_has_one_head():
    for shape in itertools.product((1, 2, 3), repeat=4):
        for axes in itertools.permutations((1, 2, 3)):
            array = np.zeros(shape, np.float32).transpose(0, *axes)
            assert shape[0] == 1 or not np.lib.format.header_data_from_array_1_0(array)["fortran_order"]


def test_missing_archive_is_named(predictions, tmp_path):
    shutil.copy(predictions[0] / "head_margin.npz", predictions[0] / "other.npz")
    with pytest.raises(UsageError, match=r"lacks 1 of 2 archives; the first is other\.npz"):
        list(ensemble_folders(predictions, tmp_path / "ours", False))


def test_archives_of_different_shape_are_refused_with_both_shapes(predictions, tmp_path):
    np.savez_compressed(predictions[1] / "head_margin.npz", probabilities=np.zeros((2, 3, 4, 5), np.float32))
    with pytest.raises(UsageError, match=r"\(2, 3, 4, 5\)"):
        list(ensemble_folders(predictions, tmp_path / "ours", False))


def test_damaged_archive_is_named(predictions, tmp_path):
    (predictions[1] / "head_margin.npz").write_bytes(b"PK no zip")
    with pytest.raises(UsageError, match=r"head_margin\.npz is no archive"):
        list(ensemble_folders(predictions, tmp_path / "ours", False))


@pytest.mark.parametrize("place", [0.3, 0.7, 0.9])
def test_changed_archive_is_named(tmp_path, place):
    path = tmp_path / "case.npz"
    np.savez_compressed(path, probabilities=np.random.default_rng(0).random((2, 40, 30, 20), np.float32))
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 16
    path.write_bytes(content)
    with open_heads(path) as archive, pytest.raises(UsageError, match=r"case\.npz cannot be read"):
        _mean([archive, archive])
