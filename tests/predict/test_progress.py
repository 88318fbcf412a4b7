"""What embedding tools see of a run: a callback, the log, bars on terminals only, and nothing on stdout."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from factory import ModelSpec
from oracle import make_predictor, outputs

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.system.clock import StageClock

KINDS = {
    "classes": (ModelSpec(), {}),
    "two folds": (ModelSpec(folds=(0, 1)), {"use_folds": (0, 1)}),
    "probabilities": (ModelSpec(), {"save_probabilities": True}),
    "regions": (ModelSpec(labels={"background": 0, "a": [1, 2], "b": 2}, regions_class_order=(1, 2)), {}),
    "regions, probabilities": (
        ModelSpec(labels={"background": 0, "a": [1, 2], "b": 2}, regions_class_order=(1, 2)),
        {"save_probabilities": True},
    ),
    "head by head": (ModelSpec(resampling="torch"), {}),
}


@pytest.fixture
def model(models, images) -> str:
    return models(ModelSpec(), images("head"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_goes_from_its_first_to_its_last_step(models, images, tmp_path, kind):
    spec, options = KINDS[kind]
    options = dict(options)
    seen = []
    files = images("head")
    folds = options.pop("use_folds", (0,))
    predict = make_predictor(
        LowMemPredictor,
        models(spec, files),
        folds,
        on_progress=lambda progress: seen.append((progress, threading.current_thread())),
    )
    predict.predict_from_files([files], outputs([files], tmp_path), **options)
    assert {thread for _, thread in seen} == {threading.current_thread()}
    events = [progress for progress, _ in seen]
    assert {event.case for event in events} == {"head"}
    assert all(event.memory_bytes > 50e6 for event in events)
    assert list(dict.fromkeys(event.stage for event in events)) == ["preprocessing", "prediction", "export", "writing"]
    for stage in ("preprocessing", "prediction", "export", "writing"):
        steps = [event.done for event in events if event.stage == stage]
        totals = {event.total for event in events if event.stage == stage}
        assert len(totals) == 1
        assert steps[0] == 0
        assert steps == sorted(steps)
        assert steps[-1] == totals.pop()
    tiles = [event.done for event in events if event.stage == "prediction"]
    assert set(tiles) == set(range(tiles[-1] + 1)), "every tile is told"
    assert tiles[-1] % len(folds) == 0
    assert tiles[-1] >= 8 * len(folds)


def test_sliding_window_alone_tells_its_tiles(model):
    seen = []
    predict = make_predictor(LowMemPredictor, model, (0,), on_progress=seen.append)
    predict.predict_sliding_window_return_logits(torch.zeros(1, 40, 30, 30))
    assert [event.done for event in seen] == list(range(seen[-1].total + 1))
    assert seen[-1].memory_bytes > 50e6


class CancelError(Exception):
    """What a tool's button raises."""


def test_what_the_callback_raises_ends_the_run_and_reaches_the_caller(model, images, tmp_path):
    seen = []

    def cancel(progress) -> None:
        seen.append(progress)
        if progress.stage == "prediction" and progress.done == 2:
            raise CancelError

    cases = [images("head"), images("small")]
    predict = make_predictor(LowMemPredictor, model, (0,), on_progress=cancel)
    (tmp_path / "spill").mkdir()
    predict.tmp_dir = tmp_path / "spill"
    with pytest.raises(CancelError):
        predict.predict_from_files(cases, outputs(cases, tmp_path / "out"))
    assert seen[-1].done == 2, "it is not called again"
    assert {event.case for event in seen} == {"head"}
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert not list((tmp_path / "spill").iterdir())
    predict.on_progress = None
    predict.predict_from_files(cases, outputs(cases, tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_an_error_of_a_stage_is_none_of_its_listeners():
    clock = StageClock("scan", [lambda progress: None])
    with pytest.raises(ZeroDivisionError) as raised, clock.stage("export", 3):
        1 / 0  # noqa: B018
    assert clock.foreign_cause(raised.value) is None
    assert clock.failed_stage == "export"


def test_library_prints_nothing_and_logs(model, images, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG, "nnunet_lowmem")
    files = images("head")
    make_predictor(LowMemPredictor, model, (0,)).predict_from_files([files], outputs([files], tmp_path))
    assert capfd.readouterr() == ("", "")
    levels = {record.levelno for record in caplog.records if "There are 1 cases in the source" in record.getMessage()}
    assert levels == {logging.DEBUG}, "what nnU-Net prints is for who debugs"
    assert all(record.name.startswith("nnunet_lowmem.") for record in caplog.records)


@pytest.mark.parametrize("wanted", [True, False])
def test_lines_where_no_terminal_is(model, images, tmp_path, caplog, monkeypatch, wanted):
    caplog.set_level(logging.INFO, "nnunet_lowmem.system.watchdog")
    monkeypatch.setattr("nnunet_lowmem.report.following.LINE_S", 0.02)
    files = images("head")
    predict = make_predictor(LowMemPredictor, model, (0,))
    predict.allow_tqdm = wanted
    predict.predict_from_files([files], outputs([files], tmp_path))
    lines = re.findall(r"case head: (\w+), \d+ of \d+, \d+\.\d\d GiB", caplog.text)
    assert bool(lines) is wanted


COMMAND = "import sys; from nnunet_lowmem.commands.cli import predict_entry_point; sys.exit(predict_entry_point())"


@pytest.fixture
def arguments(model, images, tmp_path) -> list[str]:
    (tmp_path / "in").mkdir()
    os.link(images("head")[0], tmp_path / "in" / "head_0000.nii.gz")
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-f", 0, "-device", "cpu"]
    return [str(word) for word in words]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both sides of a terminal, ours first."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    yield ours, theirs
    os.close(ours)


def shown_on(terminal: tuple[int, int]) -> bytes:
    """All that was written to it; its other side is closed."""
    ours, theirs = terminal
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux says so at the end of a terminal whose other side is closed
        while part := os.read(ours, 65536):
            shown += part
    return shown


def test_bars_on_a_terminal(arguments, terminal):
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal[1], timeout=120)
    shown = shown_on(terminal)
    assert done.returncode == 0, shown
    assert b"head prediction: 100%" in shown
    assert b"%|" not in done.stdout


def test_no_bars_on_a_terminal_where_none_are_wanted(arguments, terminal, monkeypatch):
    with os.fdopen(os.dup(terminal[1]), "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert cli.predict_entry_point([*arguments, "--disable_progress_bar"]) == 0
    assert b"%|" not in shown_on(terminal)


def test_no_bars_in_a_pipe(arguments, capfd):
    assert cli.predict_entry_point(arguments) == 0
    assert "%|" not in "".join(capfd.readouterr())
