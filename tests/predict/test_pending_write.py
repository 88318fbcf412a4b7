"""The files of a case are written while the next one is computed: seen in a writer that waits for the next case."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from oracle import make_predictor, read_voxels, recorded, recorded_names

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import CasesFailedError, WriteError
from nnunet_lowmem.predict.outcomes import FAILURES_FILE
from nnunet_lowmem.predict.pending_write import PendingWrite

NAMES = ("head", "small", "head_margin")


@pytest.fixture(scope="module")
def cases(images) -> list[list[str]]:
    return [images(name) for name in NAMES]


@pytest.fixture(scope="module")
def model(models, cases) -> str:
    return models(ModelSpec(), cases[0])


class Watched:
    """A predictor whose writer waits, for the first case, until a tile of the second has been predicted."""

    def __init__(self, model: str, monkeypatch, error: Exception | None = None, **options) -> None:
        self.next_case_runs, self.writers, self.events, self.told = threading.Event(), [], [], []
        watched = self

        class Slow(SimpleITKIO):
            def write_seg(self, segmentation, path, properties):
                watched.writers.append(threading.current_thread())
                if len(watched.writers) == 1:
                    assert watched.next_case_runs.wait(60), "the next case waits for the writer"
                    if error is not None:
                        raise error
                super().write_seg(segmentation, path, properties)

        monkeypatch.setattr(PlansManager, "image_reader_writer_class", Slow)
        self.predictor = make_predictor(
            LowMemPredictor, model, (0,), on_progress=self.note, on_case=self.told.append, **options
        )

    def note(self, progress) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.events.append((progress.case, progress.stage, progress.done))
        if (progress.case, progress.stage) == (NAMES[1], "prediction") and progress.done:
            self.next_case_runs.set()

    def predict(self, cases: list[list[str]], folder: Path) -> dict[str, bytes]:
        try:
            self.predictor.predict_from_files(cases, [str(folder / name) for name in NAMES[: len(cases)]])
        finally:
            assert not any("writer" in thread.name for thread in threading.enumerate())
            assert not list(folder.glob(".partial*"))
        return label_maps(folder)


def label_maps(folder: Path) -> dict[str, bytes]:
    return {path.name: read_voxels(path).tobytes() for path in folder.glob("*.nii.gz")}


def test_next_case_runs_while_the_first_is_written(model, cases, tmp_path, monkeypatch):
    for name in ("one_by_one", "in_a_row"):
        (tmp_path / name).mkdir()
    for number, case in enumerate(cases):
        predictor = make_predictor(LowMemPredictor, model, (0,))
        predictor.predict_from_files([case], [str(tmp_path / "one_by_one" / NAMES[number])])
    watched = Watched(model, monkeypatch)
    assert watched.predict(cases, tmp_path / "in_a_row") == label_maps(tmp_path / "one_by_one")
    assert [report.case for report in watched.told] == list(NAMES)
    assert [report.case for report in watched.predictor.run_report.done] == list(NAMES)
    assert watched.events.index((NAMES[1], "prediction", 1)) < watched.events.index((NAMES[0], "writing", 1))
    # told as soon as it is there, not when the next case ends
    assert watched.events.index((NAMES[0], "writing", 1)) < watched.events.index((NAMES[1], "writing", 1))
    assert all(events in watched.events for events in [(name, "writing", 1) for name in NAMES])
    assert watched.writers[-1] is threading.main_thread(), "after the last case there is nothing to do meanwhile"
    records = [[record["outputs"] for record in recorded(tmp_path / name)] for name in ("one_by_one", "in_a_row")]
    assert records[0] == records[1]
    assert len(records[0]) == len(NAMES)


def test_failed_write_costs_its_own_case(model, cases, tmp_path, monkeypatch):
    watched = Watched(model, monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    broken = tmp_path / "broken_0000.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(CasesFailedError, match=r"2 of 3 cases failed: case head, writing: .*No space left.*broken"):
        watched.predict([*cases[:2], [str(broken)]], tmp_path)
    report = watched.predictor.run_report
    assert [(case.case, case.stage) for case in report.failed] == [("head", "writing"), ("broken", "preprocessing")]
    assert [case.case for case in report.done] == ["small"] == [case.case for case in watched.told]
    assert [case["case"] for case in json.loads((tmp_path / FAILURES_FILE).read_text())["failed"]] == ["head", "broken"]
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == ["broken_0000.nii.gz", "small.nii.gz"]
    assert recorded_names(tmp_path) == ["small.nii.gz"]


def test_failed_write_ends_the_run_on_request(model, cases, tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    watched = Watched(model, monkeypatch, error, continue_on_error=False)
    with pytest.raises(WriteError, match=r"case head, writing|head\.nii\.gz.*No space left"):
        watched.predict(cases[:2], tmp_path)
    assert not list(tmp_path.glob("*.nii.gz"))


def test_case_before_is_written_although_the_next_is_cancelled(model, cases, tmp_path, monkeypatch):
    class CancelledError(Exception):
        pass

    watched = Watched(model, monkeypatch)

    def cancel(progress) -> None:
        watched.note(progress)
        if watched.next_case_runs.is_set():
            raise CancelledError

    watched.predictor.on_progress = cancel
    with pytest.raises(CancelledError):
        watched.predict(cases, tmp_path)
    assert list(label_maps(tmp_path)) == ["head.nii.gz"]
    assert [report.case for report in watched.told] == ["head"]


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["written", "fails"])
def test_finished_case_is_not_lost_although_its_report_is_cancelled(model, cases, tmp_path, monkeypatch, caplog, error):
    """By a button, or a signal, after it is held back and before the next case begins."""

    class CancelledError(Exception):
        pass

    watched = Watched(model, monkeypatch, error, report=True)
    watched.next_case_runs.set()

    def cancel(progress) -> None:
        if progress.stage == "report":
            raise CancelledError

    watched.predictor.on_progress = cancel
    with pytest.raises(CancelledError):
        watched.predict(cases, tmp_path)
    assert list(label_maps(tmp_path)) == ([] if error else ["head.nii.gz"])
    assert ("finished last could not be written" in caplog.text) is bool(error)


def test_case_is_kept_although_the_one_before_ends_the_run(model, cases, tmp_path, monkeypatch):
    """The first is still being written when the second is computed, and fails then."""
    watched = Watched(model, monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), continue_on_error=False)
    note = watched.note

    def later(progress) -> None:
        if (progress.case, progress.stage, progress.done) != (NAMES[1], "writing", 0):
            watched.events.append((progress.case, progress.stage, progress.done))
        else:
            note(progress)
            watched.next_case_runs.set()

    watched.predictor.on_progress = later
    with pytest.raises(WriteError, match="No space left"):
        watched.predict(cases, tmp_path)
    assert list(label_maps(tmp_path)) == ["small.nii.gz"]


class TestSignalWhileAThreadIsStarted:
    """As if the handler ran at the worst moment."""

    def test_before_the_thread_runs(self, monkeypatch):
        written = []
        pending = PendingWrite(lambda: written.append(1))

        def interrupted(thread) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pending.start()
        pending.wait()
        assert written == [1]
        pending.result()

    def test_while_it_is_written_where_no_thread_can_be_had(self, monkeypatch):
        def interrupted() -> None:
            raise KeyboardInterrupt

        def refused(thread) -> None:
            raise RuntimeError("can't start new thread")

        pending = PendingWrite(interrupted)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with pytest.raises(KeyboardInterrupt):
                pending.start()
        with pytest.raises(KeyboardInterrupt):
            pending.result()


def test_written_first_where_there_is_no_room_for_both(model, cases, tmp_path, monkeypatch):
    watched = Watched(model, monkeypatch)
    watched.next_case_runs.set()
    monkeypatch.setattr("nnunet_lowmem.predict.pending_write.THREAD_BYTES", 2**50)
    assert len(watched.predict(cases[:2], tmp_path)) == 2
    assert watched.events.index((NAMES[0], "writing", 1)) < watched.events.index((NAMES[1], "prediction", 0))
    assert watched.told[1].plan.budget.reserved_ram_bytes < 2**40
