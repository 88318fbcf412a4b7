"""Signals to real processes: a run ends, nothing half-written stays, and the next run goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from factory import ModelSpec
from oracle import read_voxels, recorded_names

from nnunet_lowmem.system import signals
from nnunet_lowmem.volumes.verifying import verify_whole

_COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from nnunet_lowmem.commands.cli import predict_entry_point; sys.exit(predict_entry_point(sys.argv[1:]))"
)
# as if the disk were slow: a label map is there, half of it, for two seconds
_SLOW_WRITER = """
import time
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
class Slow(SimpleITKIO):
    def write_seg(self, segmentation, path, properties):
        with open(path, "wb") as file:
            file.write(b"half")
        time.sleep(2)
        super().write_seg(segmentation, path, properties)
PlansManager.image_reader_writer_class = Slow
"""


@pytest.fixture(scope="module")
def inputs(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for number, name in enumerate(("head", "small", "head_margin")):
        (folder / f"{number}_0000.nii.gz").write_bytes(Path(images(name)[0]).read_bytes())
    return folder


def start(
    inputs: Path, out: Path, model: str, flags: Sequence[str] = (), before: str = "", **popen
) -> subprocess.Popen:
    arguments = ["-i", inputs, "-o", out, "-m", model, "-f", "0", "-device", "cpu", "--tmp_dir", out.parent / "tmp"]
    (out.parent / "tmp").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    command = [sys.executable, "-c", before + _COMMAND, *map(str, arguments), "--disable_progress_bar", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams)


def maps(folder: Path) -> dict[str, bytes]:
    return {path.name: read_voxels(path).tobytes() for path in folder.glob("*.nii.gz")}


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number, told",
    [
        (signal.SIGHUP, "terminated (SIGHUP)"),
        pytest.param(signal.SIGTERM, "terminated", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "interrupted", marks=pytest.mark.slow),
        pytest.param(signal.SIGXCPU, "terminated (SIGXCPU)", marks=pytest.mark.slow),
    ],
)
def test_signal_ends_the_run_and_keeps_finished_cases(number, told, inputs, images, models, tmp_path):
    terminal, its_end = os.openpty()
    process = start(inputs, tmp_path / "out", models(ModelSpec(), images("head")), stdout=its_end)
    os.close(its_end)
    wait_for((tmp_path / "out/0.nii.gz").exists, process)
    if number == signal.SIGHUP:
        os.close(terminal)  # so what is printed from now on fails
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == told
    verify_whole(tmp_path / "out/0.nii.gz")
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "out").glob(".partial*"))
    if number != signal.SIGHUP:
        os.close(terminal)


def test_signal_while_the_case_before_is_written(inputs, images, models, tmp_path):
    """The case that is computed is kept, whole and with its record; of the one under way nothing is left."""
    process = start(inputs, tmp_path / "out", models(ModelSpec(), images("head")), before=_SLOW_WRITER)
    wait_for(lambda: list((tmp_path / "out").glob(".partial*/*.nii.gz")), process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.splitlines()[-1]) == (128 + signal.SIGTERM, "terminated")
    assert list(maps(tmp_path / "out")) == ["0.nii.gz"]
    verify_whole(tmp_path / "out/0.nii.gz")
    assert recorded_names(tmp_path / "out") == ["0.nii.gz"]
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "out").glob(".partial*"))


@pytest.mark.slow
def test_reader_of_the_output_that_goes_away(inputs, images, models, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(inputs, tmp_path / "out", models(ModelSpec(), images("head")), stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert len(maps(tmp_path / "out")) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_rounds_of_killing_and_continuing(inputs, images, models, tmp_path):
    model = models(ModelSpec(), images("head"))
    process = start(inputs, tmp_path / "expected", model)
    began = time.monotonic()
    assert process.wait(120) == 0
    seconds = time.monotonic() - began
    expected, rng = maps(tmp_path / "expected"), random.Random(0)
    for round_ in range(10):
        process = start(inputs, tmp_path / "out", model, ["--continue_prediction"])
        children = psutil.Process(process.pid)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        alive = children.children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL if round_ % 2 else signal.SIGTERM)
        process.communicate(timeout=30)
        assert not psutil.wait_procs(alive, timeout=5)[1]
        for name, labels in maps(tmp_path / "out").items():
            verify_whole(tmp_path / "out" / name)
            assert labels == expected[name]
    assert start(inputs, tmp_path / "out", model, ["--continue_prediction"]).wait(120) == 0
    assert maps(tmp_path / "out") == expected
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "out").glob(".partial*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_exception_that_python_swallows_is_raised_again():
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def run() -> None:
        with signals.ending_on_signals():
            thing = Finalised()
            del thing
            signals.check()

    with pytest.raises(signals.InterruptedBySignal) as ended:
        run()
    assert ended.value.code == 143


def test_handlers_come_back():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    with signals.ending_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in numbers] == before
    signals.check()


_KILL_ITSELF = """
import faulthandler, os, signal, sys
from nnunet_lowmem.system import signals
if "handlers" in sys.argv:
    signal.signal(signal.SIGUSR2, lambda *_: print("own handler"))
    faulthandler.register(signal.SIGUSR1, file=sys.stdout)
with signals.ending_on_signals():
    for name in sys.argv[2:]:
        os.kill(os.getpid(), signal.Signals[name])
        signals.check()
        print("after", name, flush=True)
"""


@pytest.mark.parametrize(
    "before, first, others, told",
    [
        ("trap '' INT HUP QUIT TERM;", "ignored", "INT HUP QUIT TERM", ""),
        ("", "handlers", "USR1 USR2", "own handler"),
    ],
)
def test_what_is_ignored_or_handled_by_somebody_else_ends_nothing(before, first, others, told):
    """As in a script: ``nohup``, ``command &``, and traceback dumps of ``faulthandler``."""
    names = [f"SIG{name}" for name in others.split()]
    program = [sys.executable, "-c", _KILL_ITSELF, first, *names, "SIGALRM"]
    command = ["sh", "-c", f'{before} exec "$@"', "sh", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (128 + signal.SIGALRM, "")
    after = [line.removeprefix("after ") for line in done.stdout.splitlines() if line.startswith("after ")]
    assert after == names
    assert told in done.stdout
