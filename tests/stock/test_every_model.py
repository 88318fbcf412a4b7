"""Every kind of model that nnU-Net can load, against stock nnU-Net: same files, same voxels.

Stock predicts in this process, then `LowMemPredictor` does; everything that the two wrote is compared.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from model_table import CHANNELS, REGIONS, ROWS, TWO_CHANNELS, Row
from nnunetv2.imageio import simpleitk_reader_writer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization import default_normalization_schemes
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.label_handling import label_handling
from oracle import (
    INSTALLED,
    assert_same_folder,
    assert_same_return,
    make_predictor,
    predict_ours,
    predict_stock,
    read_voxels,
)
from scipy.ndimage import zoom

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import LowMemError, ModelError, UsageError


def as_parameter(row: Row) -> Any:
    return pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])


@pytest.mark.parametrize("row", [as_parameter(row) for row in ROWS])
def test_equals_stock(row: Row, images, models, tmp_path: Path):
    skip_what_is_not_in_this_nnunet(row.name, row.spec)
    cases = [images(row.image, row.spec.file_ending)]
    model = models(row.spec, images(row.fit or row.image, row.spec.file_ending))
    stock = make_predictor(nnUNetPredictor, model, row.folds, **row.options)
    ours = make_predictor(LowMemPredictor, model, row.folds, **row.options)
    if row.in_memory:
        expected = predict_stock(stock, cases, None, save_probabilities=row.probabilities)
        actual = predict_ours(ours, cases, None, save_probabilities=row.probabilities)
        assert_same_return(expected, actual, row.probabilities)
        voxels = expected[0][0] if row.probabilities else expected[0]
    else:
        compare_written(stock, ours, cases, tmp_path, save_probabilities=row.probabilities)
        voxels = read_voxels(tmp_path / "stock" / (row.image + row.spec.file_ending))
    # nnU-Net 2.5 writes uint8 whatever the labels: what is beyond wraps
    assert len(np.unique(voxels)) >= (min(row.classes, 200) if INSTALLED < (2, 6) else row.classes)


def skip_what_is_not_in_this_nnunet(name: str, spec: ModelSpec) -> None:
    if spec.resampling == "none" and INSTALLED < (2, 6):
        pytest.skip("no_resampling_hack is new in nnU-Net 2.6")
    if spec.reader == "SimpleITKIOWithReorient" and INSTALLED < (2, 6):
        pytest.skip("SimpleITKIOWithReorient is new in nnU-Net 2.6")
    if name == "torch_separate_z" and INSTALLED < (2, 7):
        pytest.skip("torch resampling of nnU-Net before 2.7 fails on separate z: it asks for the length of a number")


def compare_written(stock: nnUNetPredictor, ours: nnUNetPredictor, cases: Any, folder: Path, **kwargs: Any) -> None:
    (folder / "stock").mkdir()
    predict_stock(stock, cases, str(folder / "stock"), **kwargs)
    predict_ours(ours, cases, str(folder / "ours"), **kwargs)
    assert_same_folder(folder / "stock", folder / "ours")


# -- the cascade: stock predicts the low resolution, both predict the second stage from it


CASCADES = {
    # one-hot of three foreground labels as extra channels; -1 outside the head
    "labels": ({}, "head_margin"),
    # labels of the first stage are one-hot encoded although the heads are regions
    "regions": (REGIONS, "head_margin"),
    "two_channels": (TWO_CHANNELS, "head_two_channels"),
    # -1 of the previous stage is the mask of the normalisation, and it was made with holes filled
    "mask_for_norm": ({**CHANNELS, "use_mask_for_norm": (True, True)}, "head_holes"),
    "transposed": ({"transpose_forward": (2, 0, 1)}, "head_margin"),
    # the segmentation is resampled slice by slice, too
    "separate_z": ({"patch_size": (6, 32, 32), "spacing": (5.0, 2.0, 2.2)}, "aniso"),
    "torch_resampling": ({"resampling": "torch"}, "head_margin"),
    "no_resampling": ({"resampling": "none"}, "head_margin"),
    "folds_mirrored": ({"folds": (0, 1), "mirror_axes": (0,)}, "head_margin"),
    "130_classes": ({"labels": 130, "patch_size": (32, 32, 32), "spacing": (7.0, 7.0, 7.0)}, "head"),
}

SLOW_CASCADES = ("two_channels", "no_resampling", "folds_mirrored", "130_classes")


@pytest.fixture
def cascade(images, models, tmp_path: Path) -> Callable[..., tuple[str, list[str], Path]]:
    """Make the model of a second stage, its image, and the folder of stock's predictions of the first stage."""

    def make(changes: dict[str, Any], image: str) -> tuple[str, list[str], Path]:
        files, folder = images(image), tmp_path / "lowres"
        folder.mkdir()
        first = models(ModelSpec(**{**changes, "spacing": (8.0, 7.0, 6.0)}), files)
        predict_stock(make_predictor(nnUNetPredictor, first), [files], str(folder))
        spec = ModelSpec(**changes, previous_stage="3d_lowres")
        return models(spec, files, str(folder / f"{image}.nii.gz")), files, folder

    return make


@pytest.mark.parametrize(
    ("name", "probabilities"),
    [
        *(pytest.param(name, False, marks=[pytest.mark.slow] if name in SLOW_CASCADES else []) for name in CASCADES),
        ("labels", True),
        ("regions", True),
    ],
)
def test_cascade_equals_stock(name: str, probabilities: bool, cascade, tmp_path: Path):
    skip_what_is_not_in_this_nnunet(name, ModelSpec(**CASCADES[name][0]))
    model, files, previous = cascade(*CASCADES[name])
    folds = CASCADES[name][0].get("folds", (0,))
    predictors = [make_predictor(cls, model, folds) for cls in (nnUNetPredictor, LowMemPredictor)]
    compare_written(*predictors, [files], tmp_path, previous=str(previous), save_probabilities=probabilities)
    assert len(np.unique(read_voxels(tmp_path / "stock" / f"{CASCADES[name][1]}.nii.gz"))) >= 3


def test_cascade_depends_on_its_previous_stage(cascade, tmp_path: Path):
    model, files, previous = cascade({}, "head")
    ours = make_predictor(LowMemPredictor, model)
    before = predict_ours(ours, [files], None, str(previous))[0]
    image = SimpleITK.ReadImage(str(previous / "head.nii.gz"))
    SimpleITK.WriteImage(image * 0, str(previous / "head.nii.gz"))
    after = predict_ours(ours, [files], None, str(previous))[0]
    assert not np.array_equal(before, after)
    assert_same_return(
        predict_stock(make_predictor(nnUNetPredictor, model), [files], None, str(previous)), [after], False
    )


# -- classes and functions that a plan names and that nobody here knows


def resample_by_zoom(data, new_shape, current_spacing, new_spacing):
    """A resampling function of one's own: float32, channel by channel, not linear in the logits."""
    data = np.arcsinh(np.asarray(data, dtype=np.float32))
    factors = np.array(new_shape) / data.shape[1:]
    return np.stack([np.sinh(zoom(c, factors, order=1, mode="nearest", grid_mode=True)) for c in data])


class LastOfTheBest(label_handling.LabelManager):
    """A label manager of one's own: foreground needs a margin over the background."""

    def convert_logits_to_segmentation(self, predicted_logits):
        logits = np.array(predicted_logits)
        logits[0] += 3
        return logits.argmax(0)


class SquareRoot(default_normalization_schemes.ZScoreNormalization):
    def run(self, image, seg=None):
        return super().run(np.sqrt(np.abs(image)), seg)


class Inverting(default_preprocessor.DefaultPreprocessor):
    def run_case_npy(self, data, *args, **kwargs):
        return super().run_case_npy(np.where(data == 0, 0, 300 - data), *args, **kwargs)


class UpsideDown(simpleitk_reader_writer.SimpleITKIO):
    def read_images(self, image_fnames):
        data, properties = super().read_images(image_fnames)
        return data[:, ::-1], properties

    def write_seg(self, seg, output_fname, properties):
        super().write_seg(seg[::-1], output_fname, properties)


PLUGGED_IN = {
    "resampling": (default_resampling, resample_by_zoom),
    "label_manager": (label_handling, LastOfTheBest),
    "normalisation": (default_normalization_schemes, SquareRoot),
    "preprocessor": (default_preprocessor, Inverting),
    "reader": (simpleitk_reader_writer, UpsideDown),
}


@pytest.mark.parametrize("regions", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PLUGGED_IN)
def test_unknown_class_or_function_equals_stock(kind: str, regions: bool, images, models, tmp_path: Path, monkeypatch):
    module, thing = PLUGGED_IN[kind]
    monkeypatch.setattr(module, thing.__name__, thing, raising=False)
    value = (thing.__name__,) if kind == "normalisation" else thing.__name__
    files = images("head_margin")
    model = models(ModelSpec(**{kind: value}, **(REGIONS if regions else {})), files)
    stock, ours = make_predictor(nnUNetPredictor, model), make_predictor(LowMemPredictor, model, trust=(__name__,))
    compare_written(stock, ours, [files], tmp_path)


def test_unknown_label_manager_is_logged_as_unbounded(images, models, monkeypatch, caplog):
    monkeypatch.setattr(label_handling, "LastOfTheBest", LastOfTheBest, raising=False)
    model = models(ModelSpec(label_manager="LastOfTheBest"), images("head"))
    with caplog.at_level(logging.WARNING, logger="nnunet_lowmem"):
        predict_ours(make_predictor(LowMemPredictor, model, trust=(__name__,)), [images("head")], None)
    assert "LastOfTheBest" in caplog.text
    assert "memory" in caplog.text


# -- which cases are predicted, and under which names


NAMES = ("case", "case_1", "case.10", "z")


@pytest.fixture
def two_channel_folder(images, tmp_path: Path) -> str:
    """Four cases of two channels each; names that contain each other, and a dot."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        for channel, file in enumerate(images("head_two_channels")):
            shutil.copy(file, folder / f"{name}_{channel:04d}.nii.gz")
    return str(folder)


@pytest.fixture
def both(images, models) -> list[nnUNetPredictor]:
    model = models(ModelSpec(**TWO_CHANNELS, patch_size=(40, 48, 40)), images("head_two_channels"))
    return [make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor)]


def segmentations(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz"))


def test_folder_of_cases_with_several_channels(both, two_channel_folder: str, tmp_path: Path):
    compare_written(*both, two_channel_folder, tmp_path)
    assert segmentations(tmp_path / "ours") == sorted(NAMES)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_part_of_a_folder_is_stocks_part(part: int, both, two_channel_folder: str, tmp_path: Path):
    stock, ours = both
    cases, outputs, _ = stock._manage_input_and_output_lists(
        two_channel_folder, str(tmp_path / "ours"), None, True, part, 3, False
    )
    (tmp_path / "stock").mkdir()
    predict_stock(stock, cases, str(tmp_path / "stock"))
    result = predict_ours(ours, two_channel_folder, str(tmp_path / "ours"), num_parts=3, part_id=part)
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")
    assert result == [None] * len(outputs)


def test_part_without_cases(both, two_channel_folder: str, tmp_path: Path):
    assert predict_ours(both[1], two_channel_folder, str(tmp_path / "ours"), num_parts=9, part_id=8) is None
    assert segmentations(tmp_path / "ours") == []


def test_lists_of_files_under_names_of_ones_own(both, two_channel_folder: str, tmp_path: Path):
    cases = [[f"{two_channel_folder}/{name}_{i:04d}.nii.gz" for i in range(2)] for name in ("z", "case")]
    for predict, predictor, who in zip((predict_stock, predict_ours), both, ("stock", "ours"), strict=True):
        (tmp_path / who).mkdir()
        predict(predictor, cases, [str(tmp_path / who / "a.b"), str(tmp_path / who / "c")], save_probabilities=True)
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")
    assert segmentations(tmp_path / "ours") == ["a.b", "c"]


def test_parts_of_lists(both, two_channel_folder: str, tmp_path: Path):
    cases = [[f"{two_channel_folder}/{name}_{i:04d}.nii.gz" for i in range(2)] for name in NAMES]
    names = [str(tmp_path / "ours" / f"out_{i}") for i in range(4)]
    predict_ours(both[1], cases, names, num_parts=2, part_id=1)
    assert segmentations(tmp_path / "ours") == ["out_1", "out_3"]


def test_continued_prediction_keeps_what_is_there(both, two_channel_folder: str, tmp_path: Path):
    stock, ours = both
    out = tmp_path / "ours"
    predict_ours(ours, two_channel_folder, str(out))
    (tmp_path / "stock").mkdir()
    predict_stock(stock, two_channel_folder, str(tmp_path / "stock"))
    (out / "case.nii.gz").unlink()
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    assert predict_ours(ours, two_channel_folder, str(out), overwrite=False) == [None]
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz") if p.name in times} == times
    assert_same_folder(tmp_path / "stock", out)
    assert predict_ours(ours, two_channel_folder, str(out), overwrite=False) is None


def test_continued_prediction_predicts_again_where_probabilities_are_missing(both, two_channel_folder, tmp_path: Path):
    stock, ours = both
    cases = [[f"{two_channel_folder}/z_{i:04d}.nii.gz" for i in range(2)]]
    (tmp_path / "stock").mkdir()
    predict_stock(stock, cases, str(tmp_path / "stock"), save_probabilities=True)
    predict_ours(ours, cases, str(tmp_path / "ours"))
    assert predict_ours(ours, cases, str(tmp_path / "ours"), save_probabilities=True, overwrite=False) == [None]
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_case_predicted_twice_is_the_same(both, images, tmp_path: Path):
    files = images("head_two_channels")
    results = predict_ours(both[1], [files, files], None)
    assert np.array_equal(*results)
    assert_same_return(predict_stock(both[0], [files], None), results[:1], False)


# -- what cannot be right is refused, in one line, before anything is predicted


def test_cascade_without_previous_stage_is_refused(cascade, tmp_path: Path):
    model, files, _ = cascade({}, "head")
    with pytest.raises(UsageError, match="3d_lowres"):
        predict_ours(make_predictor(LowMemPredictor, model), [files], str(tmp_path / "ours"))
    assert segmentations(tmp_path / "ours") == []


def test_missing_segmentation_of_the_previous_stage_is_refused(cascade, tmp_path: Path):
    model, files, previous = cascade({}, "head")
    (previous / "head.nii.gz").unlink()
    with pytest.raises(LowMemError, match=r"head\.nii\.gz"):
        predict_ours(make_predictor(LowMemPredictor, model), [files], str(tmp_path / "ours"), str(previous))


def test_previous_stage_of_another_shape_is_refused_with_both_shapes(cascade, tmp_path: Path):
    model, files, previous = cascade({}, "head")
    image = SimpleITK.ReadImage(str(previous / "head.nii.gz"))
    SimpleITK.WriteImage(image[:30], str(previous / "head.nii.gz"))
    with pytest.raises(LowMemError, match="head") as caught:
        predict_ours(make_predictor(LowMemPredictor, model), [files], str(tmp_path / "ours"), str(previous))
    assert {"30", "37", "44"} <= set("".join(c if c.isdigit() else " " for c in str(caught.value)).split())
    assert segmentations(tmp_path / "ours") == []


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_weights_that_do_not_fit_the_labels_are_refused_with_both_numbers(images, models, tmp_path: Path):
    model = shutil.copytree(models(ModelSpec(), images("head")), tmp_path / "model")
    edit_json(model / "dataset.json", lambda d: d["labels"].update(more=4))
    with pytest.raises(ModelError) as caught:
        make_predictor(LowMemPredictor, str(model))
    assert {"4", "5"} <= set(str(caught.value).replace("(", " ").replace(",", " ").replace("[", " ").split())


def test_unknown_reader_is_refused_by_name(images, models, tmp_path: Path):
    model = shutil.copytree(models(ModelSpec(), images("head")), tmp_path / "model")
    edit_json(model / "plans.json", lambda d: d.update(image_reader_writer="NoSuchIO"))
    with pytest.raises(ModelError, match="NoSuchIO"):
        predict_ours(make_predictor(LowMemPredictor, str(model)), [images("head")], str(tmp_path / "ours"))
    assert segmentations(tmp_path / "ours") == []
