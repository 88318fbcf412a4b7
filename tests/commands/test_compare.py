"""``nnunet-lowmem compare``: real commands of both sides, real limits and signals; and the tables made of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK
from factory import ModelSpec
from oracle import own_lines

from nnunet_lowmem.commands import cli, compare_table
from nnunet_lowmem.report import compare
from nnunet_lowmem.report.compare import Comparison, Request
from nnunet_lowmem.report.label_differences import LabelDifference, compare_folders
from nnunet_lowmem.report.measured_command import MeasuredCommand, StageCost, run_measured, stages_of
from nnunet_lowmem.system.clock import TRACE_VARIABLE

MIB, GIB = 2**20, 2**30


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder whose path leaves room for the name of a socket, as the system's own does."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def start(images, models, short_tmp):
    files = images("head")
    model = models(ModelSpec(), files)

    def start(*flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "nnunet_lowmem", "compare", "-m", model, "-i", str(Path(files[0]).parent)]
        command += ["-f", "0", "-npp", "1", "-nps", "1", "-device", "cpu", *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        environment |= {"TMPDIR": str(short_tmp), "COLUMNS": "160"}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


def processes_that_name(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


# -- both sides


def test_both_sides_are_measured_and_their_labels_are_the_same(start, short_tmp, tmp_path):
    process = start("--json", "--disable_tta", "-o", str(tmp_path / "kept"))
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    found = json.loads(stdout)
    voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "kept/stock/head.nii.gz")))
    (case,) = found["labels"]
    assert (case["case"], case["voxels"], case["differing"], case["problem"]) == ("head", voxels.size, 0, "")
    assert set(map(int, case["dice"])) == set(np.unique(voxels)) - {0}
    assert (found["differing"], found["mean_dice"], found["exit_code"]) == (0, 1.0, 0)
    for side in ("stock", "ours"):
        (run,) = found[side]
        assert run["exit_code"] == 0
        assert 200 * MIB < run["peak_bytes"] < 8 * GIB
        # of stock, two of these are told by its workers
        spent = [run["stages"][stage]["seconds"] for stage in ("preprocessing", "prediction", "export")]
        assert min(spent) > 0
        assert spent[0] < run["first_tile_s"] < run["seconds"] - spent[1]
    assert own_lines(stderr) == ["stock, run 1 of 1", "ours, run 1 of 1"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "compare.json", "ours", "ours.log", "stock", "stock.log"
    ]  # fmt: skip
    assert list(short_tmp.iterdir()) == []


@pytest.mark.slow
def test_stock_is_ended_at_its_limit_and_the_table_says_so(start, short_tmp):
    process = start("--stock-limit", "600M")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 3, stderr
    assert "Stock was ended, since it took more than 0.59 GiB (--stock-limit)" in stdout
    assert "no label maps of stock to compare with" in stdout
    whole = next(line for line in stdout.splitlines() if "peak RAM  " in line)
    assert ">= " in whole
    assert "voxels that differ" not in stdout
    assert processes_that_name(short_tmp) == []
    assert list(short_tmp.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number, told", [(signal.SIGINT, "interrupted"), (signal.SIGHUP, "terminated (SIGHUP)")])
def test_a_signal_ends_both_trees(number, told, start, short_tmp):
    process = start()
    deadline = time.monotonic() + 120
    # stock's workers are there
    while sum("spawn_main" in name for name in children_of(process.pid)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == told
    assert all(has_ended(process.pid) for process in tree)
    assert list(short_tmp.iterdir()) == []


def children_of(pid: int) -> list[str]:
    try:
        return [" ".join(child.cmdline()) for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


# -- the measuring of one command


def run_python(code: str, tmp_path: Path, **limits) -> MeasuredCommand:
    return run_measured([sys.executable, "-c", code], dict(os.environ), tmp_path / "trace", **limits)


TREE = """
import pathlib, subprocess, sys, time
code = "held = b'1' * (400 * 2**20); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
pathlib.Path({told!r}).write_text(str(child.pid))
time.sleep(60)
"""


def has_ended(pid: int) -> bool:
    """A process that nobody waits for may stay as a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_tree_that_takes_too_much_is_ended_with_its_children(tmp_path):
    told = tmp_path / "pid"
    run = run_python(TREE.format(told=str(told)), tmp_path, limit_bytes=200 * MIB)
    assert run.stopped == "took more than 0.20 GiB"
    assert run.peak_bytes > 200 * MIB
    assert run.exit_code == -signal.SIGKILL
    assert run.seconds < 30
    assert has_ended(int(told.read_text()))


def test_children_that_a_command_leaves_behind_are_ended(tmp_path):
    told = tmp_path / "pid"
    run = run_python(TREE.format(told=str(told)).removesuffix("time.sleep(60)\n"), tmp_path)
    assert (run.exit_code, run.stopped) == (0, "")
    deadline = time.monotonic() + 10
    while not has_ended(int(told.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    run = run_python("import time; time.sleep(60)", tmp_path, limit_s=0.3)
    assert run.stopped == "took more than 0 s"
    assert run.seconds < 10


def test_spans_become_stages_with_their_peaks(tmp_path):
    code = (
        "import time\n"
        "from nnunet_lowmem.system.clock import StageClock\n"
        "clock = StageClock('a')\n"
        "with clock.stage('preprocessing'): time.sleep(0.2)\n"
        "with clock.stage('prediction'):\n"
        "    time.sleep(0.2)\n"
        "    with clock.stage('export'):\n"  # a busy machine tells of what it has read some time later
        "        time.sleep(0.2); held = b'1' * (200 * 2**20); time.sleep(0.4); del held; time.sleep(0.3)\n"
        "    time.sleep(0.2)\n"
    )
    run = run_python(code, tmp_path)
    assert list(run.stages) == ["preprocessing", "prediction", "export"]
    assert 0.4 <= run.stages["prediction"].seconds < 0.4 + run.stages["export"].seconds
    peaks = [run.stages[stage].peak_bytes for stage in ("prediction", "export")]
    assert peaks[1] > peaks[0] + 150 * MIB
    assert 0.2 < run.first_tile_s < run.seconds - 0.8


def test_half_a_line_of_a_command_that_was_ended_is_passed_over(tmp_path):
    code = f"import os; open(os.environ[{TRACE_VARIABLE!r}], 'w').write('{{\"stage\": \"pre')"
    assert run_python(code, tmp_path).stages == {}


def test_a_stage_too_short_for_a_sample_has_no_peak():
    spans = [{"stage": "blink", "start_s": 1.2, "stop_s": 1.3}, {"stage": "long", "start_s": 0.5, "stop_s": 2.5}]
    stages = stages_of(spans, [(0.0, 9), (1.0, 5), (2.0, 7), (3.0, 8)])
    assert stages["blink"] == StageCost(pytest.approx(0.1), None)
    assert stages["long"] == StageCost(2.0, 7)


# -- label maps


def write(folder: Path, name: str, voxels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(folder / name))


def test_labels_that_differ_are_counted_and_their_dice_is_exact(tmp_path):
    stock = np.zeros((6, 10, 10), np.uint8)
    stock[:3], stock[3, :5] = 1, 700 % 256
    ours = stock.copy()
    ours[2], ours[5, 0, :4] = 0, 9
    write(tmp_path / "stock", "a.nii.gz", stock)
    write(tmp_path / "ours", "a.nii.gz", ours)
    (found,) = compare_folders(tmp_path / "stock", tmp_path / "ours", ["a"], ".nii.gz")
    assert (found.voxels, found.differing, found.identical) == (600, 104, False)
    assert found.dice == {1: pytest.approx(2 * 200 / (300 + 200)), 188: 1.0, 9: 0.0}


def test_maps_that_cannot_be_compared_are_not_identical(tmp_path):
    stock, ours, voxels = tmp_path / "stock", tmp_path / "ours", np.ones((3, 4, 5), np.uint8)
    for name in ("none_of_ours", "type", "cut"):
        write(stock, f"{name}.nii.gz", voxels)
    write(ours, "none_of_stock.nii.gz", voxels)
    write(ours, "type.nii.gz", voxels.astype(np.uint16))
    (ours / "cut.nii.gz").write_bytes((stock / "cut.nii.gz").read_bytes()[:-9])
    cases = ["none_of_ours", "none_of_stock", "type", "cut"]
    found = compare_folders(stock, ours, cases, ".nii.gz")
    assert not any(case.identical for case in found)
    words = ("ours has written no", "stock has written no", "uint8 of shape (3, 4, 5), ours uint16", "cut.nii.gz")
    for case, word in zip(found, words, strict=True):
        assert word in case.problem


# -- the table


def measured(seconds: float, peak_bytes: int, stopped: str = "", exit_code: int = 0) -> MeasuredCommand:
    stages = {"prediction": StageCost(seconds / 2, peak_bytes), "export": StageCost(1.0, None)}
    return MeasuredCommand(exit_code, stopped, seconds, 3.0, peak_bytes, None, stages, [], 0.1)


def printed(comparison: Comparison, capsys, monkeypatch) -> dict[str, list[str]]:
    monkeypatch.setenv("COLUMNS", "160")
    compare_table.print_comparison(comparison, {3: "liver"}, as_json=False)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_table_shows_medians_ratios_and_the_worst_labels(capsys, monkeypatch):
    labels = [LabelDifference("a", 1000, 7, {1: 1.0, 3: 0.5, 4: 0.75}), LabelDifference("b", 500, 0, {1: 1.0})]
    runs = {
        "stock": [measured(second, 4 * GIB) for second in (10.0, 90.0, 20.0)],
        "ours": [measured(second, GIB) for second in (4.0, 5.0, 30.0)],
    }
    comparison = Comparison(runs, labels)
    rows = printed(comparison, capsys, monkeypatch)
    assert rows["whole command"] == ["20.0 s", "5.0 s", "0.25"]
    assert rows["sliding window"] == ["10.0 s", "2.5 s", "0.25"]
    assert rows["peak RAM"] == ["4.00 GiB", "1.00 GiB", "0.25"]
    assert "peak RAM, export and writing" not in rows
    assert rows["voxels that differ"][1] == "7 of 1500"
    assert rows["Dice, mean of labels"][1] == "0.81250"
    assert rows["Dice, a, label 3 liver"][1] == "0.50000"
    assert "Dice, b, label 1" not in rows
    assert comparison.exit_code == 1


@pytest.mark.parametrize(
    "stock, labels, code",
    [
        (measured(9.0, GIB), [LabelDifference("a", 8)], 0),
        (measured(9.0, GIB), [LabelDifference("a", 8, 1)], 1),
        (measured(9.0, GIB), [LabelDifference("a", problem="missing")], 1),
        (measured(9.0, GIB, exit_code=1), [LabelDifference("a", 8)], 1),
        (measured(9.0, GIB, stopped="took more than 1 GiB", exit_code=-9), [], 3),
    ],
)
def test_exit_codes(stock, labels, code):
    assert Comparison({"stock": [stock], "ours": [measured(1.0, GIB)]}, labels).exit_code == code


def test_a_side_that_failed_shows_its_last_lines_and_no_ratio(capsys, monkeypatch):
    runs = {"stock": [measured(9.0, GIB, exit_code=1)], "ours": [measured(1.0, GIB)]}
    comparison = Comparison(runs, [LabelDifference("a", problem="stock has written no a.nii.gz")], {"stock": "boom"})
    monkeypatch.setenv("COLUMNS", "160")
    compare_table.print_comparison(comparison, {}, as_json=False)
    out = capsys.readouterr().out
    assert "a cannot be compared: stock has written no a.nii.gz" in out
    assert "stock failed, exit code 1; its last lines:\nboom" in out
    assert "0.11" not in out


# -- the request


def request_for(**changes) -> Request:
    return Request("model", ("a",), ".nii.gz", **{"device": "cpu", "flags": ("-f", "0"), **changes})


def test_flags_for_ours_alone_do_not_reach_stock(tmp_path):
    request = request_for(our_flags=("--max_ram", "3G"), deterministic=True, device="cuda:1")
    stock, ours = (compare.side_command(request, side, tmp_path) for side in ("stock", "ours"))
    assert stock[3:] == ["stock", "model", "-f", "0", "-o", str(tmp_path), "-device", "cuda", "--deterministic"]
    assert ours[3:] == ["ours", *stock[4:], "--max_ram", "3G"]


@pytest.mark.parametrize(
    "device, visible, expected", [("cuda:1", None, "1"), ("cuda:1", "4,7", "7"), ("cuda", "4,7", "4,7")]
)
def test_both_sides_see_the_same_gpu(device, visible, expected):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert compare.side_environment(device, Path("/t"), environment)["CUDA_VISIBLE_DEVICES"] == expected


def test_temporary_files_lie_elsewhere_where_the_path_leaves_no_room_for_a_socket():
    assert compare.side_environment("cpu", Path("/t"), {})["TMPDIR"] == "/t"
    assert "TMPDIR" not in compare.side_environment("cpu", Path("/" + "t" * 80), {})


def test_no_side_fails_for_what_the_terminal_cannot_show(tmp_path):
    environment = compare.side_environment("cpu", tmp_path, {**os.environ, "PYTHONIOENCODING": "ascii"})
    command = [sys.executable, "-c", "print('l\\xe4ber \\u2265 \\udcff')"]
    assert run_measured(command, environment, tmp_path / "trace", log=tmp_path / "log").exit_code == 0
    assert compare._last_lines(tmp_path / "log") == "läber ≥ \\udcff"


def test_deterministic_mode_outlives_a_predictor_that_switches_trials_on():
    code = (
        "import torch\n"
        "from nnunet_lowmem.commands.one_side import make_deterministic\n"
        "make_deterministic()\n"
        "torch.backends.cudnn.benchmark = True\n"
        "assert torch.backends.cudnn.deterministic and not torch._C._get_cudnn_benchmark()\n"
        "assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--stock-limit", "lots"], "--stock-limit: 'lots'"),
        (["--max_ram", "lots"], "--max_ram: 'lots'"),
        (["-f", "7"], "fold_7"),
        (["-step_size", "0"], "-step_size"),
        (["-o", "{images}"], "must be empty"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(flags, words, images, models, capsys):
    files = images("head")
    folder = str(Path(files[0]).parent)
    flags = [flag.format(images=folder) for flag in flags]
    code = cli.main(["compare", "-m", models(ModelSpec(), files), "-i", folder, "-f", "0", "-device", "cpu", *flags])
    assert code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_flags_for_ours_are_checked_too(images, models, capsys):
    files = images("head")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "-m", models(ModelSpec(), files), "-i", str(Path(files[0]).parent), "--", "--nonsense"])
    assert "--nonsense" in capsys.readouterr().err
