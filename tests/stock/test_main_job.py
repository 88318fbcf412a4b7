"""The bundled CT through the bundled 118-class model: the real command against stock's API, file against file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from images import BUNDLED_MODEL, CT, DATA, read
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_folder, read_voxels

COMMAND = Path(sys.executable).parent / "nnUNetv2_predict_lowmem"
CASE = "ct_abdomen"


def at_spacing(image: SimpleITK.Image, spacing: tuple[float, float, float]) -> SimpleITK.Image:
    """The same field of view on another grid, linearly interpolated; axis order x y z."""
    pairs = zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)
    size = [round(voxels * old / new) for voxels, old, new in pairs]
    out = SimpleITK.ResampleImageFilter()
    out.SetReferenceImage(image)
    out.SetSize(size)
    out.SetOutputSpacing(spacing)
    out.SetInterpolator(SimpleITK.sitkLinear)
    out.SetDefaultPixelValue(-1024)
    return out.Execute(image)


@pytest.fixture(scope="session")
def two_folds(tmp_path_factory) -> Path:
    """The bundled model with a second fold beside its own."""
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path_factory.mktemp("ct118") / "model"))
    shutil.copytree(DATA / "ct118_fold_1", folder / "fold_1")
    return folder


def write_case(image: SimpleITK.Image, folder: Path) -> Path:
    folder.mkdir()
    SimpleITK.WriteImage(image, str(folder / f"{CASE}_0000.nii.gz"))
    return folder


def predict_with_command(images: Path, out: Path, model: Path, folds: Sequence[int], flags: Sequence[str]) -> str:
    arguments = ["-i", images, "-o", out, "-m", model, "-f", *folds, "-device", "cpu", "--disable_progress_bar", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    command = [str(word) for word in (COMMAND, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def predict_with_stock(images: Path, out: Path, model: Path, folds: Sequence[int], mirror: bool) -> None:
    """Stock's API in this process, on as many threads as its command would use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
        out.mkdir()
        predictor.predict_from_files_sequential(str(images), str(out))
    finally:
        torch.set_num_threads(threads)


def assert_command_equals_stock(
    image: SimpleITK.Image, folder: Path, model: Path, folds: Sequence[int], flags: Sequence[str] = ("--disable_tta",)
) -> np.ndarray:
    """Same files, and in them the same bytes of header and voxels; returns the labels."""
    images = write_case(image, folder / "images")
    predict_with_stock(images, folder / "stock", model, folds, mirror="--disable_tta" not in flags)
    predict_with_command(images, folder / "ours", model, folds, flags)
    assert_same_folder(folder / "stock", folder / "ours")
    labels = read_voxels(folder / "ours" / f"{CASE}.nii.gz")
    assert labels.shape == image.GetSize()
    return labels


def crop() -> SimpleITK.Image:
    """Liver, spine and kidney, 72 x 64 x 64 voxels of 3 mm: two tiles."""
    return read(CT)[20:92, 15:79, 26:90]


@pytest.fixture(scope="module")
def one_fold(tmp_path_factory) -> np.ndarray:
    """Labels of the crop, found equal to stock's."""
    return assert_command_equals_stock(crop(), tmp_path_factory.mktemp("one_fold"), BUNDLED_MODEL, [0])


def test_one_fold_on_the_networks_own_grid(one_fold):
    assert len(np.unique(one_fold)) > 15


@pytest.mark.slow
def test_two_folds(one_fold, two_folds, tmp_path):
    labels = assert_command_equals_stock(crop(), tmp_path, two_folds, [0, 1])
    assert not np.array_equal(labels, one_fold), "the second fold must count"


@pytest.mark.slow
def test_resampling_from_a_finer_grid(tmp_path):
    labels = assert_command_equals_stock(
        at_spacing(crop()[:60, :60, :50], (1.7, 1.9, 2.3)), tmp_path, BUNDLED_MODEL, [0]
    )
    assert len(np.unique(labels)) > 10


@pytest.mark.slow
def test_resampling_with_a_separate_axis(tmp_path):
    """Slices of 6 mm, pixels of 1.6 mm: nnU-Net interpolates in the plane and copies along the axis."""
    labels = assert_command_equals_stock(at_spacing(crop()[:60, :60, :], (1.6, 1.6, 6.0)), tmp_path, BUNDLED_MODEL, [0])
    assert len(np.unique(labels)) > 10


@pytest.mark.slow
def test_mirroring_and_numbers_of_processes(tmp_path):
    """All eight mirrorings of one tile."""
    labels = assert_command_equals_stock(
        crop()[:64, :64, :64], tmp_path, BUNDLED_MODEL, [0], flags=["-npp", "1", "-nps", "1"]
    )
    assert len(np.unique(labels)) > 5


# -- full size


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_ct_on_the_networks_own_grid(tmp_path):
    labels = assert_command_equals_stock(read(CT), tmp_path, BUNDLED_MODEL, [0], flags=[])
    assert len(np.unique(labels)) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_ct_with_two_folds(two_folds, tmp_path):
    assert_command_equals_stock(read(CT), tmp_path, two_folds, [0, 1], flags=[])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_ct_at_clinical_resolution(tmp_path):
    """0.9 x 0.9 x 1.3 mm, as scanners give it; stock needs about 14 GiB for it."""
    image = at_spacing(read(CT), (0.9, 0.9, 1.3))
    assert image.GetSize() == (407, 337, 258)
    labels = assert_command_equals_stock(image, tmp_path, BUNDLED_MODEL, [0], flags=[])
    assert len(np.unique(labels)) > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_ct_at_clinical_resolution_with_two_folds(two_folds, tmp_path):
    assert_command_equals_stock(at_spacing(read(CT), (0.9, 0.9, 1.3)), tmp_path, two_folds, [0, 1])
