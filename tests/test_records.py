"""Continuing a run: what is trusted, what is looked at again, what is predicted again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from factory import ModelSpec
from oracle import make_predictor
from skimage import io

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.records import Recipe, Standing, fingerprint
from nnunet_lowmem.verifying import DamagedFileError, verify_whole


@pytest.fixture
def done(tmp_path, images) -> Recipe:
    """A whole file with its record."""
    source = Path(images("small")[0])
    for name in ("out.nii.gz", "in.nii.gz"):
        (tmp_path / name).write_bytes(source.read_bytes())
    recipe = Recipe((tmp_path / "out.nii.gz",), (tmp_path / "in.nii.gz",), "model")
    recipe.write_record()
    return recipe


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_done_with_a_record(done):
    assert done.standing() is Standing.DONE


def test_record_is_hidden_and_beside_the_output(done):
    assert done.record_file.parent == done.outputs[0].parent / ".nnunet_lowmem"


def test_output_that_is_gone(done):
    done.outputs[0].unlink()
    assert done.standing() is Standing.ABSENT


def test_one_output_of_two_is_gone(done):
    both = Recipe((*done.outputs, done.outputs[0].with_name("out.npz")), done.inputs, "model")
    assert both.standing() is Standing.ABSENT


def test_other_options(done):
    assert Recipe(done.outputs, done.inputs, "another").standing() is Standing.OTHER_MODEL


@pytest.mark.parametrize("what", ["size", "time"])
def test_input_that_has_changed(what, done):
    if what == "size":
        cut(done.inputs[0], 0.9)
    else:
        os.utime(done.inputs[0], (1, 1))
    assert done.standing() is Standing.CHANGED_INPUT


def test_input_that_is_gone(done):
    done.inputs[0].unlink()
    assert done.standing() is Standing.CHANGED_INPUT


def test_inputs_of_one_name_in_two_folders(done, tmp_path):
    (tmp_path / "PET").mkdir()
    second = tmp_path / "PET" / "in.nii.gz"
    second.write_bytes(b"")
    both = Recipe(done.outputs, (*done.inputs, second), "model")
    both.write_record()
    assert both.standing() is Standing.DONE
    cut(done.inputs[0], 0.9)
    assert both.standing() is Standing.CHANGED_INPUT


def test_whole_file_without_a_record(done):
    done.record_file.unlink()
    assert done.standing() is Standing.UNRECORDED


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("recorded", [True, False])
def test_truncated_file(share, recorded, done):
    """A record of a file that was whole says nothing for one that no longer is."""
    if not recorded:
        done.record_file.unlink()
    cut(done.outputs[0], share)
    assert done.standing() is Standing.DAMAGED


def test_flipped_bit(done):
    content = bytearray(done.outputs[0].read_bytes())
    content[len(content) // 2] ^= 16
    done.outputs[0].write_bytes(content)
    assert done.standing() is Standing.DAMAGED


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outputs": 3}', '{"outputs": {}}'])
def test_record_that_is_none(text, done):
    done.record_file.write_text(text)
    assert done.standing() is Standing.UNRECORDED


def test_fingerprint_tells_options_and_weights_apart():
    a, b = b"weights", b"other weights"
    prints = {fingerprint({"step": 0.5}, [a]), fingerprint({"step": 1}, [a]), fingerprint({"step": 0.5}, [b])}
    assert len(prints) == 3
    assert fingerprint({"step": 0.5, "x": 1}, [a]) == fingerprint({"x": 1, "step": 0.5}, [a])


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".tif", ".npz"])
def test_whole_files_of_every_kind_and_their_pieces(ending, images, tmp_path):
    path = tmp_path / f"file{ending}"
    rng = np.random.default_rng(0)
    if ending == ".npz":
        np.savez_compressed(path, probabilities=rng.random((3, 9, 8, 7)))
    elif ending in (".png", ".tif"):
        io.imsave(path, rng.integers(0, 255, (60, 50), np.uint8), check_contrast=False)
    else:
        import SimpleITK

        SimpleITK.WriteImage(SimpleITK.ReadImage(images("small")[0]), str(path), True)
    verify_whole(path)
    cut(path, 0.6)
    with pytest.raises(DamagedFileError):
        verify_whole(path)


def test_continued_run_predicts_what_is_missing_or_damaged(images, models, tmp_path, caplog):
    """Of four cases one is done, one cut, one made by something else, one was never predicted."""
    caplog.set_level("INFO", "nnunet_lowmem")
    cases = [images(name) for name in ("head", "small", "zeros", "head_margin")]
    targets = [str(tmp_path / str(number)) for number in range(4)]
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), cases[0]), (0,))
    predictor.predict_from_files(cases, targets)
    whole = [Path(f"{target}.nii.gz").read_bytes() for target in targets]
    cut(tmp_path / "1.nii.gz", 0.7)
    (tmp_path / ".nnunet_lowmem/2.nii.gz.json").unlink()
    (tmp_path / "3.nii.gz").unlink()
    caplog.clear()
    results = predictor.predict_from_files(cases, targets, overwrite=False)
    assert len(results) == 2
    assert [case.case for case in predictor.run_report.done] == ["small", "head_margin"]
    assert [case.case for case in predictor.run_report.skipped] == ["head", "zeros"]
    assert [Path(f"{target}.nii.gz").read_bytes() for target in targets] == whole
    assert "case zeros is skipped: there is a whole file that this package has not recorded" in caplog.text
    assert predictor.predict_from_files(cases, targets, overwrite=False) is None


def test_output_of_other_options_is_named_and_kept_unless_overwritten(images, models, tmp_path, caplog):
    caplog.set_level("INFO", "nnunet_lowmem")
    cases, targets = [images("head")], [str(tmp_path / "head")]
    model = models(ModelSpec(), cases[0])
    make_predictor(LowMemPredictor, model, (0,)).predict_from_files(cases, targets)
    other = make_predictor(LowMemPredictor, model, (0,), tile_step_size=1.0)
    assert other.predict_from_files(cases, targets, overwrite=False) is None
    assert "case head is skipped: done before by another model or with other options" in caplog.text
    assert other.predict_from_files(cases, targets) == [None]
