"""The predictor in the place of ``nnUNetPredictor``: reversible, in every module, in every order of import."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import nnunetv2.inference.predict_from_raw_data as stock_module
import pytest
import torch
from factory import ModelSpec
from images import FAKE_PREDICTORS
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module  # noqa: N813
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from oracle import assert_same_array

import nnunet_lowmem
from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem import predictor as own_module
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.nnunet import switching

HOLDER = types.SimpleNamespace(stock=stock_module.nnUNetPredictor)  # keeps stock's class where no rebinding reaches
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _taken_back(monkeypatch):
    monkeypatch.setattr(switching, "_warned", True)
    yield
    nnunet_lowmem.disable()
    assert stock_module.nnUNetPredictor is HOLDER.stock


@pytest.fixture
def module(monkeypatch):
    """A tool's module."""
    made = types.ModuleType("some_tool")
    monkeypatch.setitem(sys.modules, "some_tool", made)
    return made


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter; stdout and stderr are kept apart."""
    path = os.pathsep.join([str(Path(nnunet_lowmem.__file__).parents[1]), str(FAKE_PREDICTORS)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


# -- enable and disable


def test_swaps_and_takes_back_in_all_modules(module):
    module.predictor_class = HOLDER.stock
    nnunet_lowmem.enable()
    for namespace, name in [
        (stock_module, "nnUNetPredictor"),
        (trainer_module, "nnUNetPredictor"),
        (module, "predictor_class"),
    ]:
        assert issubclass(getattr(namespace, name), LowMemPredictor)
    nnunet_lowmem.disable()
    assert module.predictor_class is trainer_module.nnUNetPredictor is HOLDER.stock


def test_own_base_class_stays_stock():
    with nnunet_lowmem.enable():
        assert LowMemPredictor.__mro__[-2] is own_module.nnUNetPredictor is HOLDER.stock


def test_names_taken_meanwhile_are_taken_back_but_the_predictor_itself_is_left(module):
    nnunet_lowmem.enable()
    exec("from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as P", vars(module))
    exec("from nnunet_lowmem import LowMemPredictor as mine", vars(module))
    nnunet_lowmem.disable()
    assert module.P is HOLDER.stock
    assert module.mine is LowMemPredictor


def test_twice_is_once():
    nnunet_lowmem.enable()
    first = stock_module.nnUNetPredictor
    nnunet_lowmem.enable()
    assert stock_module.nnUNetPredictor is first
    nnunet_lowmem.disable()
    nnunet_lowmem.disable()
    assert stock_module.nnUNetPredictor is HOLDER.stock


def test_context_restores_what_was_before():
    with nnunet_lowmem.enable(max_ram="4G"):
        outer = stock_module.nnUNetPredictor(device=CPU)
        with nnunet_lowmem.enable(max_ram="2G"):
            inner = stock_module.nnUNetPredictor(device=CPU)
        again = stock_module.nnUNetPredictor(device=CPU)
        with pytest.raises(ZeroDivisionError), nnunet_lowmem.enable():
            1 / 0  # noqa: B018
    assert [outer.max_ram, inner.max_ram, again.max_ram] == ["4G", "2G", "4G"]
    assert stock_module.nnUNetPredictor is HOLDER.stock


def test_what_the_tool_passes_overrules_the_options(monkeypatch):
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "1G")
    monkeypatch.setenv("nnUNet_lowmem_max_vram", "1G")
    with nnunet_lowmem.enable(max_ram="2G"):
        predictor = stock_module.nnUNetPredictor(device=CPU, max_ram="3G")
        other = stock_module.nnUNetPredictor(0.7, device=CPU)
    assert (predictor.max_ram, predictor.max_vram) == ("3G", "1G")
    assert (other.tile_step_size, other.max_ram) == (0.7, "2G")


def test_signature_is_that_of_the_predictor():
    with nnunet_lowmem.enable():
        assert inspect.signature(stock_module.nnUNetPredictor) == inspect.signature(LowMemPredictor)
        assert (
            "use_cropped_logits_resampling"
            in inspect.signature(stock_module.nnUNetPredictor.predict_from_files).parameters
        )


def test_unknown_name_changes_nothing():
    with pytest.raises(UsageError, match=r"installed are: .*lowmem"):
        nnunet_lowmem.enable("nonsense")
    assert stock_module.nnUNetPredictor is HOLDER.stock


@pytest.mark.slow
def test_threads_leave_a_consistent_state(module):
    module.P = HOLDER.stock
    start, failures = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                nnunet_lowmem.enable(max_ram=number)
                nnunet_lowmem.disable()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    nnunet_lowmem.disable()
    assert module.P is stock_module.nnUNetPredictor is HOLDER.stock


def test_lazy_modules_are_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "lazy_module.py").write_text("raise RuntimeError('loaded')")
    spec = importlib.util.spec_from_file_location("lazy_module", tmp_path / "lazy_module.py")
    loader = spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    loader.exec_module(lazy)
    monkeypatch.setitem(sys.modules, "no_module", object())
    with nnunet_lowmem.enable():
        pass
    with pytest.raises(RuntimeError, match="loaded"):
        lazy.attribute  # noqa: B018


def test_what_cannot_be_reached_gets_one_warning(module, monkeypatch, caplog):
    exec("def predict(cls=None): ...", vars(module))
    module.predict.__module__ = "some_tool"
    module.predict.__defaults__ = (HOLDER.stock,)
    module.Sub = type("Sub", (HOLDER.stock,), {"__module__": "some_tool"})
    module.Holder = type("Holder", (), {"__module__": "some_tool", "cls": HOLDER.stock})
    exec("class Method:\n    def predict(self, cls=None): ...\ndef closure(cls): return lambda: cls", vars(module))
    module.Method.__module__ = module.closure.__module__ = "some_tool"
    module.Method.predict.__defaults__ = (HOLDER.stock,)
    module.closed = module.closure(HOLDER.stock)
    module.closed.__module__ = "some_tool"
    module.made = HOLDER.stock(device=CPU)
    module.part = functools.partial(HOLDER.stock, device=CPU)
    module.TABLE = {"nnunet": HOLDER.stock}
    module.harmless = {"nnunet": LowMemPredictor}
    monkeypatch.setattr(switching, "_warned", False)
    with caplog.at_level(logging.WARNING):
        nnunet_lowmem.enable()
        nnunet_lowmem.disable()
        nnunet_lowmem.enable()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    held = ["Holder", "Method", "Sub", "TABLE", "closed", "made", "part", "predict"]
    assert ", ".join(f"some_tool.{name}" for name in held) + ": call" in warnings[0]


def test_another_predictor_can_be_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKE_PREDICTORS))
    with nnunet_lowmem.enable("echo", volume=3):
        assert stock_module.nnUNetPredictor(device=CPU).volume == 3
    assert stock_module.nnUNetPredictor is HOLDER.stock


def test_predicts_stock_labels_in_the_place_of_stock(images, models):
    model, case = models(ModelSpec(), images("head")), images("head")

    def predict():
        predictor = stock_module.nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(model, (0,))
        return predictor.predict_from_files_sequential([case], None)[0]

    expected = predict()
    with nnunet_lowmem.enable():
        assert_same_array(expected, predict())


# -- plans


def test_plans_choose_the_predictor_and_its_options(images, models, tmp_path):
    plain = models(ModelSpec(), images("head"))
    asking = tmp_path / "asking"
    shutil.copytree(plain, asking)
    plans = json.loads((asking / "plans.json").read_text())
    plans |= {"predictor": "lowmem", "predictor_options": {"max_ram": "5G"}}
    (asking / "plans.json").write_text(json.dumps(plans))

    def predict(model):
        predictor = stock_module.nnUNetPredictor(tile_step_size=0.6, device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        return predictor, predictor.predict_from_files_sequential([images("head")], None)[0]

    stock, expected = predict(asking)  # stock ignores the keys
    assert type(stock) is HOLDER.stock
    with nnunet_lowmem.enable("plans"):
        ours, actual = predict(asking)
        unasked, _ = predict(plain)
    assert type(ours) is LowMemPredictor
    assert (ours.max_ram, ours.tile_step_size) == ("5G", 0.6)
    assert_same_array(expected, actual)
    assert not isinstance(unasked, LowMemPredictor)
    assert isinstance(unasked, HOLDER.stock)


def test_plans_are_seen_where_a_tool_loads_the_model_itself(images, models):
    """As MONAI's bundle does, and nnU-Net's trainer by `manual_initialization`."""
    loaded = LowMemPredictor(device=CPU, allow_tqdm=False)
    loaded.initialize_from_trained_model_folder(models(ModelSpec(), images("head")), (0,))
    expected = loaded.predict_from_files_sequential([images("head")], None)[0]
    model = {name: getattr(loaded, name) for name in ("network", "configuration_manager", "dataset_json",
             "trainer_name", "label_manager", "list_of_parameters", "allowed_mirroring_axes")}  # fmt: skip
    asking = PlansManager({**loaded.plans_manager.plans, "predictor": "lowmem", "predictor_options": {"max_ram": "5G"}})
    for manager, kind in ((asking, LowMemPredictor), (loaded.plans_manager, HOLDER.stock)):
        with nnunet_lowmem.enable("plans"):
            by_attributes, by_method = (stock_module.nnUNetPredictor(device=CPU, allow_tqdm=False) for _ in range(2))
            by_attributes.plans_manager = manager
            for name, value in model.items():
                setattr(by_attributes, name, value)
            by_method.manual_initialization(
                loaded.network, manager, loaded.configuration_manager, [loaded.list_of_parameters[0]],
                loaded.dataset_json, loaded.trainer_name, loaded.allowed_mirroring_axes)  # fmt: skip
            for made in (by_attributes, by_method):
                assert isinstance(made, LowMemPredictor) == (kind is LowMemPredictor)
                assert made.plans_manager is manager
                assert getattr(made, "max_ram", None) == ("5G" if manager is asking else None)
                assert_same_array(expected, made.predict_from_files_sequential([images("head")], None)[0])


# -- what is installed


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_hook_is_installed_and_costs_nothing_unless_the_variable_is_set(tmp_path, hook):
    source = tmp_path / "source"
    root = Path(__file__).parents[2]  # the checkout: an installed package has no setup.py beside it
    shutil.copytree(root / "nnunet_lowmem", source / "nnunet_lowmem", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = f"import setuptools.build_meta as b; b.{hook}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        line = archive.read("nnunet_lowmem_startup.pth").decode()
        assert "nnunet_lowmem_startup.pth" in archive.read("nnunet_lowmem-0.1.0.dist-info/RECORD").decode()
    site_folder = tmp_path / "site"
    site_folder.mkdir()
    (site_folder / "nnunet_lowmem_startup.pth").write_text(line)
    program = f"""
import site, sys, time, os
before = set(sys.modules)
start = time.perf_counter()
exec({line!r})
spent = time.perf_counter() - start
assert set(sys.modules) == before and spent < 0.001, spent
site.addsitedir({str(site_folder)!r})
assert set(sys.modules) == before
os.environ["nnUNet_predictor"] = "lowmem"
exec({line!r})
assert "nnunet_lowmem.startup" in sys.modules and "torch" not in sys.modules
"""
    python(program, nnUNet_predictor="")


# -- fresh interpreters: orders of import, the environment, the run command

CHECK = """
import sys
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunet_lowmem.predictor import LowMemPredictor
assert issubclass(nnUNetPredictor, LowMemPredictor), nnUNetPredictor
assert trainer_module.nnUNetPredictor is nnUNetPredictor
assert LowMemPredictor.__mro__[-2].__mro__[1] is object
import nnunetv2.inference.predict_from_raw_data as m, inspect
assert 'Dataset' in inspect.getsource(m)
import nnunet_lowmem, torch
made = nnUNetPredictor(device=torch.device('cpu'))
print(type(made).__mro__[1].__name__, made.max_ram)
nnunet_lowmem.disable()
assert m.nnUNetPredictor is nnUNetPredictor is trainer_module.nnUNetPredictor is LowMemPredictor.__mro__[-2]
"""


@pytest.mark.slow
def test_enabled_before_nnunet_is_imported():
    program = "import nnunet_lowmem, sys; nnunet_lowmem.enable(); assert 'torch' not in sys.modules"
    assert "LowMemPredictor None" in python(program + CHECK).stdout


@pytest.mark.slow
def test_enabled_before_the_predictor_is_imported_itself():
    python("import nnunet_lowmem; nnunet_lowmem.enable(); from nnunet_lowmem import LowMemPredictor" + CHECK)


@pytest.mark.slow
def test_enabled_and_disabled_before_nnunet_is_imported():
    """And enabled again after it, where all is reached: here the tests hold the class in many places."""
    done = python(
        "import nnunet_lowmem, sys; before = list(sys.meta_path); nnunet_lowmem.enable(); nnunet_lowmem.disable()\n"
        "assert sys.meta_path == before; import nnunetv2.inference.predict_from_raw_data as m\n"
        "assert m.nnUNetPredictor.__mro__[1] is object; nnunet_lowmem.enable()\n"
        "assert m.nnUNetPredictor.__mro__[1] is not object"
    )
    assert "still stock" not in done.stderr


def test_the_variable_is_enough_and_its_line_says_so():
    done = python("import nnunet_lowmem.startup" + CHECK, nnUNet_predictor="lowmem", nnUNet_lowmem_max_ram="4G")
    assert "LowMemPredictor 4G" in done.stdout
    assert "predictor 'lowmem' in place of nnUNetPredictor: nnunet_lowmem.predictor.LowMemPredictor, max_ram=4G" in (
        done.stderr
    )


@pytest.mark.slow
def test_unknown_name_in_the_variable_stops_the_import_of_nnunet():
    done = python(
        "import nnunet_lowmem.startup\ntry:\n    import nnunetv2.inference.predict_from_raw_data\n"
        "except Exception as error: print(error)",
        nnUNet_predictor="nonsense",
    )
    assert "no predictor named 'nonsense'; installed are: echo, lowmem" in done.stdout


def test_run_command_sets_it_for_one_command():
    command = [sys.executable, "-m", "nnunet_lowmem", "run", "--", sys.executable, "-c", CHECK + "sys.exit(7)"]
    env = {**os.environ, "nnUNet_lowmem_max_ram": "3G"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "LowMemPredictor 3G" in done.stdout


def test_run_command_keeps_the_sitecustomize_that_it_hides(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('the other one')")
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    program = "import sys; print('switching' in str(list(sys.modules)), 'torch' in sys.modules)"
    command = [sys.executable, "-m", "nnunet_lowmem", "run", "--", sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == ["the other one", "True False"]


@pytest.mark.parametrize(
    ("words", "text"),
    [([], "give the command after --"), (["--", "no-such-tool"], "'no-such-tool' is not found")],
)
def test_run_command_refuses(words, text):
    command = [sys.executable, "-m", "nnunet_lowmem", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert text in done.stderr
