"""Labels for the next stages of a cascade are those that stock's ``resample_and_save`` stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.cases import Job
from nnunet_lowmem.training_data import _write_labels
from nnunet_lowmem.types import NextStage, PreprocessedCase

REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
CASES = {
    "classes": ("head", ModelSpec(labels=5)),
    "regions": ("head", ModelSpec(labels=REGIONS, regions_class_order=(1, 2))),
    "torch resampling": ("head", ModelSpec(resampling="torch")),
    "separate z": ("aniso", ModelSpec(patch_size=(8, 28, 28), spacing=(6.5, 1.9, 1.7), transpose_forward=(0, 1, 2))),
    "order of axes": ("head_margin", ModelSpec(transpose_forward=(2, 0, 1))),
    "slices": ("head", ModelSpec(patch_size=(28, 24), spacing=(4.2, 4.3))),
}
