"""MONAI's nnU-Net runner and its bundle predictor with the flag and without: the same labels.

Both leave the device at CUDA. So that these run on any machine, each program below sets it to the CPU, in the way that
is open to its user.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tool_environments import (
    FLAG,
    assert_by_lowmem,
    assert_by_stock,
    assert_same_labels,
    write_scan,
    write_weights,
)

#: The bundle predictor builds networks as nnU-Net did before 2.7; with later versions it fails, flag or not.
REQUIREMENTS = ["monai==1.6.1", "nnunetv2==2.6.4"]

pytestmark = [pytest.mark.tools, pytest.mark.timeout(3000)]

#: Not that of the network: nnU-Net resamples.
SPACING = (2.4, 2.6, 4.0)


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan") / "ct_0000.nii.gz", SPACING)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "model", "nnUNetTrainerNoMirroring")


RUNNER = """
import functools, sys, torch
import nnunetv2.inference.predict_from_raw_data as module
module.nnUNetPredictor = functools.partial(module.nnUNetPredictor, device=torch.device("cpu"))
from monai.apps.nnunet import nnUNetV2Runner
work, images, out, weights = sys.argv[1:]
runner = nnUNetV2Runner({"modality": "CT", "dataset_name_or_id": "1"}, work_dir=work)
runner.predict(images, out, weights, use_folds=(0,), num_processes_preprocessing=1, num_processes_segmentation_export=1)
"""


def test_runner(tool, scan, weights, tmp_path):
    places = {name: (tmp_path / "work", scan.parent, tmp_path / name, weights) for name in ("stock", "ours")}
    assert_by_stock(tool.python(RUNNER, *places["stock"]))
    assert_by_lowmem(tool.python(RUNNER, *places["ours"], **FLAG))
    assert_same_labels(tmp_path / "stock" / "ct.nii.gz", tmp_path / "ours" / "ct.nii.gz")


BUNDLE = """
import sys, nibabel, numpy, torch
from monai.apps.nnunet.nnunet_bundle import get_nnunet_monai_predictor
from monai.data import MetaTensor
scan, out, folder = sys.argv[1:]
wrapper = get_nnunet_monai_predictor(folder)
wrapper.predictor.device, wrapper.predictor.perform_everything_on_device = torch.device("cpu"), False
image = nibabel.load(scan)
voxels = torch.from_numpy(image.get_fdata(dtype=numpy.float32))[None, None]
numpy.save(out, wrapper(MetaTensor(voxels, affine=torch.from_numpy(image.affine))).numpy())
"""


@pytest.fixture(scope="module")
def bundle(weights) -> Path:
    """The folder of a fold, in the layout of ``convert_nnunet_to_monai_bundle``."""
    checkpoint = torch.load(weights / "fold_0" / "checkpoint_final.pth", weights_only=False)
    described = {key: checkpoint[key] for key in ("inference_allowed_mirroring_axes", "init_args", "trainer_name")}
    torch.save(described, weights / "nnunet_checkpoint.pth")
    torch.save({"network_weights": checkpoint["network_weights"]}, weights / "fold_0" / "model.pt")
    return weights / "fold_0"


def test_bundle(tool, scan, bundle, tmp_path):
    assert_by_stock(tool.python(BUNDLE, scan, tmp_path / "stock.npy", bundle))
    assert_by_lowmem(tool.python(BUNDLE, scan, tmp_path / "ours.npy", bundle, **FLAG))
    expected = np.load(tmp_path / "stock.npy")
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(expected, np.load(tmp_path / "ours.npy"))
