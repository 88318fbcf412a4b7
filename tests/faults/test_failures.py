"""A case that fails costs itself: the others are predicted, the failure is told, nothing half-written is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from factory import ModelSpec
from images import broken
from oracle import make_predictor, outputs, read_voxels, recorded_names
from placing import straight_to_file

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import planner
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import CasesFailedError, ModelError, UsageError, WriteError
from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.predict.logits import TileNetwork
from nnunet_lowmem.predict.outcomes import FAILURES_FILE
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.volumes.verifying import verify_whole


@pytest.fixture(scope="module")
def cases(images) -> list[list[str]]:
    return [images("head"), images("small"), images("zeros")]


@pytest.fixture(scope="module")
def model(models, cases) -> str:
    return models(ModelSpec(), cases[0])


@pytest.fixture(scope="module")
def expected(model, cases, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    predict(model, cases, folder)
    return label_maps(folder)


def predict(model: str, cases: list[list[str]], folder: Path, overwrite: bool = True, **options):
    predictor = make_predictor(LowMemPredictor, model, (0,), **options)
    return predictor, predictor.predict_from_files(cases, outputs(cases, folder), overwrite=overwrite)


def label_maps(folder: Path) -> dict[str, bytes]:
    return {path.name: read_voxels(path).tobytes() for path in folder.glob("*.nii.gz")}


def test_output_that_cannot_be_written_costs_its_case_before_it_is_computed(images, models, tmp_path):
    seen = []
    case, target = images("small"), tmp_path / "small"
    Path(f"{target}.nii.gz").symlink_to(tmp_path / "gone" / "x.nii.gz")
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), case), (0,), on_progress=seen.append)
    with pytest.raises(CasesFailedError, match=r"case small, preprocessing: .*small\.nii\.gz: is a symbolic link to"):
        predictor.predict_from_files([case], [str(target)])
    assert {progress.stage for progress in seen} == {"preprocessing"}


def test_the_others_are_predicted_and_one_error_tells(model, cases, expected, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CasesFailedError, match=r"1 of 4 cases failed: case broken, preprocessing: .*broken_0000"
    ) as raised:
        predict(model, [cases[0], broken(tmp_path), *cases[1:]], tmp_path / "out")
    assert label_maps(tmp_path / "out") == expected
    report = raised.value.report
    assert [case.case for case in report.done] == ["head", "small", "zeros"]
    assert [(case.case, case.stage) for case in report.failed] == [("broken", "preprocessing")]
    told = json.loads((tmp_path / "out" / FAILURES_FILE).read_text())
    assert told["done"] == ["head", "small", "zeros"]
    assert [(case["case"], case["stage"]) for case in told["failed"]] == [("broken", "preprocessing")]
    assert caplog.text.count("case broken, preprocessing") == 1


def test_failures_file_goes_when_nothing_fails_any_more(model, cases, tmp_path):
    with pytest.raises(CasesFailedError):
        predict(model, [broken(tmp_path)], tmp_path)
    assert (tmp_path / FAILURES_FILE).exists()
    predict(model, cases[1:2], tmp_path)
    assert not (tmp_path / FAILURES_FILE).exists()


def test_stocks_way_on_request(model, cases, tmp_path):
    with pytest.raises(UsageError, match=r"case broken, preprocessing: .*broken_0000"):
        predict(model, [broken(tmp_path), cases[0]], tmp_path, continue_on_error=False)
    assert not (tmp_path / "head.nii.gz").exists()


def test_tile_that_fails(model, cases, expected, tmp_path, monkeypatch):
    predictor = make_predictor(LowMemPredictor, model, (0,))
    real, calls = TileNetwork.predict, []

    def fails_once(network: TileNetwork, tile: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a tile of the first case failed")
        return real(network, tile)

    monkeypatch.setattr(TileNetwork, "predict", fails_once)
    with pytest.raises(CasesFailedError, match="case head, prediction: RuntimeError: a tile of the first case failed"):
        predictor.predict_from_files(cases, outputs(cases, tmp_path))
    assert len(calls) > 3
    assert label_maps(tmp_path) == {name: labels for name, labels in expected.items() if name != "head.nii.gz"}


def test_failed_case_leaves_no_array_alive(model, cases, tmp_path, monkeypatch):
    """An exception holds its frames, and these the arrays of the case: the report keeps words only."""
    predictor = make_predictor(LowMemPredictor, model, (0,))
    held: list = []

    def fails(network: TileNetwork, tile: torch.Tensor) -> torch.Tensor:
        held.append(tile.untyped_storage()._weak_ref())
        raise RuntimeError("no")

    monkeypatch.setattr(TileNetwork, "predict", fails)
    with pytest.raises(CasesFailedError) as raised:
        predictor.predict_from_files(cases[:1], outputs(cases[:1], tmp_path))
    assert raised.value.report.failed
    assert raised.value.__context__ is None
    assert torch.UntypedStorage._expired(held[0])


def test_model_that_is_broken_ends_the_run_at_once(models, cases, tmp_path):
    model = Path(models(ModelSpec(folds=(0, 1)), cases[0]))
    predictor = make_predictor(LowMemPredictor, str(model), (0, 1))
    weights = predictor.list_of_parameters[1]
    del weights[next(iter(weights))]
    with pytest.raises(ModelError, match=r"fold_1.checkpoint_final.pth do not fit.*Missing key"):
        predictor.predict_from_files(cases, outputs(cases, tmp_path))


def test_arrays_of_the_others_come_with_the_error(model, images):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    predictor = make_predictor(LowMemPredictor, model, (0,))
    array, properties = SimpleITKIO().read_images(images("small"))
    two_channels = array.repeat(2, axis=0)
    with pytest.raises(CasesFailedError, match=r"case array 0, preprocessing: .*2 channels") as raised:
        predictor.predict_from_list_of_npy_arrays([two_channels, array], None, [properties, dict(properties)], None)
    failed, done = raised.value.results
    assert failed is None
    assert done.shape == array.shape[1:]


def test_command_tells_and_ends_with_1(model, cases, tmp_path, capsys):
    for files in cases[:2]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / os.path.basename(files[0])).write_bytes(Path(files[0]).read_bytes())
    broken(tmp_path / "in")
    flags = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-f", "0", "-device", "cpu"]
    assert cli.predict_entry_point([*map(str, flags), "--disable_progress_bar"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: case broken, preprocessing: ")
    assert err.count("\n") == 1
    for words in (("head", "done"), ("small", "done"), ("broken", "failed", "preprocessing")):
        assert any(all(word in line for word in words) for line in out.splitlines()), words


# -- the disk


def test_run_that_cannot_fit_the_disk_is_refused_before_it_starts(model, cases, tmp_path, monkeypatch):
    """What is free is the only thing made up: 50 bytes, of which 59,000 voxels need at least 57."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50))
    with pytest.raises(WriteError, match=r"needs .* GiB, but .* has only .* GiB free"):
        predict(model, cases[:1], tmp_path)
    assert not list(tmp_path.glob("*.nii.gz"))


@pytest.mark.parametrize(("dtype", "level"), [("float32", "WARNING"), ("float16", "INFO")])
def test_size_of_probabilities_is_told_before_the_start(model, cases, tmp_path, monkeypatch, caplog, dtype, level):
    """Room for two bytes per voxel and head: too little for the probabilities of stock, enough for half of them."""
    caplog.set_level("INFO", logger="nnunet_lowmem")
    voxels = read_voxels(Path(cases[0][0])).size
    predictor = make_predictor(LowMemPredictor, model, (0,), probabilities_dtype=dtype)
    free = 2 * voxels * predictor.label_manager.num_segmentation_heads
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    predictor.predict_from_files(cases[:1], outputs(cases[:1], tmp_path), save_probabilities=True)
    (told,) = [record for record in caplog.records if "probabilities may take" in record.message]
    assert told.levelname == level
    assert f"in {tmp_path}" in told.message


@pytest.fixture
def small_disk(tmp_path):
    """Mount an empty file system of a given size; only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str, *more: str) -> Path:
        options = ",".join([f"size={size}", *more])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_full_disk_until_the_run_fits(model, cases, expected, small_disk):
    """The file system grows page by page under a run that is continued: each map is whole or absent at any time."""
    folder = small_disk("8k")
    told = []
    for pages in range(3, 64):
        try:
            predict(model, cases, folder, overwrite=False)
            break
        except (CasesFailedError, WriteError, OSError) as error:
            told.append(str(error))
        for path in folder.glob("*.nii.gz"):
            verify_whole(path)
            assert read_voxels(path).tobytes() == expected[path.name]
        assert not list(folder.glob(".partial*"))
        small_disk(f"{4 * pages}k", "remount")
    assert told
    assert all("No space left" in text or "free" in text for text in told)
    assert label_maps(folder) == expected


@pytest.mark.parametrize("leaves", [False, True])
def test_disk_that_fills_while_a_run_goes_on(leaves, models, images, small_disk, monkeypatch):
    """There is room when the run begins; when the first tile is computed others have taken it, but for 44 kB."""
    if leaves:
        monkeypatch.setattr(label_writing, "STREAMED_FROM_BYTES", 0)
        monkeypatch.setattr(planner, "placements", straight_to_file)
    cases = [images(name, ".nii") for name in ("head", "small", "zeros")]
    folder = small_disk("1m")
    ballast, taken = folder / "ballast", []

    def take(progress: Progress) -> None:
        if not taken and progress.stage == "prediction" and progress.done:
            taken.append(progress)
            ballast.write_bytes(bytes(shutil.disk_usage(folder).free - 44 * 1024))

    targets = [str(folder / name) for name in ("head", "small", "zeros")]
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(file_ending=".nii"), cases[0]), on_progress=take)
    with pytest.raises(
        CasesFailedError, match=r"1 of 3 cases failed: case head, .*head\.nii: could not be written whole"
    ):
        predictor.predict_from_files(cases, targets)
    assert sorted(path.name for path in folder.glob("*.nii")) == ["small.nii", "zeros.nii"]
    assert recorded_names(folder) == ["small.nii", "zeros.nii"]
    ballast.unlink()
    assert predictor.predict_from_files(cases, targets, overwrite=False) == [None]
    for target in targets:
        verify_whole(Path(f"{target}.nii"))
