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
from nnunet_lowmem import errors
from nnunet_lowmem.overrides.bypassed import RAW

PACKAGE = Path(nnunet_lowmem.__file__).parent

# a file imports from its own room and from rooms further down; the face of the package is above and below all
ROOMS = """
__main__ startup training trainers
commands
predictor
cluster
doctor
report
predict
budget
nnunet
labels
window
network
preprocessing
volumes
overrides
system
types errors names boxes sizes options
"""
DEPTH = {room: depth for depth, row in enumerate(ROOMS.strip().splitlines()) for room in row.split()}

MAY_IMPORT_NNUNET = {
    "commands.ensemble",
    "commands.one_side",
    "nnunet.adapter",
    "nnunet.model",
    "nnunet.read_by",
    "nnunet.stock_calls",
    "nnunet.stored_cases",
    "nnunet.trust",
    "overrides.lookup",
    "predict.runs",
    "predict.logits",
    "predict.validation",
    "predictor",
    "preprocessing.case",
    "preprocessing.checks",
    "preprocessing.grids",
    "preprocessing.normalisation",
    "preprocessing.reading",
    "preprocessing.volume_io",
    "trainers.low_mem_trainers",
}
MUST_BE_PURE = {
    "budget.planner",
    "budget.arrays",
    "budget.facts",
    "window.tiling",
    "types",
    "errors",
    "labels.resampling",
}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(dotted(path) for path in PACKAGE.rglob("*.py") if path.parent.name != "on_path")
MODULES = [module for module in MODULES if not module.endswith("__init__")]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


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


def ours(names: Iterable[str]) -> set[str]:
    """The modules of this package among dotted names, which may be names in modules."""
    inner = [name.removeprefix("nnunet_lowmem.") for name in names if name.startswith("nnunet_lowmem.")]
    return {module for name in inner for module in (name, name.rpartition(".")[0]) if module in MODULES}


@cache
def own(module: str) -> frozenset[str]:
    """The modules of this package that `module` imports."""
    return frozenset(ours(imports(module)))


def room(module: str) -> str:
    return module.partition(".")[0]


def packages(module: str, anywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(module, anywhere)}


def test_every_file_is_in_a_room():
    assert {room(module) for module in MODULES} == set(DEPTH)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_what_a_room_says_of_itself_is_a_docstring_and_nothing_else(name):
    body = ast.parse((PACKAGE / name / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_imports_point_downwards():
    arrows = {(module, name) for module in MODULES for name in own(module)}
    assert not {(a, b) for a, b in arrows if DEPTH[room(b)] < DEPTH[room(a)]}


def test_the_face_is_for_others_and_tells_the_rooms_its_version():
    """A name that it gives may come from any room, so whoever took one from it would import upwards unseen."""
    names = {name for module in MODULES for name in imports(module) if name.split(".")[0] == "nnunet_lowmem"}
    assert {name for name in names if not ours([name])} == {"nnunet_lowmem.__version__"}


def test_nobody_imports_in_a_circle():
    assert not [module for module in MODULES if module in closure(own(module), own)]


def test_window_and_preprocessing_do_not_know_each_other():
    arrows = {(room(module), room(name)) for module in MODULES for name in own(module)}
    assert not arrows & {("window", "preprocessing"), ("preprocessing", "window")}


def test_nnunet_is_imported_in_few_rooms():
    found = {module for module in MODULES if "nnunetv2" in packages(module)}
    assert found - {"commands.cli"} == MAY_IMPORT_NNUNET


def test_cli_finds_datasets_with_nnunet_when_asked_to():
    names = [name for name in imports("commands.cli") if name.startswith("nnunetv2")]
    assert names == ["nnunetv2.utilities.file_path_utilities.get_output_folder"]
    assert "nnunetv2" not in packages("commands.cli", anywhere=False)


@pytest.mark.parametrize("module", sorted(MUST_BE_PURE))
def test_pure_rooms_know_no_torch_and_no_files(module):
    assert not packages(module) & {"torch", "nnunetv2", "numba", "os", "pathlib", "tempfile", "subprocess", "psutil"}


@pytest.mark.parametrize(
    "module",
    [
        "commands.cli",
        "__main__",
        "commands.compare",
        "commands.flags",
        "report.compare",
        "nnunet.model_files",
        "system.memory_limits",
        "system.memory_held",
        "errors",
        "system.atomic_files",
        "system.owned_folders",
        "system.platform",
        "system.workers",
        "system.worker_child",
        "nnunet.predictors",
        "nnunet.switching",
        "startup",
        "commands.run",
        "commands.doctor",
        "commands.doctor_tables",
        "doctor.log",
        "doctor.machine",
        "doctor.environment",
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
        return ours(imports(name, anywhere=False))

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
        "import nnunet_lowmem as n; assert all(getattr(n, name) for name in set(n.__all__) - {'LowMemPredictor'})",
        "import nnunet_lowmem.commands.cli",
        "import nnunet_lowmem.commands.cli as c; c.predict_parser()",
        "import nnunet_lowmem.commands.cli as c; c.predict_entry_point(['--help'])",
        "import nnunet_lowmem.commands.cli as c; c.main(['--help'])",
        "import nnunet_lowmem.commands.cli as c; c.main(['--version'])",
        "import nnunet_lowmem.commands.cli as c; c.main(['demo', '--help'])",
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
    commands = {"cli", "compare_table", "console", "demo", "doctor", "doctor_tables", "shell", "verify"}
    assert talkers == {f"commands.{name}" for name in commands}, "a library logs; the commands decide what is shown"


def test_package_gives_its_predictor_what_it_raises_and_what_it_tells_and_nothing_else():
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    told = {"CaseReport", "Plan", "Progress"}
    assert set(nnunet_lowmem.__all__) == {"LowMemPredictor", "__version__", "disable", "enable", *raised, *told}
    assert {getattr(nnunet_lowmem, name) for name in raised} == {getattr(errors, name) for name in raised}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nnunet_lowmem.nonsense  # noqa: B018


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module in MODULES:
        yield from ((module, node) for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef))


def members(node: ast.ClassDef) -> set[str]:
    """Methods, properties included."""
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_no_class_is_a_tower():
    """Counted with what it has of classes of ours."""
    own = {node.name: node for _, node in classes()}

    def bases(name: str) -> set[str]:
        return {base.id for base in own[name].bases if isinstance(base, ast.Name)} & set(own)

    counts = {name: sum(len(members(own[cls])) for cls in closure({name}, bases)) for name in own}
    assert {name: count for name, count in counts.items() if count > 25} == {}
    assert counts["LowMemPredictor"] > 10, "the count counts"


def private_names(module: str) -> tuple[set[str], dict[str, str]]:
    """What a file makes, and what it asks other things than ``self`` for, with how."""
    made, asked = set(), {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name):
            made.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                made.add(node.attr)
            else:
                asked[node.attr] = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnunet_lowmem"):
            asked.update({a.name: f"from {node.module}" for a in node.names if a.name[:1] == "_" != a.name[1:2]})
    return made, asked


def test_no_private_member_is_used_in_another_file():
    names = {module: private_names(module) for module in MODULES}
    ours_too = {name for made, _ in names.values() for name in made if name.startswith("_")}
    found = {
        (module, how)
        for module, (made, asked) in names.items()
        for name, how in asked.items()
        if name in ours_too and name not in made
    }
    of_others = {"module._buffers", "module._parameters", "multiprocessing.process._children"}  # torch's and Python's
    assert {how for _, how in found} <= of_others
