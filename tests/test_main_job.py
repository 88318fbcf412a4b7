"""The main job: the real CT and the real 118-class model, by the real command, against stock nnU-Net."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_lowmem.demo import run_demo

DATA = Path(__file__).parents[1] / "nnunet_lowmem" / "data"
FOLD_1 = Path(__file__).parent / "data" / "ct118_fold_1"
COMMAND = Path(sys.executable).with_name("nnUNetv2_predict_lowmem")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ct118") / "model"
    shutil.copytree(DATA / "ct118", folder)
    shutil.copytree(FOLD_1, folder / "fold_1")
    return folder


def resampled(image: SimpleITK.Image, spacing: tuple[float, float, float]) -> SimpleITK.Image:
    size = [int(n * old / new) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)]
    frame = (image.GetOrigin(), spacing, image.GetDirection(), -1000.0, SimpleITK.sitkInt16)
    return SimpleITK.Resample(image, size, SimpleITK.Transform(), SimpleITK.sitkLinear, *frame)


def case(name: str) -> SimpleITK.Image:
    ct = SimpleITK.ReadImage(str(DATA / "ct_abdomen_3mm.nii.gz"))
    return {
        "own_grid": lambda: ct[15:100, 10:80, 20:100],
        "finer": lambda: resampled(ct[20:90, 10:80, 20:90], (1.9, 2.1, 2.4)),
        "whole": lambda: ct,
        "whole_finer": lambda: resampled(ct, (0.9, 0.9, 1.3)),
    }[name]()


def predict_both(
    name: str, model: Path, folds: tuple[int, ...], mirrored: bool, folder: Path
) -> tuple[np.ndarray, ...]:
    (folder / "images").mkdir()
    (folder / "stock").mkdir()
    SimpleITK.WriteImage(case(name), str(folder / "images" / "ct_0000.nii.gz"))
    options = ["-i", folder / "images", "-o", folder / "ours", "-m", model, "-device", "cpu", "-f", *folds]
    flags = [] if mirrored else ["--disable_tta"]
    subprocess.run([COMMAND, *map(str, options), *flags, "--disable_progress_bar"], check=True, timeout=1500)
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirrored, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), folds)
    stock.predict_from_files_sequential(str(folder / "images"), str(folder / "stock"))
    assert {path.name for path in (folder / "ours").iterdir()} == {path.name for path in (folder / "stock").iterdir()}
    files = [str(folder / tool / "ct.nii.gz") for tool in ("stock", "ours")]
    return tuple(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file)) for file in files)


@pytest.mark.parametrize(
    ("name", "folds", "mirrored"),
    [
        ("own_grid", (0,), False),
        ("finer", (0, 1), False),
        pytest.param("whole", (0,), True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("whole", (0, 1), True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("whole_finer", (0,), False, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("whole_finer", (0,), True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("whole_finer", (0, 1), False, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_no_voxel_differs_from_stock(name, folds, mirrored, model, tmp_path):
    stock, ours = predict_both(name, model, folds, mirrored, tmp_path)
    assert ours.dtype == stock.dtype
    assert np.array_equal(ours, stock)
    assert len(np.unique(stock)) > 40


def test_demo_writes_segmentation_picture_and_table(tmp_path, capsys):
    run_demo(tmp_path / "demo", "cpu")
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "demo" / "ct_abdomen.nii.gz")))
    assert labels.shape == (112, 101, 122)
    assert (tmp_path / "demo" / "ct_abdomen.png").stat().st_size > 50_000
    table = capsys.readouterr().out
    for word in ("112 x 101 x 122", "118", "prediction", "peak RAM"):
        assert word in table


def test_bundled_model_and_image_stay_under_5_mb():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 5_000_000
