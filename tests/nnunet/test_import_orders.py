"""Any module of nnU-Net, and any of its commands, may come first where the predictor is switched on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import nnunetv2
import pytest
from images import SUPPORT

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands.run import environment_for

OURS = " ".join(["nnUNetPredictor", *(cls.__name__ for cls in LowMemPredictor.__mro__)])
STOCKS = "nnUNetPredictor nnUNetPredictor object"

COMMANDS = {entry.name: entry.value for entry in entry_points(group="console_scripts") if "nnunetv2" in entry.value}
# a process of its own may begin with any module of ours, as a worker does with the function that it is given
FEW = [
    "nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs",
    "nnunetv2.run.run_training:run_training_entry",
    "nnunet_lowmem.overrides.lookup",
]


def modules(package: str) -> list[str]:
    root = Path(*sys.modules[package].__path__)
    names = (".".join(file.relative_to(root.parent).with_suffix("").parts) for file in sorted(root.rglob("*.py")))
    return [
        n.removesuffix(".__init__") for n in names if all(map(str.isidentifier, n.split("."))) and "__main__" not in n
    ]


def environment(tmp_path: Path, predictor: str) -> dict[str, str]:
    paths = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(tmp_path))
    return {**environment_for(predictor, dict(os.environ)), **paths}


def imported_first(targets: list[str], choice: str, tmp_path: Path) -> dict[str, str]:
    """Import each in a process of its own; return what `nnUNetPredictor` is afterwards, by its bases."""
    program = [sys.executable, str(SUPPORT / "first_imports.py"), choice, *targets]
    env = environment(tmp_path, "")
    done = subprocess.run(program, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once")


@needs_fork
@pytest.mark.parametrize(
    ("choice", "targets", "expected"),
    [
        ("lowmem", FEW, OURS),
        pytest.param("plans", FEW, STOCKS, marks=pytest.mark.slow),
        pytest.param(
            "lowmem",
            [*modules("nnunetv2"), *COMMANDS.values(), *modules("nnunet_lowmem")],
            OURS,
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
    ids=["few", "few_by_plans", "all"],
)
def test_whatever_is_imported_first_the_predictor_is_replaced(choice, targets, expected, tmp_path):
    assert imported_first(targets, choice, tmp_path) == dict.fromkeys(targets, repr(expected))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_start_switched_on(command, tmp_path):
    found = shutil.which(command, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run = [sys.executable, found, "-h"]
    done = subprocess.run(run, env=environment(tmp_path, "lowmem"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted(Path(*nnunetv2.__path__, "tests").glob("test_*.py")), ids=lambda p: p.stem)
def test_nnunets_own_unit_tests_pass_switched_on(tests, tmp_path):
    run = [sys.executable, "-m", "unittest", f"nnunetv2.tests.{tests.stem}"]
    done = subprocess.run(run, env=environment(tmp_path, "lowmem"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
