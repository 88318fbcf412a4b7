"""The rooms of docs/design.md: imports point downwards only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

import nnunet_lowmem

PACKAGE = Path(nnunet_lowmem.__file__).parent

# from top to bottom; a module imports only from rows below its own
ROWS = [
    ["__main__"],
    ["cli"],
    ["demo"],
    ["console"],
    ["predictor"],
    ["ensembling", "logits_predictor", "prefetching"],
    ["probabilities", "preprocessing"],
    ["export", "image_reading", "nonzero", "spline"],
    ["nnunet_adapter"],
    ["headers", "sliding_window"],
    ["labelling", "spill", "network_memory"],
    ["device_labelling", "kernels"],
    ["halves", "resampling", "threads"],
    ["workers"],
    ["job", "process_tree", "watchdog"],
    ["files"],
    ["verifying", "model_files", "reporting", "clock", "cases", "budget"],
    ["planner"],
    ["tiling", "memory"],
    ["measuring"],
    ["types", "errors"],
    ["__init__"],
]
IMPORTS_NNUNET = {
    "cli", "predictor", "logits_predictor", "preprocessing", "image_reading", "nonzero", "nnunet_adapter", "ensembling",
}  # fmt: skip


def imports(module: str, *, top_level: bool = False) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    nodes = ast.iter_child_nodes(tree) if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "nnunet_lowmem":
                found.update(f"nnunet_lowmem.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def own_imports(module: str) -> set[str]:
    names = {name.split(".")[1] for name in imports(module) if name.startswith("nnunet_lowmem.")}
    return {name for name in names if (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_a_row():
    assert sorted(chain(*ROWS)) == sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", [name for row in ROWS for name in row if name != "__init__"])
def test_imports_point_downwards(module):
    row = next(number for number, names in enumerate(ROWS) if module in names)
    below = {name for names in ROWS[row + 1 :] for name in names}
    assert own_imports(module) <= below


def test_only_the_adapting_rooms_import_nnunet():
    users = {
        path.stem for path in PACKAGE.glob("*.py") if any(i.split(".")[0] == "nnunetv2" for i in imports(path.stem))
    }
    assert users <= IMPORTS_NNUNET


def test_planner_and_tiling_import_neither_torch_nor_numpy():
    for module in ("planner", "tiling"):
        assert not {name.split(".")[0] for name in imports(module)} & {"torch", "numpy", "nnunetv2"}


@pytest.mark.parametrize(
    "statement",
    [
        "import nnunet_lowmem",
        "from nnunet_lowmem.cli import predict_parser; predict_parser().format_help()",
        "from nnunet_lowmem.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_light_imports_load_neither_torch_nor_nnunet(statement):
    code = f"import sys\n{statement}\nassert not {{'torch', 'nnunetv2', 'numba', 'scipy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_no_file_is_longer_than_400_lines():
    long = {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long
