"""Continuing a run: what is trusted, what is looked at again, what is predicted again."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import ModelSpec
from oracle import make_predictor, record_files, recorded, recorded_names
from skimage import io

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.predict.records import Recipe, Records, Standing, fingerprint, states
from nnunet_lowmem.system import owned_folders
from nnunet_lowmem.volumes.verifying import DamagedFileError, verify_whole


@pytest.fixture
def done(tmp_path, images) -> Recipe:
    """A whole file with its record."""
    source = Path(images("small")[0])
    for name in ("out.nii.gz", "in.nii.gz"):
        (tmp_path / name).write_bytes(source.read_bytes())
    recipe = Recipe((tmp_path / "out.nii.gz",), (tmp_path / "in.nii.gz",), "model")
    note(recipe)
    return recipe


def note(recipe: Recipe) -> None:
    recipe.write_record(states(recipe.inputs), Arithmetic.EXACT)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def forget(recipe: Recipe) -> None:
    """Remove the records beside an output."""
    for file in record_files(recipe.outputs[0].parent):
        file.unlink()


def test_done_with_a_record(done):
    assert done.standing() is Standing.DONE


def test_a_record_is_a_line_in_a_file_of_the_process_beside_the_output(done, tmp_path):
    second = Recipe((tmp_path / "in.nii.gz",), (), "model")
    note(second)
    (file,) = record_files(tmp_path)
    assert file.read_bytes().count(b"\n") == len(recorded(tmp_path)) == 2
    assert recorded_names(tmp_path) == ["in.nii.gz", "out.nii.gz"]


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
    note(both)
    assert both.standing() is Standing.DONE
    cut(done.inputs[0], 0.9)
    assert both.standing() is Standing.CHANGED_INPUT


def test_whole_file_without_a_record(done):
    forget(done)
    assert done.standing() is Standing.UNRECORDED


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("recorded", [True, False])
def test_truncated_file(share, recorded, done):
    """A record of a file that was whole says nothing for one that no longer is."""
    if not recorded:
        forget(done)
    cut(done.outputs[0], share)
    assert done.standing() is Standing.DAMAGED


def test_flipped_bit(done):
    content = bytearray(done.outputs[0].read_bytes())
    content[len(content) // 2] ^= 16
    done.outputs[0].write_bytes(content)
    assert done.standing() is Standing.DAMAGED


NONE = [
    "",
    "{",
    "[]",
    "3",
    '{"outputs": 3}',
    '{"outputs": {}}',
    '{"outputs": {"out.nii.gz": 1}, "time_ns": "x"}',
    "\0\0",
    "\xff",
]


@pytest.mark.parametrize("text", NONE)
@pytest.mark.parametrize("place", ["lowmem_run-x.jsonl", ".nnunet_lowmem/out.nii.gz.json"])
def test_record_that_is_none(text, place, done, tmp_path):
    forget(done)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(text.encode("latin-1"))
    assert done.standing() is Standing.UNRECORDED


# -- many lines, many files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 20, 100])
def test_torn_line_costs_itself_only(missing, done, tmp_path):
    """After a power cut, or on a disk that was full; the line after it is not glued to it."""
    (file,) = record_files(tmp_path)
    source = Recipe((tmp_path / "in.nii.gz",), (), "model")
    note(source)
    os.truncate(file, file.stat().st_size - missing)
    # without its last byte it still says all
    assert (source.standing(), done.standing()) == (
        Standing.DONE if missing == 1 else Standing.UNRECORDED,
        Standing.DONE,
    )
    note(source)
    assert (source.standing(), done.standing()) == (Standing.DONE, Standing.DONE)


def edited(done: Recipe, **changes: Any) -> bytes:
    (record,) = recorded(done.outputs[0].parent)
    return json.dumps({**record, **changes}).encode() + b"\n"


LATER, EARLIER = 2**62, 1


@pytest.mark.parametrize(
    "place, changes, standing",
    [
        ("same", {}, Standing.OTHER_MODEL),
        ("same", {"time_ns": EARLIER}, Standing.OTHER_MODEL),
        ("another", {"time_ns": LATER}, Standing.OTHER_MODEL),
        ("another", {"time_ns": EARLIER}, Standing.DONE),
        # of a file that was there once, or is no longer
        ("same", {"outputs": {"out.nii.gz": [1, "00"]}}, Standing.DONE),
        ("another", {"outputs": {"out.nii.gz": [1, "00"]}, "time_ns": LATER}, Standing.DONE),
    ],
)
def test_last_line_about_what_is_there_wins(place, changes, standing, done, tmp_path):
    file = record_files(tmp_path)[0] if place == "same" else tmp_path / "lowmem_run-0.jsonl"
    line = edited(done, made_with="another", **changes)
    with file.open("ab") as stream:
        stream.write(line)
    assert done.standing() is standing


@pytest.mark.parametrize("made_with, standing", [("model", Standing.DONE), ("another", Standing.OTHER_MODEL)])
def test_records_of_former_versions_are_read(made_with, standing, done, tmp_path):
    line = edited(done, made_with=made_with)
    forget(done)
    (tmp_path / ".nnunet_lowmem").mkdir()
    (tmp_path / ".nnunet_lowmem" / "out.nii.gz.json").write_bytes(line)
    assert done.standing() is standing
    note(done)
    assert done.standing() is Standing.DONE
    assert [path.name for path in (tmp_path / ".nnunet_lowmem").iterdir()] == ["out.nii.gz.json"]


def test_a_folder_is_read_once(done, tmp_path):
    known = Records()
    assert done.standing(known) is Standing.DONE
    forget(done)
    assert done.standing(known) is Standing.DONE
    assert done.standing() is Standing.UNRECORDED


def record_all(folder: Path, number: int) -> None:
    """Record 40 outputs from four threads."""
    outputs = [folder / f"{number}-{output}" for output in range(40)]
    for output in outputs:
        output.write_bytes(b"x")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda output: note(Recipe((output,), (), "model")), outputs))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_and_threads_that_record_at_once(done, tmp_path):
    """Forked ones, too, have files of their own; an empty line, as threads at once may leave one, is no record."""
    processes = [multiprocessing.get_context("fork").Process(target=record_all, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [[line for line in file.read_bytes().splitlines() if line] for file in record_files(tmp_path)]
    assert sorted(map(len, lines)) == [1, 40, 40, 40]
    assert len(recorded_names(tmp_path)) == 1 + 3 * 40


def ended_name() -> str:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return f"lowmem_run-{owned_folders._host()}-{process.pid}-0123abcd.jsonl"


@pytest.mark.parametrize(
    "name, outputs, age_s, stays",
    [
        (ended_name, ["out.nii.gz"], 0, False),
        (ended_name, ["out.nii.gz", "gone.nii.gz"], 0, False),
        (ended_name, ["out.nii.gz", "in.nii.gz"], 0, True),
        (ended_name, [], 0, False),
        (lambda: f"lowmem_run-{owned_folders._host()}-{os.getppid()}-0123abcd.jsonl", ["out.nii.gz"], 0, True),
        ("lowmem_run-00000000-1-0123abcd.jsonl", ["out.nii.gz"], 3600, True),
        ("lowmem_run-00000000-1-0123abcd.jsonl", ["out.nii.gz"], 25 * 3600, False),
        ("lowmem_run-kept.jsonl", ["out.nii.gz"], 0, True),
        (lambda: ended_name().replace("run", "else"), ["out.nii.gz"], 0, True),
    ],
)
def test_files_that_say_nothing_new_are_removed_once_their_process_has_ended(
    name, outputs, age_s, stays, done, tmp_path
):
    line = edited(done, outputs={output: [1, "00"] for output in outputs}, time_ns=EARLIER)
    forget(done)
    file = tmp_path / (name if isinstance(name, str) else name())
    file.write_bytes(line if outputs else b'{"out')
    os.utime(file, (time.time() - age_s,) * 2)
    note(done)
    assert file.exists() == stays
    assert len(record_files(tmp_path)) == 1 + (stays and "run" in file.name)


def test_own_file_stays_however_the_clocks_go(done, tmp_path):
    (own,) = record_files(tmp_path)
    other = tmp_path / "lowmem_run-other.jsonl"
    other.write_bytes(edited(done, time_ns=LATER))
    own.unlink()
    note(done)
    assert record_files(tmp_path) == sorted([own, other])


def test_what_cannot_be_recorded_is_told_and_decoded(done, tmp_path, caplog):
    (file,) = record_files(tmp_path)
    file.unlink()
    file.mkdir()
    note(done)
    assert "out.nii.gz is whole, but that could not be recorded" in caplog.text
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
    (file,) = record_files(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(line for line in lines if b'"2.nii.gz"' not in line))
    (tmp_path / "3.nii.gz").unlink()
    caplog.clear()
    results = predictor.predict_from_files(cases, targets, overwrite=False)
    assert len(results) == 2
    assert [case.case for case in predictor.run_report.done] == ["small", "head_margin"]
    assert [case.case for case in predictor.run_report.skipped] == ["head", "zeros"]
    assert [Path(f"{target}.nii.gz").read_bytes() for target in targets] == whole
    assert "case zeros: skipped, there is a whole file that this package has not recorded" in caplog.text
    assert predictor.predict_from_files(cases, targets, overwrite=False) is None
    # the folder is the user's: there is nothing in it that cannot be removed
    for path in tmp_path.iterdir():
        os.remove(path)


@pytest.mark.skipif(os.name == "nt", reason="needs links and modes")
def test_outputs_that_are_links_are_recorded_and_continued(images, models, tmp_path):
    """All three files of a case, by their own names and from where these lead."""
    (tmp_path / "out").mkdir()
    case, target = images("small"), str(tmp_path / "out" / "small")
    (tmp_path / "out" / "small.nii.gz").symlink_to("../elsewhere.nii.gz")
    (tmp_path / "shared.npz").write_bytes(b"old")
    os.link(tmp_path / "shared.npz", tmp_path / "out" / "small.npz")
    (tmp_path / "out" / "small.pkl").touch(0o600)
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), case), (0,))
    arguments = {"save_probabilities": True, "num_processes_preprocessing": 0}
    predictor.predict_from_files([case], [target], **arguments)
    verify_whole(tmp_path / "elsewhere.nii.gz")
    verify_whole(tmp_path / "shared.npz")
    assert (tmp_path / "out" / "small.pkl").stat().st_mode & 0o777 == 0o600
    assert recorded_names(tmp_path / "out") == ["small.nii.gz", "small.npz", "small.pkl"]
    assert predictor.predict_from_files([case], [target], overwrite=False, **arguments) is None
    cut(tmp_path / "shared.npz", 0.5)
    assert predictor.predict_from_files([case], [target], overwrite=False, **arguments) == [None]
    assert [len(file.read_bytes().splitlines()) for file in record_files(tmp_path / "out")] == [2]


def test_output_of_other_options_is_named_and_kept_unless_overwritten(images, models, tmp_path, caplog):
    caplog.set_level("INFO", "nnunet_lowmem")
    cases, targets = [images("head")], [str(tmp_path / "head")]
    model = models(ModelSpec(), cases[0])
    make_predictor(LowMemPredictor, model, (0,)).predict_from_files(cases, targets)
    other = make_predictor(LowMemPredictor, model, (0,), tile_step_size=1.0)
    (tmp_path / "lowmem_failures.json").write_text("{}")  # of a run that failed meanwhile
    assert other.predict_from_files(cases, targets, overwrite=False) is None
    assert not (tmp_path / "lowmem_failures.json").exists()
    assert "case head: skipped, done before by another model or with other options" in caplog.text
    assert other.predict_from_files(cases, targets) == [None]
