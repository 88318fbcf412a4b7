"""Small plans and real images for the tests of preprocessing, and what "equal to stock nnU-Net" means there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

import nnunet_lowmem

DATA = Path(__file__).parents[1] / "data"
CT = Path(nnunet_lowmem.__file__).parent / "data" / "ct_abdomen_3mm.nii.gz"
INTENSITIES = {"mean": 61.3, "std": 117.9, "percentile_00_5": -931.0, "percentile_99_5": 304.0}
DEFAULT = "resample_data_or_seg_to_shape"
LABELS = {"labels": {"background": 0, "organ": 1, "vessel": 2}}
ZSCORE = ("ZScoreNormalization",)


@dataclass(frozen=True)
class Model:
    """The parts of nnU-Net's plans that preprocessing reads; axes of `spacing` in network order."""

    spacing: tuple[float, ...] = (4.4, 3.7, 3.9)
    schemes: tuple[str, ...] = ("CTNormalization",)
    masks: tuple[bool, ...] = (False, False, False)
    transpose: tuple[int, int, int] = (0, 1, 2)
    data: dict[str, Any] = field(default_factory=dict)
    functions: tuple[str, str] = (DEFAULT, DEFAULT)
    preprocessor: str = "DefaultPreprocessor"
    reader: str = "SimpleITKIO"

    def managers(self) -> tuple[PlansManager, ConfigurationManager]:
        data = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None, **self.data}
        if self.functions[0] != DEFAULT:
            data = self.data
        segmentation = {**data, "is_seg": True, "order": 1} if self.functions[1] == DEFAULT else self.data
        configuration = {
            "preprocessor_name": self.preprocessor,
            "spacing": list(self.spacing),
            "normalization_schemes": list(self.schemes),
            "use_mask_for_norm": list(self.masks),
            "resampling_fn_data": self.functions[0],
            "resampling_fn_data_kwargs": data,
            "resampling_fn_seg": self.functions[1],
            "resampling_fn_seg_kwargs": segmentation,
            "architecture": {},
        }
        plans = PlansManager(
            {
                "image_reader_writer": self.reader,
                "label_manager": "LabelManager",
                "transpose_forward": list(self.transpose),
                "foreground_intensity_properties_per_channel": {str(c): INTENSITIES for c in range(3)},
                "configurations": {"it": configuration},
            }
        )
        return plans, plans.get_configuration("it")


@cache
def read(path: Path) -> SimpleITK.Image:
    return SimpleITK.ReadImage(str(path))


def head() -> SimpleITK.Image:
    """Head at 4 mm, (46, 55, 46) voxels, zeros around it."""
    return read(DATA / "t1_head_1mm.nii.gz")[::4, ::4, ::4]


def aniso() -> SimpleITK.Image:
    """6.5 mm slices of 1.56 mm voxels."""
    return read(DATA / "t1_aniso_6p5mm.nii.gz")[40:200:2, 60:200:2, 4:20]


def ct() -> SimpleITK.Image:
    """Abdomen at 3 mm."""
    return read(CT)[20:90, 25:85, 30:90]


@cache
def fine_ct() -> SimpleITK.Image:
    """The same at 0.9 × 0.9 × 1.3 mm, so that real resampling happens."""
    coarse = read(CT)[30:80, 35:80, 40:72]
    spacing = (0.9, 0.9, 1.3)
    size = [int(n * s / t) for n, s, t in zip(coarse.GetSize(), coarse.GetSpacing(), spacing, strict=True)]
    geometry = (coarse.GetOrigin(), spacing, coarse.GetDirection())
    return SimpleITK.Resample(coarse, size, SimpleITK.Transform(), SimpleITK.sitkLinear, *geometry, -1024.0)


def changed(image: SimpleITK.Image, change: Callable[[np.ndarray], np.ndarray]) -> SimpleITK.Image:
    out = SimpleITK.GetImageFromArray(change(SimpleITK.GetArrayFromImage(image)))
    out.SetSpacing(image.GetSpacing())
    out.SetDirection(image.GetDirection())
    return out


def with_margin(image: SimpleITK.Image) -> SimpleITK.Image:
    return changed(image, lambda a: np.pad(a, [(2, 7), (0, 5), (9, 3)]))


def with_holes(image: SimpleITK.Image) -> SimpleITK.Image:
    """Zeros inside the head: a closed pocket, which the mask fills, and a channel open to the top, which stays."""

    def drill(a: np.ndarray) -> np.ndarray:
        a = np.where(a == 0, 0, a).copy()
        a[18:24, 20:27, 18:24] = 0
        a[26:, 30:34, 20:26] = 0
        return a

    return changed(image, drill)


def edges(image: SimpleITK.Image) -> SimpleITK.Image:
    return SimpleITK.GradientMagnitude(SimpleITK.Cast(image, SimpleITK.sitkFloat32))


def as_type(image: SimpleITK.Image, dtype: Any) -> SimpleITK.Image:
    return changed(image, lambda a: (a * 0.7 if np.dtype(dtype).kind == "f" else a).astype(dtype))


def write(folder: Path, images: Sequence[SimpleITK.Image], ending: str = ".nii") -> list[str]:
    files = [str(folder / f"case_{c:04d}{ending}") for c in range(len(images))]
    for image, file in zip(images, files, strict=True):
        SimpleITK.WriteImage(image, file)
    return files


def previous_stage_of(image: SimpleITK.Image) -> SimpleITK.Image:
    """Labels 0, 1 and 2 by intensity; 0 inside the head, too."""
    return changed(image, lambda a: np.digitize(a, [60, 120]).astype(np.uint8))


def stock(files: Sequence[str], previous: str | None, model: Model) -> tuple[np.ndarray, np.ndarray, dict]:
    data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
        list(files), previous, *model.managers(), LABELS
    )
    return torch.from_numpy(data).to(torch.float32).numpy(), seg, properties


def assert_same(case: Any, expected: tuple[np.ndarray, np.ndarray, dict], previous_stage: bool = False) -> None:
    image, seg, properties = expected
    properties.pop("class_locations", None)  # of training; see preprocess_case
    assert (case.image.shape, case.image.dtype) == (image.shape, np.float32)
    different = np.count_nonzero(case.image.view(np.uint32) != np.ascontiguousarray(image).view(np.uint32))
    assert different == 0, f"{different} of {image.size} voxels differ"
    assert_same_object(case.properties, properties)
    if previous_stage:
        assert case.previous_stage.dtype == seg.dtype
        assert np.array_equal(case.previous_stage, seg[0])
    else:
        assert case.previous_stage is None


def assert_same_object(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same_object(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_object(one, other)
    else:
        assert np.array_equal(actual, expected)
