"""The patches apply to nnU-Net as the registry has it, and do what they say; without them stock hangs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from factory import ModelSpec
from tiny_training import TRAINERS, VALIDATED, TinyTraining, assert_same_next_stages, assert_same_validation, moved

import nnunet_lowmem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(nnunet_lowmem.__file__).parents[1]
VERSIONS = ["2.5.2", "2.6.4", "2.7.0", "2.8.1"]
WITH_PRODUCER = VERSIONS[1:]
HANGS_S = 40

PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as m; m()"
BROKEN_TILE = """
import sys, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
class Broken(nnUNetPredictor):
    def _internal_get_sliding_window_slicers(self, size):
        found = super()._internal_get_sliding_window_slicers(size)
        return [*found[:1], ('no slice',)]
p = Broken(device=torch.device('cpu'), allow_tqdm=False)
p.initialize_from_trained_model_folder(sys.argv[1], (0,))
p.predict_sliding_window_return_logits(torch.zeros(1, 30, 40, 30))
"""
BROKEN_NETWORK = """
import sys, threading, time, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
p = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False, tile_step_size=0.2)
p.initialize_from_trained_model_folder(sys.argv[1], (0,))
def fail(x):
    raise ValueError('network')
p.network.forward = fail
try:
    p.predict_sliding_window_return_logits(torch.zeros(1, 60, 60, 60))
except ValueError:
    pass
time.sleep(2)
print('threads left:', sum('producer' in t.name for t in threading.enumerate()))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def source(request, tmp_path_factory) -> tuple[str, Path]:
    folder = unpacked(request.param, tmp_path_factory.mktemp("stock"))
    apply(f"predictor-{request.param}.patch", folder)
    return request.param, folder


def unpacked(version: str, folder: Path) -> Path:
    """The files of a version as the registry has them; the older ones are there as source only."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*pip, f"nnunetv2=={version}"], check=True, timeout=300)
    (archive,) = folder.glob("nnunetv2-*")
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(folder)
        return folder
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"nnunetv2-{version}"


def apply(name: str, folder: Path) -> None:
    for dry in (["--dry-run"], []):
        patch = (ROOT / "patches" / name).read_bytes()
        done = subprocess.run(["patch", "-p1", "--fuzz=0", *dry], cwd=folder, input=patch, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()
        assert b"offset" not in done.stdout


def python(folder: Path, program: str, *words: str, timeout: float = 200, **variables: str):
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_predictor_flag(source, images, models, tmp_path):
    _, folder = source
    model, case = models(ModelSpec(), images("head")), Path(images("head")[0])

    def predict(out: str, *flags: str):
        words = ["-i", str(case.parent), "-o", str(tmp_path / out), "-m", model, "-f", "0", "-device", "cpu", *flags]
        done = python(folder, PREDICT, *words)
        assert done.returncode == 0, done.stderr
        return np.asarray(nibabel.load(tmp_path / out / "head.nii.gz").dataobj), done.stdout + done.stderr

    stock, _ = predict("stock", "-npp", "1", "-nps", "1")
    ours, _ = predict("ours", "--predictor", "lowmem")
    np.testing.assert_array_equal(stock, ours)
    assert "use_cropped_logits_resampling" not in (tmp_path / "stock" / "predict_from_raw_data_args.json").read_text()
    unknown = python(
        folder,
        PREDICT,
        *["-i", ".", "-o", str(tmp_path / "no"), "-m", model],
        "--predictor",
        "nonsense",
        "-device",
        "cpu",
    )
    assert unknown.returncode != 0
    assert "no predictor named nonsense. Installed are: ['lowmem'" in unknown.stderr


def test_validation_at_the_end_of_training(source, tmp_path):
    _, folder = source
    # before 2.8 there are no trainers from outside
    shutil.copy(TRAINERS[0] / "quick_trainer.py", folder / "nnunetv2" / "training" / "nnUNetTrainer")
    training = TinyTraining(tmp_path, [folder]).prepare()
    log = training.train("3d_lowres", "0", "QuickTrainer", nnUNet_predictor="lowmem")
    assert "validates: one case after the other in this process" in log
    results = training.results("3d_lowres")
    ours, ours_next = moved(results / "fold_0" / "validation"), moved(results / "predicted_next_stage")
    log = training.train("3d_lowres", "0", "QuickTrainer", "--val")
    assert "nnunet_lowmem" not in log
    assert_same_validation(ours, results / "fold_0" / "validation", VALIDATED)
    assert_same_next_stages(ours_next, results / "predicted_next_stage", VALIDATED)


@pytest.mark.parametrize("version", WITH_PRODUCER)
def test_producer_errors_end_the_prediction(version, images, models, tmp_path):
    model = models(ModelSpec(), images("head"))
    folder = unpacked(version, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        python(folder, BROKEN_TILE, model, timeout=HANGS_S)
    assert (
        "threads left: 1" in python(folder, BROKEN_NETWORK + "import os; sys.stdout.flush(); os._exit(0)", model).stdout
    )
    apply(f"producer-{version}.patch", folder)
    done = python(folder, BROKEN_TILE, model, timeout=HANGS_S)
    assert done.returncode == 1
    assert "Error" in done.stderr
    assert "threads left: 0" in python(folder, BROKEN_NETWORK, model).stdout
