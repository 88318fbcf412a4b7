"""Preprocessing the next case in a worker: the same files, no process left, and a way on when no worker can be had."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from factory import ModelSpec
from oracle import make_predictor, read_voxels

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.predict import prefetching
from nnunet_lowmem.system.workers import Worker, WorkerStartError
from nnunet_lowmem.volumes import spilling


def workers() -> list[psutil.Process]:
    """Children of this process but for Python's own resource tracker, which lives as long as this process."""
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.fixture
def cases(images):
    return [images("head"), images("head_margin"), images("small")]


def predict(model: str, cases: list[list[str]], folder: Path, **options) -> dict[str, bytes]:
    predictor = make_predictor(LowMemPredictor, model, (0,), **options)
    predictor.predict_from_files(cases, str(folder), num_processes_preprocessing=2)
    return {path.name: read_voxels(path).tobytes() for path in folder.glob("*.nii.gz")}


def outputs(cases: list[list[str]], folder: Path) -> list[str]:
    return [str(folder / os.path.basename(files[0]).removesuffix("_0000.nii.gz")) for files in cases]


def test_same_label_maps_as_without_a_worker(cases, models, tmp_path):
    model = models(ModelSpec(), cases[0])
    expected = predict(model, cases, tmp_path / "in_process", prefetch=False)
    assert predict(model, cases, tmp_path / "prefetched", prefetch=True) == expected
    assert len(expected) == 3
    assert not workers()


def test_file_that_is_no_case_keeps_nobody_from_prefetching(images, models, tmp_path, monkeypatch):
    asked_for: list[str] = []

    def cannot(*args, **kwargs):
        asked_for.append(kwargs["case"])
        raise WorkerStartError("no processes here")

    monkeypatch.setattr(prefetching, "Worker", cannot)
    (tmp_path / "in").mkdir()
    for name in ("a_0000", "b", "c_0000"):
        shutil.copy(images("small")[0], tmp_path / "in" / f"{name}.nii.gz")
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), images("small")), prefetch=True)
    with pytest.raises(CasesFailedError, match=r"1 of 3 cases failed: case b, .*b\.nii\.gz has no channel number"):
        predictor.predict_from_files(str(tmp_path / "in"), str(tmp_path / "out"), num_processes_preprocessing=2)
    assert asked_for == ["c"]


def test_worker_that_is_killed_is_replaced_once(cases, models, tmp_path, monkeypatch):
    killed = []

    class FirstIsKilled(Worker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if not killed:
                killed.append(self.pid)
                os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(prefetching, "Worker", FirstIsKilled)
    model = models(ModelSpec(), cases[0])
    assert len(predict(model, cases[:2], tmp_path / "out", prefetch=True)) == 2
    assert killed


def test_worker_that_is_killed_twice_is_an_error_that_names_case_and_signal(cases, models, tmp_path, monkeypatch):
    class Killed(Worker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(prefetching, "Worker", Killed)
    with pytest.raises(CasesFailedError, match=r"head_margin.*SIGKILL"):
        predict(models(ModelSpec(), cases[0]), cases[:2], tmp_path / "out", prefetch=True)
    assert (tmp_path / "out" / "head.nii.gz").exists()
    assert not workers()


def test_goes_on_in_process_where_no_worker_can_be_started(cases, models, tmp_path, monkeypatch, caplog):
    def cannot(*args, **kwargs):
        raise WorkerStartError("no processes here")

    monkeypatch.setattr(prefetching, "Worker", cannot)
    assert len(predict(models(ModelSpec(), cases[0]), cases, tmp_path / "out", prefetch=True)) == 3
    assert "no processes here" in caplog.text


def test_bad_input_in_the_worker_is_reported_as_in_process(cases, models, tmp_path):
    broken = tmp_path / "broken_0000.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(CasesFailedError, match=r"case broken, preprocessing: .*broken_0000\.nii\.gz"):
        predict(models(ModelSpec(), cases[0]), [cases[0], [str(broken)]], tmp_path / "out", prefetch=True)
    assert (tmp_path / "out" / "head.nii.gz").exists()


@pytest.mark.slow
def test_bad_first_case_costs_itself_and_no_prefetching(cases, models, tmp_path, monkeypatch):
    started = []

    class Counted(Worker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self.pid)

    monkeypatch.setattr(prefetching, "Worker", Counted)
    broken = tmp_path / "broken_0000.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(CasesFailedError, match=r"1 of 3 cases failed: case broken, preprocessing: .*broken_0000"):
        predict(models(ModelSpec(), cases[0]), [[str(broken)], *cases[:2]], tmp_path / "out", prefetch=True)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert started


def test_no_prefetching_where_the_temporary_folder_is_in_ram(cases, models, tmp_path, monkeypatch):
    """The worker would hand its image over in a file there."""
    monkeypatch.setattr(spilling, "IN_MEMORY", (spilling.file_system(tmp_path),))
    monkeypatch.setattr(prefetching, "Worker", lambda *args, **kwargs: pytest.fail("a worker was started"))
    model = models(ModelSpec(), cases[0])
    assert len(predict(model, cases[:2], tmp_path / "out", prefetch=True, tmp_dir=tmp_path)) == 2
