"""Imports point downwards, nnU-Net is imported in few rooms, and the commands start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import nnunetv2
import pytest

import nnunet_lowmem
from nnunet_lowmem.bypassed import RAW

PACKAGE = Path(nnunet_lowmem.__file__).parent

# a module imports from its own room or from rooms further down; the face of the package is above and below all
ROOMS = """
top: __main__ training startup
commands: cli shell console demo compare_command comparison_table ensembling running one_side flags
predictor: predictor
report: html_report memory_chart overlays comparing label_comparison measured_command
predict: case_predictor case_loop cases logits_predictor reporting progress records prefetching validation warming
predict: iterating loading writing pending_write weights options
budget: allocations planner case_planning preprocessing_memory budget recovering estimating
nnunet: nnunet_adapter model_loading model_files trust model_limits model_keys harmless unpickling
nnunet: stock_calls plugin switching rebinding training_data installed rehearsing
labels: labelling label_kernels device_labelling resampling export probabilities next_stages rules
window: sliding_window tiles tiling kernels halves transfers slabs
network: fast_network network_memory norm_kernels
preprocessing: preprocessing normalisation nonzero spline image_reading finite_voxels input_checks refusals
volumes: formats headers stored_parts nifti_files meta_image nrrd_files gipl_files tiff_pages pictures verifying spill
overrides: overrides bypassed signatures foreign
system: memory measuring allocator process_tree workers job watchdog stall_watch clock interruption
system: threads compiler files placing out_of_memory
root: types errors names sizes
"""
ROWS = [row.split(": ") for row in ROOMS.strip().splitlines()]
ROOM = {module: room for room, modules in ROWS for module in modules.split()}
DEPTH = {room: depth for depth, room in enumerate(dict(ROWS))}

# still to be cut
UPWARDS: set[tuple[str, str]] = set()

MAY_IMPORT_NNUNET = {
    "one_side",
    "predictor",
    "logits_predictor",
    "normalisation",
    "preprocessing",
    "preprocessing_memory",
    "nnunet_adapter",
    "image_reading",
    "model_loading",
    "trust",
    "input_checks",
    "ensembling",
    "training_data",
    "validation",
    "overrides",
    "stock_calls",
}
MUST_BE_PURE = {"planner", "allocations", "tiling", "types", "errors", "resampling"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    assert node.level == 0, "imports are absolute"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def executed(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of functions and what is for type checkers."""
    for node in nodes:
        only_checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not only_checked and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from executed(ast.iter_child_nodes(node))


def imports(module: str, anywhere: bool = True) -> Iterator[str]:
    """Dotted names, those inside functions included unless only those at import time are asked for."""
    nodes = ast.walk(tree(module)) if anywhere else executed(tree(module).body)
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_names(node)


def own(module: str) -> set[str]:
    """The modules of this package that `module` imports."""
    names = {name.split(".")[1] for name in imports(module) if name.startswith("nnunet_lowmem.")}
    return names - {"__version__"}


def packages(module: str, anywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(module, anywhere)}


def test_every_module_has_a_room():
    assert sorted(ROOM) == MODULES


def test_imports_point_downwards():
    arrows = {(module, name) for module in MODULES for name in own(module)}
    assert {(a, b) for a, b in arrows if DEPTH[ROOM[b]] < DEPTH[ROOM[a]]} == UPWARDS


def test_nobody_imports_in_a_circle():
    assert not [module for module in MODULES if module in closure(own(module), own)]


def test_window_and_preprocessing_do_not_know_each_other():
    rooms = {"window", "preprocessing"}
    arrows = {(module, name) for module in MODULES for name in own(module) if ROOM[module] != ROOM[name]}
    assert not {(a, b) for a, b in arrows if {ROOM[a], ROOM[b]} == rooms} - UPWARDS


def test_nnunet_is_imported_in_few_rooms():
    found = {module for module in MODULES if "nnunetv2" in packages(module)}
    assert found - {"cli"} == MAY_IMPORT_NNUNET


def test_cli_finds_datasets_with_nnunet_when_asked_to():
    names = [name for name in imports("cli") if name.startswith("nnunetv2")]
    assert names == ["nnunetv2.utilities.file_path_utilities.get_output_folder"]
    assert "nnunetv2" not in packages("cli", anywhere=False)


@pytest.mark.parametrize("module", sorted(MUST_BE_PURE))
def test_pure_rooms_know_no_torch_and_no_files(module):
    assert not packages(module) & {"torch", "nnunetv2", "numba", "os", "pathlib", "tempfile", "subprocess", "psutil"}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "__main__",
        "compare_command",
        "flags",
        "comparing",
        "model_files",
        "memory",
        "measuring",
        "errors",
        "files",
        "workers",
        "job",
        "plugin",
        "switching",
        "startup",
        "running",
    ],
)
def test_light_rooms_import_neither_torch_nor_nnunet(module):
    """Nor does anything that they import when they are imported."""
    for name in reached(module):
        assert not packages(name, anywhere=False) & {"torch", "nnunetv2", "numba", "scipy"}, name


def closure(starts: Iterable[str], step: Callable[[str], Iterable[str]]) -> set[str]:
    seen, waiting = set(), set(starts)
    while waiting:
        seen.add(name := waiting.pop())
        waiting |= set(step(name)) - seen
    return seen


def reached(module: str) -> set[str]:
    """Modules of this package that are imported with one of them, itself included."""

    def step(name: str) -> set[str]:
        return {n.split(".")[1] for n in imports(name, anywhere=False) if n.startswith("nnunet_lowmem.")} & set(MODULES)

    return closure({module}, step)


@cache
def stocks_imports(name: str) -> list[str]:
    """What of nnU-Net is imported with a module of its own, or with a name of one."""
    parts = name.split(".")
    paths = [Path(*nnunetv2.__path__, *parts[1:end]) for end in range(len(parts), 0, -1)]
    files = (file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists())
    nodes = executed(ast.parse(next(files).read_text()).body)
    names = [n for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for n in imported_names(node)]
    return [n for n in names if n.startswith("nnunetv2.")]


def test_what_imports_nnunets_predictor_is_imported_where_it_is_used():
    """Else no program could import it before the predictor: ours takes nnU-Net's place as soon as that is there."""
    found = {name for module in reached("predictor") for name in imports(module, anywhere=False)}
    before = {name for name in found if name.startswith("nnunetv2.") and not name.startswith(RAW)}
    leading = {name for name in before if any(n.startswith(RAW) for n in closure({name}, stocks_imports))}
    assert not leading


@pytest.mark.parametrize(
    "statement",
    [
        "import nnunet_lowmem; nnunet_lowmem.__version__",
        "import nnunet_lowmem.cli",
        "import nnunet_lowmem.cli as c; c.predict_parser()",
        "import nnunet_lowmem.cli as c; c.predict_entry_point(['--help'])",
        "import nnunet_lowmem.cli as c; c.main(['--help'])",
        "import nnunet_lowmem.cli as c; c.main(['--version'])",
        "import nnunet_lowmem.cli as c; c.main(['demo', '--help'])",
    ],
)
def test_starts_without_torch_and_nnunet(statement):
    program = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
heavy = {{'torch', 'nnunetv2', 'numba', 'scipy', 'SimpleITK', 'matplotlib'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def talks(node: ast.AST) -> bool:
    """Whether a call writes where the user looks: print, a console, a stream of the process."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in {"print", "pprint", "Console"} or called.startswith(("sys.stdout.", "sys.stderr.write"))


def test_only_the_commands_talk():
    talkers = {module for module in MODULES if any(talks(node) for node in ast.walk(tree(module)))}
    commands = {"cli", "compare_command", "comparison_table", "console", "demo", "shell"}
    assert talkers == commands, "a library logs; the commands decide what is shown"


def test_package_gives_its_predictor_and_nothing_else():
    assert set(nnunet_lowmem.__all__) == {"LowMemPredictor", "__version__", "disable", "enable"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nnunet_lowmem.nonsense  # noqa: B018
