"""Labels for the next stages of a cascade are those that stock's ``resample_and_save`` stores, file for file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import INSTALLED

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.nnunet import stored_cases
from nnunet_lowmem.predict.cases import Failing
from nnunet_lowmem.predict.jobs import Files, Job, Stored
from nnunet_lowmem.predict.loading import load
from nnunet_lowmem.types import NextStage, PreprocessedCase

JOBS = [Job("case", None, Stored("case"))]

blosc2 = pytest.importorskip("blosc2")  # nnU-Net 2.5 stores .npz

CLASSES = ModelSpec(labels=5)
REGIONS = ModelSpec(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=(1, 2))
TORCH = ModelSpec(resampling="torch")
THICK = ModelSpec(patch_size=(8, 28, 28), spacing=(6.5, 1.9, 1.7))
TURNED = ModelSpec(transpose_forward=(2, 0, 1))
SLICES = ModelSpec(patch_size=(28, 24), spacing=(4.2, 4.3))
LARGER, SMALLER = 1.7, 0.8


def stored(path: Path) -> np.ndarray:
    return blosc2.open(str(path.with_name(path.name + ".b2nd")))


@pytest.mark.parametrize(
    "image, spec",
    [
        ("head", CLASSES),
        ("head", REGIONS),
        ("head", TORCH),
        ("aniso", THICK),
        pytest.param("head_margin", TURNED, marks=pytest.mark.slow),
        pytest.param("head", SLICES, marks=pytest.mark.slow),
    ],
    ids=["classes", "regions", "torch resampling", "separate z", "order of axes", "slices"],
)
@pytest.mark.skipif(INSTALLED < (2, 6), reason="nnU-Net 2.5 keeps them as .npz")
def test_labels_in_other_grids_are_stocks(image, spec, images, models, tmp_path):
    files = images(image)
    folder = models(spec, files)
    data_class = stored_cases._CLASSES["b2nd"]
    ours = LowMemPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    for predictor in (ours, stock):
        predictor.initialize_from_trained_model_folder(folder, (0,))
    case = load(Job("case", None, Files(files)), ours.picture(), None)
    shapes = [tuple(round(size * factor) for size in case.image.shape[1:]) for factor in (LARGER, SMALLER, 1)]
    managers = (stock.plans_manager, stock.configuration_manager)
    trainer = SimpleNamespace(
        plans_manager=ours.plans_manager,
        configuration_manager=ours.configuration_manager,
        label_manager=ours.label_manager,
        dataset_json=ours.dataset_json,
    )
    stages = tuple(
        NextStage(
            shape,
            partial(stored_cases.write_labels, trainer, data_class, tmp_path / f"ours.{n}", case.properties, shape),
        )
        for n, shape in enumerate(shapes)
    )
    plans = []
    ours.on_plan = plans.append
    wanted = PreprocessedCase(case.image, None, case.properties, stages)
    (segmentation,) = ours._predict_unrecorded(JOBS, False, Failing(keep_going=False), lambda *_: wanted)
    (plain,) = ours._predict_unrecorded(JOBS, False, Failing(keep_going=False), lambda *_: case)
    np.testing.assert_array_equal(segmentation, plain)
    assert "labels for the next stages" in {entry.name for entry in plans[0].allocations}

    logits = stock.predict_sliding_window_return_logits(torch.from_numpy(case.image))
    for n, shape in enumerate(shapes):
        output = str(tmp_path / f"stock.{n}")
        resample_and_save(logits, shape, output, *managers, case.properties, stock.dataset_json, 1, data_class)
        expected, actual = stored(tmp_path / f"stock.{n}"), stored(tmp_path / f"ours.{n}")
        np.testing.assert_array_equal(actual[:], expected[:])
        assert (actual.dtype, actual.chunks, actual.blocks) == (expected.dtype, expected.chunks, expected.blocks)
        assert len(np.unique(actual[:])) > 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".b2nd"] * 6
