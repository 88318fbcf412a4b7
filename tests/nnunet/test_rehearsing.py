"""The writer is tried before a case is computed: what it refuses, or would write otherwise, costs no computing."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from model_table import TWO_CHANNELS
from nnunetv2.imageio import simpleitk_reader_writer
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import INSTALLED, assert_same_array, make_predictor, predict_stock
from skimage import io

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import CasesFailedError, WriteError
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet.rehearsing import is_tried, rehearse
from nnunet_lowmem.volumes.verifying import verify_label_file

FOUR_LABELS = LabelRule(True, np.arange(5, dtype=np.uint16), np.dtype(np.uint8))
MANY_LABELS = LabelRule(True, np.arange(400, dtype=np.uint16), np.dtype(np.uint16))
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PROPERTIES = {
    "sitk_stuff": {"spacing": (1.0, 1.2, 2.0), "origin": (0.0, 1.0, 2.0), "direction": IDENTITY},
    "nibabel_stuff": {
        "original_affine": np.diag([-1.0, -1.0, 2.0, 1.0]),
        "reoriented_affine": np.diag([1.0, 1.0, 2.0, 1.0]),
    },
    "spacing": [2.0, 1.2, 1.0],
}
SHAPE, PICTURE = (30, 28, 26), (1, 28, 26)


def tried(writer: type, name: str, ending: str, folder: Path, rule: LabelRule = FOUR_LABELS, **changed: Any) -> str:
    """What is said of an output of that name; empty where nothing is."""
    shape = PICTURE if writer is NaturalImage2DIO else SHAPE
    try:
        rehearse(writer, str(folder / name), ending, {**PROPERTIES, **changed}, shape, rule, folder)
    except WriteError as error:
        text = str(error)
        assert "\n" not in text
        assert text.endswith(("another name", "dataset.json", "given", "and so on"))
        return text
    finally:
        assert not list(folder.iterdir())
    return ""


TAKEN = [
    *((SimpleITKIO, ending) for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".gipl.gz", ".tif")),
    *((SimpleITKIO, ending) for ending in (".hdr", ".img", ".img.gz", ".mhd", ".nhdr")),
    *((NibabelIO, ending) for ending in (".nii", ".nii.gz", ".NII.GZ", ".hdr", ".img.gz", ".mgz")),
    (NibabelIOWithReorient, ".nii.gz"),
    *((NaturalImage2DIO, ending) for ending in (".png", ".PNG", ".bmp", ".tif")),
    *((Tiff3DIO, ending) for ending in (".tif", ".tiff", ".TIF")),
]
TAKEN += [(SimpleITKIO, ".dcm")]  # untried: so few voxels end the process
ODD_NAMES = (
    "two\nlines",
    "\x1b[31m",
    "-i",
    "100%",
    "%s",
    "[a](b)",
    '"q"',
    " lead",
    "trail ",
    "~x",
    "a\\b",
    "中",
    "a.b",
)


@pytest.mark.parametrize("writer, ending", TAKEN, ids=lambda value: getattr(value, "__name__", value))
def test_what_can_be_written_is_let_through(writer, ending, tmp_path, capfd):
    """Pairs of files included, and without a word of the writer, who speaks of the map that is none."""
    assert tried(writer, "case", ending, tmp_path) == ""
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("writer, ending", [(SimpleITKIO, ".nii.gz"), (NibabelIO, ".nii.gz"), (Tiff3DIO, ".tif")])
def test_odd_names_that_can_be_written_are_let_through(writer, ending, tmp_path):
    assert [name for name in ODD_NAMES if tried(writer, name, ending, tmp_path)] == []


REFUSED = {
    "upper case": (SimpleITKIO, "case", ".NII.GZ", "Bad Nifti file name"),
    "upper case that is changed": (SimpleITKIO, "case", ".MHA", "writes case.mhd, case.zraw instead"),
    "two endings": (SimpleITKIO, "x.nii", ".nii.gz", "writes x.nii.gz instead; give the case another name"),
    "slices lost": (SimpleITKIO, "case", ".png", r"has shape \(6, 6\), not \(6, 6, 6\)"),
    "pattern": (SimpleITKIO, "100%", ".mhd", "which is none for a number; give the case another name"),
    "pattern that ends the process": (SimpleITKIO, "%s", ".mhd", "pattern; give the case another name"),
    "home": (SimpleITKIO, "~x", ".mhd", "absolute path; give the case another name"),
    "drive": (SimpleITKIO, "a:b", ".nhdr", "absolute path; give the case another name"),
    "backslash": (SimpleITKIO, "a\\b", ".mhd", "should be in b.zraw, which is not there; give the case another name"),
    "line break": (SimpleITKIO, "two\nlines", ".nhdr", r"two\\nlines.*give the case another name"),
    "bytes": (SimpleITKIO, "x\udcff", ".nii.gz", r"x\\udcff.*not UTF-8.*give the case another name"),
    "other library": (NibabelIO, "case", ".mha", "Cannot work out file type.*made for .nii, .nii.gz"),
    "other format": (Tiff3DIO, "case", ".nii.gz", "it is not a NIfTI file"),
    "lossy": (NaturalImage2DIO, "case", ".jpg", "other labels than were written.*made for .png, .bmp, .tif"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(name, tmp_path, monkeypatch):
    writer, case, ending, words = REFUSED[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "tmp"
    folder.mkdir()
    text = tried(writer, case, ending, folder)
    assert re.search(words, text), text
    assert str(folder) not in text.partition(": ")[2]
    assert not os.listdir(".")


def test_what_is_written_beside_is_looked_for(tmp_path):
    (tmp_path / "out" / "case.img").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    with pytest.raises(WriteError, match=r"case\.img: is a directory and no file"):
        rehearse(SimpleITKIO, str(tmp_path / "out" / "case"), ".hdr", PROPERTIES, SHAPE, FOUR_LABELS, tmp_path / "tmp")


def test_properties_stay_as_they_are_and_lacking_ones_are_told(tmp_path):
    assert "KeyError: 'spacing'" in tried(SimpleITKIO, "case", ".nii.gz", tmp_path, sitk_stuff={})
    before = repr(PROPERTIES)
    for writer in (SimpleITKIO, NibabelIO, NibabelIOWithReorient):
        tried(writer, "case", ".nii.gz", tmp_path)
    assert repr(PROPERTIES) == before


@pytest.mark.parametrize("ending, words", [(".png", ""), (".bmp", "labels of 255 and more cannot be written there")])
def test_labels_that_a_case_need_not_hold_are_a_warning(ending, words, tmp_path, caplog):
    if INSTALLED < (2, 6):
        words = "labels of 255 and more cannot be written there"  # that writer wraps them, whatever the ending
    assert tried(NaturalImage2DIO, "case", ending, tmp_path, MANY_LABELS) == ""
    assert (words in caplog.text) if words else not caplog.text


def test_writers_of_others_are_not_called(tmp_path, monkeypatch):
    class Own(SimpleITKIO):
        def write_seg(self, *arguments: Any) -> None:
            raise AssertionError("called")

    assert tried(Own, "case", ".nii.gz", tmp_path) == ""
    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", Own.write_seg)
        assert tried(SimpleITKIO, "case", ".nii.gz", tmp_path) == ""
    monkeypatch.setattr(simpleitk_reader_writer.sitk, "WriteImage", lambda *arguments: Own().write_seg())
    assert not is_tried(SimpleITKIO)


# -- whole runs


@pytest.fixture(scope="module")
def four(images, models, tmp_path_factory) -> tuple[str, list[str]]:
    small = SimpleITK.Cast(SimpleITK.ReadImage(images("small")[0]), SimpleITK.sitkFloat32)
    file = tmp_path_factory.mktemp("four") / "four_0000.nii.gz"
    SimpleITK.WriteImage(SimpleITK.JoinSeries([small, 2 * small]), str(file))
    return models(ModelSpec(**TWO_CHANNELS), images("head_two_channels")), [str(file)]


def test_channels_in_one_file_fail_before_they_are_computed(four, tmp_path):
    """Stock's reader takes them, and its writer has an AssertionError without words for them."""
    model, files = four
    with pytest.raises(AssertionError):
        predict_stock(make_predictor(nnUNetPredictor, model), [files], [str(tmp_path / "stock")])
    seen = []
    predictor = make_predictor(LowMemPredictor, model, on_progress=lambda progress: seen.append(progress.stage))
    words = r"case four, writing: .*four\.nii\.gz: .*store every channel in a file of its own"
    with pytest.raises(CasesFailedError, match=words) as raised:
        predictor.predict_from_files([files], [str(tmp_path / "four")])
    assert isinstance(raised.value, AssertionError)
    assert set(seen) == {"preprocessing"}
    assert not list(tmp_path.glob("*.nii.gz"))


def test_channels_in_one_file_give_arrays(four):
    model, files = four
    (expected,) = predict_stock(make_predictor(nnUNetPredictor, model), [files], None)
    (actual,) = make_predictor(LowMemPredictor, model).predict_from_files([files], None)
    assert_same_array(expected, actual)


def test_a_pair_of_files_is_written_and_a_changed_name_costs_its_case(images, models, tmp_path):
    spec = ModelSpec(file_ending=".hdr")
    image = SimpleITK.ReadImage(images("small")[0])
    SimpleITK.WriteImage(image, str(tmp_path / "a_0000.hdr"))
    predictor = make_predictor(LowMemPredictor, models(spec, images("small")))
    predictor.predict_from_files([[str(tmp_path / "a_0000.hdr")]], [str(tmp_path / "a")])
    verify_label_file(tmp_path / "a.hdr", SimpleITK.GetArrayFromImage(image).shape)
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), images("small")))
    files = images("small")
    with pytest.raises(CasesFailedError, match=r"1 of 2 cases failed: .*writes x\.nii\.gz instead"):
        predictor.predict_from_files([files, files], [str(tmp_path / "x.nii"), str(tmp_path / "y")])
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == ["y.nii.gz"]


def test_lossy_pictures_are_refused_before_they_are_computed(images, models, tmp_path):
    spec = ModelSpec(patch_size=(32, 28), spacing=(1.0, 1.0), reader="NaturalImage2DIO", file_ending=".png")
    png = images("picture", ".png")
    jpg = tmp_path / "picture_0000.jpg"
    io.imsave(jpg, io.imread(png[0]), check_contrast=False)
    predictor = make_predictor(LowMemPredictor, models(replace(spec, file_ending=".jpg"), png))
    with pytest.raises(CasesFailedError, match=r"picture\.jpg holds other labels than were written"):
        predictor.predict_from_files([[str(jpg)]], [str(tmp_path / "picture")])


class Untouchable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_what_else_is_in_the_properties_is_left_alone(tmp_path) -> None:
    assert tried(SimpleITKIO, "case", ".nii.gz", tmp_path, client=Untouchable()) == ""


@pytest.mark.parametrize("patched", ["GetImageFromArray", "WriteImage"])
def test_functions_that_somebody_counts_are_not_called(patched: str, tmp_path, monkeypatch) -> None:
    calls = []
    own = getattr(SimpleITK, patched)
    monkeypatch.setattr(SimpleITK, patched, lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    assert tried(SimpleITKIO, "case", ".nii.gz", tmp_path) == ""
    assert not calls


def test_library_that_somebody_has_put_into_the_reader_is_not_called(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(simpleitk_reader_writer, "sitk", object())
    assert tried(SimpleITKIO, "case", ".nii.gz", tmp_path) == ""


def test_temporary_folder_that_takes_nothing_costs_no_case(tmp_path) -> None:
    rehearse(SimpleITKIO, str(tmp_path / "case"), ".nii.gz", PROPERTIES, SHAPE, FOUR_LABELS, tmp_path / "nowhere")


def test_trials_in_threads_leave_the_output_of_the_process_alone(tmp_path) -> None:
    before = sys.stdout
    with ThreadPoolExecutor(4) as pool:
        folders = [tmp_path / str(number) for number in range(12)]
        for folder in folders:
            folder.mkdir()
        told = list(pool.map(lambda folder: tried(NibabelIOWithReorient, "case", ".nii.gz", folder), folders))
    assert told == [""] * 12
    assert sys.stdout is before
    assert "print" not in vars(simpleitk_reader_writer)
