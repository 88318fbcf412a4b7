"""MOOSE's command and its Python function with the flag and without: the same labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tool_environments import (
    FLAG,
    Environment,
    assert_by_lowmem,
    assert_by_stock,
    assert_same_labels,
    write_scan,
    write_weights,
)

REQUIREMENTS = ["moosez==3.2.2"]

pytestmark = [pytest.mark.tools, pytest.mark.timeout(3000)]

#: One of the models that the command knows; its weights are looked for in a folder of this name in the tool's package.
MODEL = "clin_ct_fast_organs"
TRAINER = "nnUNetTrainerNoMirroring"
PLACE = """
import os
from moosez import models, system
entry = models.MODEL_METADATA["clin_ct_fast_organs"]
print(os.path.join(system.MODELS_DIRECTORY_PATH, entry["folder_name"]), entry["url"])
"""


@pytest.fixture(scope="module")
def weights(tool: Environment) -> Path:
    """Where the tool would have unpacked what it downloads, with the note that it leaves there."""
    folder, url = tool.python(PLACE).stdout.split()
    path = Path(folder) / f"{TRAINER}__nnUNetPlans__3d_fullres"
    if not path.exists():
        write_weights(path, TRAINER)
        (Path(folder) / "model_version.json").write_text(json.dumps({"url": url}))
    return path


def subject(folder: Path) -> Path:
    """The folder of one patient in a folder that is given to the command."""
    (folder / "patient").mkdir(parents=True)
    write_scan(folder / "patient" / "CT_patient.nii.gz", spacing=(2.4, 2.6, 4.0))
    return folder


def segmentation(folder: Path) -> Path:
    (found,) = folder.glob("patient/moosez-*/segmentations/*segmentation*.nii.gz")
    return found


def test_command(tool, weights, tmp_path):
    folders = [subject(tmp_path / name) for name in ("stock", "ours", "wrapped")]
    words = [["moosez", "-d", folder, "-m", MODEL] for folder in folders]
    assert_by_stock(tool.run(*words[0]))
    assert_by_lowmem(tool.run(*words[1], **FLAG))
    assert_by_lowmem(tool.run("nnunet-lowmem", "run", "--", *words[2]))
    assert_same_labels(segmentation(folders[0]), segmentation(folders[1]))
    assert_same_labels(segmentation(folders[0]), segmentation(folders[2]))


LATE = """
import sys
from moosez import moose, predict
import nnunet_lowmem
with nnunet_lowmem.enable():
    assert issubclass(predict.nnUNetPredictor, nnunet_lowmem.LowMemPredictor)
    print(moose(sys.argv[1], "clin_ct_fast_organs", sys.argv[2], "cpu")[0][0])
assert not issubclass(predict.nnUNetPredictor, nnunet_lowmem.LowMemPredictor)
print(moose(sys.argv[1], "clin_ct_fast_organs", sys.argv[3], "cpu")[0][0])
"""


def test_function(tool, weights, tmp_path):
    """Imported first: the name that the tool took is exchanged, and given back."""
    scan = write_scan(tmp_path / "ct.nii.gz")
    for name in ("ours", "stock"):
        (tmp_path / name).mkdir()
    run = tool.python(LATE, scan, tmp_path / "ours", tmp_path / "stock")
    ours, stock = map(Path, run.stdout.split()[-2:])
    assert len(run.cases) == 1
    assert "still stock" not in run.stderr
    assert_same_labels(stock, ours)
