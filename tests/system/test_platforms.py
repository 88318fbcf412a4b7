"""Where things lack that are usually there: what Windows and macOS do not have, and metadata of what is installed."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from factory import ModelSpec
from images import SUPPORT
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_segmentation, make_predictor, predict_stock

import nnunet_lowmem
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.system import platform

PROGRAM = [sys.executable, str(SUPPORT / "elsewhere.py")]


def elsewhere(platform: str, command: str, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command of ours on a simulated platform, in an empty folder for temporary files."""
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "nnUNet_lowmem_prefetch": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "of torch")
    command_line = [*PROGRAM, platform, command, *arguments, "-device", "cpu"]
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        return subprocess.Popen(command_line, cwd=folder, env=environment, stdout=out, stderr=err, text=True)


def three_cases(files: list[str], folder: Path) -> Path:
    """The same image twice; between them one that is cut."""
    folder.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(files[0], folder / f"{name}_0000.nii.gz")
    content = (folder / "b_0000.nii.gz").read_bytes()
    (folder / "b_0000.nii.gz").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize(
    "platform", ["windows", *(pytest.param(p, marks=pytest.mark.slow) for p in ("macos", "source_tree"))]
)
def test_hook_commands_folds_prefetching_a_failed_case_and_the_report(platform, images, models, tmp_path):
    case, model = images("small"), models(ModelSpec(patch_size=(10, 12, 12), folds=(0, 1)), images("small"))
    predict_stock(make_predictor(nnUNetPredictor, model, (0, 1)), [case], [str(tmp_path / "stock")])
    arguments = ["-i", str(three_cases(case, tmp_path / "in")), "-o", str(tmp_path / "out"), "-m", model]
    with elsewhere(platform, "predict", *arguments, "-f", "0", "1", "--report", folder=tmp_path) as process:
        code = process.wait(timeout=120)
    out, err = (tmp_path / "out.txt").read_text(), (tmp_path / "err.txt").read_text()
    assert code == CasesFailedError.exit_code, err
    assert "error: case b, preprocessing: " in err
    for name in ("a", "c"):
        assert_same_segmentation(tmp_path / "stock.nii.gz", tmp_path / "out" / f"{name}.nii.gz")
    assert (tmp_path / "out" / "lowmem_report.html").exists()
    facts = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert (facts["nnunetv2"] == "unknown") == (platform != "macos")
    # the image that a worker has handed over is mapped; its file goes when the next one has come, or with the folder
    assert [line for line in facts["held"] if not line.endswith(".npy")] == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["windows", "macos"])
def test_ctrl_c_leaves_the_finished_case_and_nothing_else(platform, images, models, tmp_path):
    model = models(ModelSpec(patch_size=(10, 12, 12)), images("small"))
    (tmp_path / "in").mkdir()
    for number in range(60):
        shutil.copy(images("small")[0], tmp_path / "in" / f"case{number:02}_0000.nii.gz")
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", model, "-f", "0"]
    with elsewhere(platform, "predict", *arguments, folder=tmp_path) as process:
        while not (tmp_path / "out" / "case00.nii.gz").exists():
            assert process.poll() is None, (tmp_path / "err.txt").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert (tmp_path / "err.txt").read_text().splitlines()[-1] == "interrupted"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".gz", ".json", ".jsonl"}


@pytest.mark.slow
def test_demo(tmp_path):
    with elsewhere("windows", "demo", "-o", str(tmp_path / "out"), folder=tmp_path) as process:
        assert process.wait(timeout=300) == 0, (tmp_path / "err.txt").read_text()
    assert list((tmp_path / "out").glob("**/*.nii.gz"))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("on_windows", "word", "tries"), [(True, 32, 3), (True, 17, 1), (False, 32, 1)])
def test_rename_that_a_scanner_blocks_is_tried_again_on_windows(on_windows, word, tries, tmp_path, monkeypatch):
    """17: another drive, which no patience helps."""
    (tmp_path / "new").write_text("new")
    calls, real = [], os.replace

    def replace(source, target):
        calls.append(source)
        if len(calls) < 3:
            error = PermissionError(13, "The process cannot access the file")
            error.winerror = word
            raise error
        real(source, target)

    monkeypatch.setattr(platform, "_WINDOWS", on_windows)
    monkeypatch.setattr(os, "replace", replace)
    with contextlib.suppress(PermissionError):
        platform.replace(tmp_path / "new", tmp_path / "old")
    assert len(calls) == tries
    assert (tmp_path / "old").exists() == (tries == 3)


OF_POSIX = {
    "os": {
        *("name", "uname", "fork", "getuid", "geteuid", "getgid", "chown", "fchown", "lchown", "killpg", "getpgid"),
        *("setsid", "sysconf", "statvfs", "nice", "getloadavg", "sched_getaffinity", "posix_fallocate", "pread"),
        *("pwrite", "pidfd_open", "memfd_create", "mkfifo", "wait", "wait3", "wait4", "waitid", "execve", "ctermid"),
    },
    "sys": {"platform", "getwindowsversion"},
    "signal": {
        name for name in dir(signal) if name.startswith("SIG") and name[3:] not in ("INT", "TERM", "_IGN", "_DFL")
    },
}
OF_ONE_PLATFORM = {"ctypes", "resource", "fcntl", "msvcrt", "winreg", "pwd", "grp", "posix", "nt", "termios"}


def questions_about_the_platform(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from OF_ONE_PLATFORM.intersection(names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in OF_POSIX.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            yield from (
                f"{node.func.id}({a.id})" for a in node.args[:1] if isinstance(a, ast.Name) and a.id in ("os", "signal")
            )


def test_one_module_asks_for_the_platform():
    package = Path(nnunet_lowmem.__file__).parent
    asked = {
        file.relative_to(package).as_posix(): [*questions_about_the_platform(file)] for file in package.rglob("*.py")
    }
    assert len(asked.pop("system/platform.py")) > 10
    assert {file: questions for file, questions in asked.items() if questions} == {}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("Name: some-fork\nVersion: 2.6.2\n", "2.6.2 (some-fork)"),
        ("Name: some_package\nVersion: 1.0\n", "1.0"),
        ("Name: some-fork\n", "3.1"),
        (None, "3.1"),
    ],
    ids=["fork", "itself", "without_version", "none"],
)
def test_version_is_told_as_far_as_anything_says_it(metadata, expected, tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text("__version__ = '3.1'")
    if metadata is not None:
        name = metadata.split()[1].replace("-", "_")
        folder = tmp_path / f"{name}-0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}")
        (folder / "top_level.txt").write_text("some_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "some_package", __import__("some_package"))
    assert version_of("some_package") == expected
