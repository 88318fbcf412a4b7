"""TotalSegmentator's own commands with the flag and without: the same labels, made by the low-memory predictor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import SimpleITK
from tool_environments import (
    DATA,
    FLAG,
    assert_by_lowmem,
    assert_by_stock,
    assert_same_labels,
    write_scan,
    write_weights,
)

REQUIREMENTS = ["TotalSegmentator==2.18.0"]

pytestmark = [pytest.mark.tools, pytest.mark.timeout(3000)]

FAST = "Dataset297_TotalSegmentator_total_3mm_1559subj"
FAST_TRAINER = "nnUNetTrainer_4000epochs_NoMirroring"
#: Its trainer is TotalSegmentator's own class, and it needs no licence.
ANEURYSM = "Dataset615_MAXIMUS"
ANEURYSM_TRAINER = "nnUNetTrainerDiceTopK10Loss_2000epochs"


def folder_name(trainer: str) -> str:
    return f"{trainer}__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("totalsegmentator")
    settings = {"totalseg_id": "totalseg_tests", "send_usage_stats": False, "prediction_counter": 0}
    (folder / "config.json").write_text(json.dumps({**settings, "statistics_disclaimer_shown": True}))
    return folder


@pytest.fixture(scope="module")
def variables(home) -> dict[str, str]:
    write_weights(home / "weights" / FAST / folder_name(FAST_TRAINER), FAST_TRAINER)
    return {"TOTALSEG_HOME_DIR": str(home), "TOTALSEG_WEIGHTS_PATH": str(home / "weights")}


@pytest.fixture(scope="module")
def scan(home) -> Path:
    return write_scan(home / "ct.nii.gz")


def words(scan: Path, out: Path, *flags: str) -> list[str | Path]:
    return ["TotalSegmentator", "-i", scan, "-o", out, "--ml", "-d", "cpu", *(flags or ["--fast"])]


def test_fast(tool, variables, tmp_path):
    scan = DATA / "ct_abdomen_3mm.nii.gz"
    assert_by_stock(tool.run(*words(scan, tmp_path / "stock.nii.gz"), **variables))
    assert_by_lowmem(tool.run(*words(scan, tmp_path / "ours.nii.gz"), **variables, **FLAG))
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


def test_run_command_alone(tool, variables, scan, tmp_path):
    """Without the start-up hook, as in a container that is not to be changed."""
    hook = tool.packages / "nnunet_lowmem_startup.pth"
    assert_by_stock(tool.run(*words(scan, tmp_path / "stock.nii.gz"), **variables))
    put_away = hook.rename(tmp_path / hook.name)
    try:
        ours = tool.run("nnunet-lowmem", "run", "--", *words(scan, tmp_path / "ours.nii.gz"), **variables)
    finally:
        shutil.move(put_away, hook)
    assert_by_lowmem(ours)
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


def test_resampling_inside_nnunet(tool, variables, scan, tmp_path):
    """The tool resamples to 3 mm, and these plans ask for something else."""
    weights = tmp_path / "weights"
    write_weights(weights / FAST / folder_name(FAST_TRAINER), FAST_TRAINER, spacing=[4.0, 2.5, 3.5])
    coarse = {**variables, "TOTALSEG_WEIGHTS_PATH": str(weights)}
    assert_by_stock(tool.run(*words(scan, tmp_path / "stock.nii.gz"), **coarse))
    assert_by_lowmem(tool.run(*words(scan, tmp_path / "ours.nii.gz"), **coarse, **FLAG))
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


def test_trainer_of_the_tool(tool, variables, scan, tmp_path):
    """A trainer that is no part of nnU-Net, and that the tool adds to it at run time."""
    weights = tmp_path / "weights"
    write_weights(weights / ANEURYSM / folder_name(ANEURYSM_TRAINER), ANEURYSM_TRAINER, spacing=[0.5, 0.5, 0.5])
    own = {**variables, "TOTALSEG_WEIGHTS_PATH": str(weights)}
    image = SimpleITK.ReadImage(str(scan))
    image.SetSpacing((0.5, 0.5, 0.5))
    SimpleITK.WriteImage(image, str(tmp_path / "small.nii.gz"))
    flags = ["--task", "brain_aneurysm"]
    assert_by_stock(tool.run(*words(tmp_path / "small.nii.gz", tmp_path / "stock.nii.gz", *flags), **own))
    assert_by_lowmem(tool.run(*words(tmp_path / "small.nii.gz", tmp_path / "ours.nii.gz", *flags), **own, **FLAG))
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


EXACT = """
import sys
from totalsegmentator.config import setup_nnunet
setup_nnunet()
from totalsegmentator.nnunet import nnUNet_predict_image
nnUNet_predict_image(sys.argv[1], sys.argv[2], 297, trainer=sys.argv[3], folds=[0], resample=None, device="cpu")
"""


def test_higher_order_resampling_is_exact(tool, variables, home, tmp_path):
    """The tool asks for its approximation, and the labels are those of the exact resampling; a line says so."""
    scan = write_scan(home / "other_grid.nii.gz", spacing=(2.4, 2.6, 4.0))
    assert_by_stock(tool.python(EXACT, scan, tmp_path / "stock.nii.gz", FAST_TRAINER, **variables))
    ours = tool.run(*words(scan, tmp_path / "ours.nii.gz", "--fast", "--higher_order_resampling"), **variables, **FLAG)
    assert_by_lowmem(ours)
    assert ours.stderr.count("use_cropped_logits_resampling is an approximation") == 1
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


LATE = """
import sys
import nnunet_lowmem
import nnunetv2.inference.predict_from_raw_data as nnunet
import totalsegmentator.nnunet as tool
from totalsegmentator.python_api import totalsegmentator

def main(stock):  # a global name would be exchanged, too
    patched = [name for name in vars(stock) if vars(stock)[name].__class__.__name__ == "function"
               and vars(stock)[name].__module__ == "totalsegmentator.nnunet_runtime_patches"]
    assert len(patched) == 5, patched
    with nnunet_lowmem.enable():
        ours = tool.nnUNetPredictor
        assert ours is not stock and issubclass(ours, nnunet_lowmem.LowMemPredictor)
        for name in patched:
            assert getattr(ours, name).__module__ == "nnunet_lowmem.predictor", name
        totalsegmentator(sys.argv[1], sys.argv[2], fast=True, ml=True, device="cpu")
    assert tool.nnUNetPredictor is stock
    totalsegmentator(sys.argv[1], sys.argv[3], fast=True, ml=True, device="cpu")

if __name__ == "__main__":
    main(nnunet.nnUNetPredictor)
"""


def test_patches_of_the_tool_do_not_leak(tool, variables, scan, tmp_path):
    """Imported first, the tool has overwritten methods of stock's class, from which ours is derived."""
    run = tool.python(LATE, scan, tmp_path / "ours.nii.gz", tmp_path / "stock.nii.gz", **variables)
    assert run.cases == ["s01"]
    assert "still stock" not in run.stderr
    assert_same_labels(tmp_path / "stock.nii.gz", tmp_path / "ours.nii.gz")


FIRST = """
import totalsegmentator.nnunet as tool
from nnunet_lowmem import LowMemPredictor
assert issubclass(tool.nnUNetPredictor, LowMemPredictor)
stock = LowMemPredictor.__mro__[-2]
assert stock.predict_from_files.__module__ == "nnunetv2.inference.predict_from_raw_data"
assert not hasattr(tool.nnUNetPredictor, "_totalseg_cropped_logits_resampling_patch")
"""


def test_the_tool_patches_nothing_where_the_flag_is_set(tool, variables):
    tool.python(FIRST, **variables, **FLAG)
