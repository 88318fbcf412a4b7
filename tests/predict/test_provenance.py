"""What a record tells of a label map, against what is in the files themselves; and what `verify` finds of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from oracle import make_predictor, record_files, recorded

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.labels.counting import LabelCounts, counted
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.predict.records import SCHEMA, Recipe

NAME = "head.nii.gz"


def checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@pytest.fixture(scope="module")
def model(models, images) -> str:
    return models(ModelSpec(folds=(0, 1)), images("head"))


@pytest.fixture(scope="module")
def made(model, images, tmp_path_factory) -> Path:
    """A folder with one predicted case."""
    folder = tmp_path_factory.mktemp("made")
    predictor = make_predictor(LowMemPredictor, model, (0, 1), max_ram="20G")
    predictor.predict_from_files([images("head")], [str(folder / "head")])
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def verified(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(["verify", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_record_tells_with_what_and_agrees_with_the_files(made, model, images):
    (record,) = recorded(made)
    source, output = Path(images("head")[0]), made / NAME
    assert (record["schema"], record["case"], record["arithmetic"]) == (SCHEMA, "head", "exact")
    assert record["outputs"] == {NAME: [output.stat().st_size, checksum(output)]}
    (image,) = record["images"]
    assert (image["path"], image["bytes"], image["checksum"]) == (
        str(source), source.stat().st_size, checksum(source),
    )  # fmt: skip
    told = record["model"]
    assert (told["configuration"], told["trainer"]) == ("3d_fullres", "nnUNetTrainer")
    assert set(told["files"]) == {"plans.json", "dataset.json", *(f"fold_{n}/checkpoint_final.pth" for n in (0, 1))}
    assert all(told["files"][name][1] == checksum(Path(model, name)) for name in told["files"])
    assert (record["settings"]["folds"], record["settings"]["max_ram"]) == (2, "20G")
    assert set(record["seconds"]) == {"preprocessing", "prediction", "export", "writing"}
    ram = record["memory"]["RAM"]
    assert 0 < ram["peak"] == max(ram["peak_by_stage"].values()) < ram["limit"] == 20 * 2**30
    assert 0 < ram["projected"] < ram["limit"]


def test_labels_are_counted_as_they_are_in_the_file(made):
    (record,) = recorded(made)
    image = SimpleITK.ReadImage(str(made / NAME))
    labels, voxel_ml = SimpleITK.GetArrayFromImage(image), np.prod(image.GetSpacing()) / 1000
    assert record["geometry"]["shape"] == list(labels.shape)
    assert record["geometry"]["place"] == [list(image.GetOrigin()), list(image.GetDirection())]
    assert record["geometry"]["spacing_mm"] == pytest.approx(image.GetSpacing()[::-1])
    values, voxels = np.unique(labels[labels > 0], return_counts=True)
    assert [label["value"] for label in record["labels"]] == values.tolist()
    assert [label["voxels"] for label in record["labels"]] == voxels.tolist()
    assert [label["ml"] for label in record["labels"]] == pytest.approx((voxels * voxel_ml).tolist(), abs=1e-6)
    assert {label["name"] for label in record["labels"]} == {f"class_{value}" for value in values}


def test_counts_of_any_strides_and_of_what_is_no_label_map():
    labels = np.random.default_rng(0).integers(0, 9, (5, 40, 1000)).astype(np.uint16)
    due = {value: int((labels == value).sum()) for value in range(1, 9)}
    for view in (labels, labels.transpose(2, 0, 1), labels[::-1], np.asfortranarray(labels)):
        assert counted(view) == due
    assert counted(labels.astype(np.float32)) == counted(labels.astype(np.int32) - 1) == {}
    counts = LabelCounts()
    counts.add(labels[:2])
    counts.add(labels[2:])
    assert counts.voxels() == due


def test_an_image_that_is_replaced_meanwhile_is_not_taken_for_the_one_that_was_read(model, images, tmp_path):
    source = Path(shutil.copy(images("head")[0], tmp_path / "head_0000.nii.gz"))

    def replace_it(progress) -> None:
        if progress.stage == "export" and source.stat().st_mtime_ns > 10**18:
            shutil.copy(images("small")[0], source)
            os.utime(source, ns=(1, 1))

    predictor = make_predictor(LowMemPredictor, model, (0,), on_progress=replace_it)
    predictor.predict_from_files([[str(source)]], [str(tmp_path / "head")])
    (record,) = recorded(tmp_path)
    assert "checksum" not in record["images"][0]
    predictor.on_progress = None
    predictor.predict_from_files([[str(source)]], [str(tmp_path / "head")], overwrite=False)
    assert len(recorded(tmp_path)) == 2, "it was taken for done"


def test_verify_says_as_written_at_once_and_shows_all_of_one_file(made, capsys):
    began = time.perf_counter()
    code, out, _ = verified(capsys, str(made))
    assert (code, "as written" in out) == (0, True)
    assert time.perf_counter() - began < 5
    code, out, _ = verified(capsys, str(made / NAME))
    assert code == 0
    for told in ("class_1", "3d_fullres", "fold_1/checkpoint_final.pth", "the same now", " ml", "nnunetv2", "peak"):
        assert told in "".join(out.split("\n")), told
    code, out, _ = verified(capsys, str(made), "--json")
    assert json.loads(out)["files"][0]["record"]["labels"]


def test_verify_finds_what_is_changed_missing_or_without_a_record(folder, capsys):
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[:-1] + b"x")
    (folder / "other.nii.gz").write_bytes(content)
    code, out, _ = verified(capsys, str(folder), "--json")
    told = {file["name"]: (file["verdict"], file["seen"]) for file in json.loads(out)["files"]}
    assert code == 1
    assert told["other.nii.gz"] == ("no record", "")
    assert told[NAME][0] == "changed"
    assert f"{len(content):,} bytes" in told[NAME][1]
    assert verified(capsys, str(folder))[0] == 1
    (folder / NAME).unlink()
    code, out, _ = verified(capsys, str(folder))
    assert (code, "missing" in out) == (1, True)


def test_records_of_a_newer_schema_and_damaged_ones_are_named_and_the_rest_is_used(folder, capsys):
    (file,) = record_files(folder)
    record = json.loads(file.read_text())
    newer = record | {"schema": SCHEMA + 1, "labels": "elsewhere", "model": [], "memory": None}
    file.write_text(f'{json.dumps(newer)}\n{{"torn\n\n{json.dumps({"schema": 99, "output": []})}\n')
    code, out, _ = verified(capsys, str(folder))
    assert (code, "as written" in out) == (0, True)
    assert f"line 1: of a newer version ({SCHEMA + 1}, here {SCHEMA})" in out
    assert "line 2: damaged" in out
    assert "line 4: damaged" in out
    code, out, _ = verified(capsys, str(folder / NAME))
    assert (code, "not told: labels" in out) == (0, True)


def test_verify_refuses_what_has_no_records(tmp_path, capsys):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    for path, told in (
        (tmp_path, "holds no record"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a.nii.gz", "no"),
    ):
        code, _, err = verified(capsys, str(path))
        assert (code, told in err) == (2, True)


def test_records_that_somebody_has_made_up_lead_nowhere_and_hide_nothing(folder, capsys):
    (file,) = record_files(folder)
    good = json.loads(file.read_text())
    odd = [{"outputs": {name: [0, ""]}} for name in ("/etc/passwd", "..", "", "a\0")]
    odd += [good | {"command": 5, "model": {"checkpoints": None}, "arithmetic": None, "time_ns": 10**30, "images": [3]}]
    file.write_text("\n".join([*map(json.dumps, odd), "[" * 200_000, ""]))
    code, out, _ = verified(capsys, str(folder))
    assert (code, "as written" in out, out.count("names what is no file beside it")) == (0, True, 4)
    code, out, _ = verified(capsys, str(folder / NAME))
    assert (code, "not told: command" in out, "not told: files" in out) == (0, True, True)
    if hasattr(os, "mkfifo"):
        (folder / NAME).unlink()
        os.mkfifo(folder / NAME)
        code, out, _ = verified(capsys, str(folder))
        assert (code, "unreadable" in out) == (1, True)


def test_images_and_other_files_beside_label_maps_are_not_missed_records(folder, model, images, capsys):
    shutil.copy(images("head")[0], folder)
    (folder / "notes.txt").write_text("mine")
    assert verified(capsys, str(folder))[0] == 0


def test_a_model_file_that_is_replaced_after_it_was_read_is_not_told_of(model, images, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    predictor = make_predictor(LowMemPredictor, str(copy))
    os.utime(copy / "fold_0" / "checkpoint_final.pth", ns=(1, 1))
    predictor.predict_from_files([images("small")], [str(tmp_path / "a")])
    (record,) = recorded(tmp_path)
    assert set(record["model"]["files"]) == {"plans.json", "dataset.json"}


def test_what_is_typed_is_told_but_no_secret(monkeypatch):
    words = [
        "/usr/bin/tool",
        "-i",
        "s3://me:word@host/a.zarr?sig=1",
        "--license_number",
        "aca_1",
        "--token=x",
        "-l",
        "b",
    ]
    monkeypatch.setattr("sys.argv", words)
    told = ("tool", "-i", "s3://host/a.zarr", "--license_number", "***", "--token=***", "-l", "b")
    assert Recipe((Path("a"),), (), "").command == told
    monkeypatch.setattr("sys.argv", [])
    assert Recipe((Path("a"),), (), "").command == ("",)


def test_a_case_is_recorded_although_it_cannot_be_told_how_it_was_made(folder, caplog):
    recipe = Recipe((folder / NAME,), (), "model")
    recipe.write_record([], Arithmetic.EXACT, lambda: {}["labels"])
    assert recipe.is_recorded()
    assert "its record does not tell how it was made: 'labels'" in caplog.text
