"""Malicious and damaged model folders: nothing of theirs runs, and one line says what they asked for."""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from datetime import time as clock_time
from decimal import Decimal
from fractions import Fraction
from functools import partial
from http import HTTPStatus
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from factory import ModelSpec
from images import BUNDLED_MODEL
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from oracle import INSTALLED, assert_one_line, make_predictor
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import ModelError
from nnunet_lowmem.nnunet import trust
from nnunet_lowmem.nnunet.trust import Trust


@pytest.fixture
def model(images, models, tmp_path: Path) -> Path:
    """A good model folder of one's own to spoil."""
    return Path(shutil.copytree(models(ModelSpec(), images("head")), tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def configuration(plans: dict[str, Any]) -> dict[str, Any]:
    return plans["configurations"]["3d_fullres"]


def arch_kwargs(plans: dict[str, Any]) -> dict[str, Any]:
    return configuration(plans)["architecture"]["arch_kwargs"]


def spoil_checkpoint(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, path)


def predict(model: Path, image: str, out: Path, *flags: str) -> int:
    folders = ["-i", str(Path(image).parent), "-o", str(out), "-m", str(model)]
    return cli.predict_entry_point([*folders, "-f", "0", "-device", "cpu", "--disable_progress_bar", *flags])


class Runs:
    """Unpickled without a gate, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


# -- checkpoints


def test_pickle_that_runs_code_does_not(model, images, marker, tmp_path, capsys):
    spoil_checkpoint(model, lambda c: c.update(logging=Runs(marker)))
    assert predict(model, images("head")[0], tmp_path / "out") == 2
    assert not marker.exists()
    assert_one_line(capsys.readouterr().err, ("checkpoint_final.pth", "posix.system", "--trust_model"))


def test_trusting_the_model_runs_it_and_says_so(model, images, marker, tmp_path, capsys):
    """The control: the file above really is dangerous."""
    spoil_checkpoint(model, lambda c: c.update(logging=Runs(marker)))
    assert predict(model, images("head")[0], tmp_path / "out", "--trust_model") == 0
    assert marker.exists()
    assert (tmp_path / "out" / "head.nii.gz").exists()


def test_trusting_the_model_is_never_silent(model, caplog):
    make_predictor(LowMemPredictor, str(model), trust_model=True)
    assert [(record.levelname, str(model) in record.message) for record in caplog.records] == [("WARNING", True)]


def test_later_fold_that_runs_code_does_not(model, images, marker, tmp_path, capsys):
    shutil.copytree(model / "fold_0", model / "fold_1")
    checkpoint = torch.load(model / "fold_1/checkpoint_final.pth", weights_only=False)
    torch.save({**checkpoint, "network_weights": {**checkpoint["network_weights"], "more": Runs(marker)}},
               model / "fold_1/checkpoint_final.pth")  # fmt: skip
    folders = ["-i", str(Path(images("head")[0]).parent), "-o", str(tmp_path / "out"), "-m", str(model)]
    assert cli.predict_entry_point([*folders, "-f", "0", "1", "-device", "cpu", "--disable_progress_bar"]) != 0
    assert not marker.exists()
    assert "fold_1" in capsys.readouterr().err


def test_torch_that_cannot_load_safely_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ModelError, match=r"torch 2\.5\.1.* 2\.6 is needed"):
        make_predictor(LowMemPredictor, str(model))


def test_bundled_checkpoint_loads():
    checkpoint = Trust().load_checkpoint(next(BUNDLED_MODEL.glob("fold_0/*.pth")))
    assert checkpoint["network_weights"]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_that_the_trainer_logs_load_whichever_numpy_wrote_them(module, tmp_path):
    scalars = [kind(value) for kind, value in SCALARS]
    arrays = [np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3))]
    file = tmp_path / "checkpoint.pth"
    torch.save({"network_weights": {}, "logging": [*scalars, *arrays], "device": torch.device("cpu")}, file)
    own = np.float64(0).__reduce__()[0].__module__.encode()
    assert own in file.read_bytes()
    rewrite_pickle(file, own, module.encode())
    assert is_same(Trust().load_checkpoint(file)["logging"], [*scalars, *arrays])


SCALARS = [(np.float64, 0.5), (np.float32, 0.25), (np.float16, 2), (np.int64, 7), (np.uint8, 9), (np.bool_, True),
           (np.complex64, 1j), (np.str_, "x"), (np.str_, ""), (np.bytes_, b""), (np.datetime64, "NaT")]  # fmt: skip


def rewrite_pickle(file: Path, old: bytes, new: bytes) -> None:
    """Replace a part of the pickle; a longer one moves what follows, so the archive is written again."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


STRUCTURE = [("a", "<i4"), ("b", ">f8", (2,)), ("c", "O")]
HARMLESS: dict[str, Any] = {
    "arrays": [np.zeros(3), np.zeros((2, 0, 3), "u1"), np.array(5.0), np.array(["ab", "c"]), np.ones(2, bool)],
    "arrays_of_objects": np.array([1, "a", None, [2, (3,)], np.zeros(2)], dtype=object),
    "arrays_of_dates": np.array(["2020-01-01T00:00", "NaT"], "M8[10s]") - np.datetime64(0, "s"),
    "arrays_of_records": np.array([(1, (2, 3), "x"), (4, (5, 6), None)], STRUCTURE),
    "aligned_records": np.zeros(2, np.dtype([("a", "u1"), ("b", "f8")], align=True)),
    "dtypes": [np.dtype(">f4"), np.dtype("U7"), np.dtype("m8[ns]"), np.dtype("V3"), np.dtype(STRUCTURE), np.float32],
    "states_of_generators": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
    "version": torch.__version__,
    "paths": [PosixPath("/data/x"), PurePosixPath("a/b"), PureWindowsPath("c:/x")],
    "keys": {PosixPath("/x"): 1, np.float32(2): 2, (np.int64(3), "a"): 3},
    "default_dicts": [defaultdict(int, a=1), defaultdict(list, {"a": [np.float64(1)]}), defaultdict(None)],
    "containers": [deque([1, np.int64(2)], 3), OrderedDict(a=np.zeros(2)), Counter("aab"), UserDict(a=1)],
    "sets": [{1, 2}, frozenset([np.float64(1), "a"]), set()],
    "namespaces": [Namespace(a=1, b=Namespace(c=PosixPath("/x"))), SimpleNamespace(a=np.zeros(1))],
    "dates": [date(2020, 1, 2), datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=1))), timedelta(1), clock_time(1)],
    "numbers": [Decimal("1.50"), Fraction(1, 3), 1j, 2**70, UUID(int=5), True],
    "bytes": [b"", b"\x00\xff", bytearray(b"x"), range(3), slice(1, None), ..., NotImplemented, type(None)],
    "enumerations": [HTTPStatus.OK, re.IGNORECASE, platform.uname(), time.gmtime(0)],
    "partial": partial(int, base=2),
    "classes": [int, dict, torch.nn.LeakyReLU, np.float64],
    "of_torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16, torch.strided, torch.ones(2).bfloat16(),
                 torch.nn.Parameter(torch.ones(2)), torch.eye(3).to_sparse()],
    "an_exception": ValueError("x"),
}  # fmt: skip


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are alike down to their types and layouts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        layouts = {(a.dtype, a.shape, a.flags.f_contiguous, a.flags.writeable) for a in (one, other)}
        return len(layouts) == 1 and is_same(one.tolist(), other.tolist())
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return is_same(list(one.items()), list(other.items())) and repr(one) == repr(other)
    return repr(one) == repr(other)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_runs_no_code_when_it_is_built_survives(name, legacy, tmp_path):
    if legacy and name == "classes":
        pytest.skip("torch's old format stores classes of modules with their source")
    value = HARMLESS[name]
    checkpoint = {"network_weights": {"w": torch.ones(2)}, "extra": [value]}
    torch.save(checkpoint, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    (read,) = Trust().load_checkpoint(tmp_path / "c.pth")["extra"]
    assert is_same(read, value), read


def scheduler() -> LRScheduler:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    # nnU-Net 2.5 gives its own an argument that torch no longer knows
    return PolyLRScheduler(optimizer, 0.1, 10) if INSTALLED >= (2, 6) else PolynomialLR(optimizer, 10)


WHOLE = {
    "generators": [np.random.default_rng(1), np.random.RandomState(1), torch.Generator()],
    "modules": [torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1))],
    "optimizer": [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1, 0.9)],
    "scheduler": [scheduler()],
    "masked": [np.ma.array([1, 2], mask=[0, 1])],
    "pattern": [re.compile("a+")],
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_no_prediction_needs_is_not_built_and_costs_nothing(name, tmp_path):
    torch.save({"network_weights": {}, "extra": WHOLE[name], "epoch": 3}, tmp_path / "c.pth")
    read = Trust().load_checkpoint(tmp_path / "c.pth")
    assert read["epoch"] == 3
    assert all(type(one) is not type(other) for one, other in zip(read["extra"], WHOLE[name], strict=True))


def test_path_of_another_system_is_a_name(tmp_path):
    torch.save({"network_weights": {}, "extra": PureWindowsPath("c:/x")}, tmp_path / "c.pth")
    rewrite_pickle(tmp_path / "c.pth", b"PureWindowsPath", b"WindowsPath")
    assert Trust().load_checkpoint(tmp_path / "c.pth")["extra"] == PureWindowsPath("c:/x")


def test_prediction_with_such_a_checkpoint(model, images, tmp_path):
    def fill(checkpoint: dict[str, Any]) -> None:
        checkpoint["network_weights"] = defaultdict(None, checkpoint["network_weights"])
        checkpoint["init_args"]["args"] = Namespace(out=PosixPath("/x"))
        checkpoint["extra"] = {**HARMLESS, **WHOLE}

    assert predict(model, images("head")[0], tmp_path / "plain") == 0
    spoil_checkpoint(model, fill)
    assert predict(model, images("head")[0], tmp_path / "out") == 0
    first, second = ((tmp_path / out / "head.nii.gz").read_bytes() for out in ("plain", "out"))
    assert first == second


class Called:
    """Pickled as a call of what may not be looked up here."""

    def __init__(self, *arguments: Any, state: Any = None) -> None:
        self.reduced = (call_me, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def call_me(*_: Any) -> Any:
    raise AssertionError("it was called")


def called(name: str, *arguments: Any, state: Any = None) -> tuple[str, Any]:
    return name, Called(*arguments, state=state)


def array_of(dtype: Any, content: Any, shape: Any = (1,)) -> tuple[str, Any]:
    return called("numpy.core.multiarray._reconstruct", np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


def dtype_of(state: Any, code: str = "V8") -> tuple[str, Any]:
    return called("numpy.dtype", code, False, True, state=state)


BYTES = b"A" * 8
FORGED = np.dtype([("a", object)])
DANGEROUS: dict[str, tuple[str, Any]] = {
    **{
        name: called(name, "x")
        for name in (
            *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open"),
            *("os.system", "posix.system", "nt.system", "sys.exit", "subprocess.Popen", "importlib.import_module"),
            *("operator.attrgetter", "functools.reduce", "types.FunctionType", "pickle.loads", "io.open"),
            *("torch.load", "torch.hub.load", "torch.nn.init.normal_", "numpy.load", "numpy.memmap", "ctypes.CDLL"),
            *("nnunetv2.paths.os", "collections.Counter.__init__.__globals__", "argparse._os.system", "antigravity.x"),
            *("easydict.EasyDict", "__main__.Config"),
        )
    },
    "factory": called("collections.defaultdict", os.getcwd),
    "factory_of_torch": called("collections.defaultdict", torch.nn.ReLU),
    "partial": called("functools.partial", os.getcwd, state=(os.getcwd, (), {}, None)),
    "pointers": array_of(np.dtype(object), BYTES),
    "pointers_in_records": array_of(FORGED, BYTES),
    "fewer_objects_than_the_shape": array_of(np.dtype(object), [1], (1000,)),
    "fewer_bytes_than_the_shape": array_of(np.dtype("f8"), BYTES, (1000,)),
    "more_bytes_than_the_shape": array_of(np.dtype("f8"), BYTES * 9),
    "shape_that_overflows": array_of(np.dtype("f8"), BYTES, (2**40, 2**40)),
    "scalar_pointer": called("numpy.core.multiarray.scalar", np.dtype(object), BYTES),
    "field_beyond_the_end": dtype_of((3, "|", None, ("a",), {"a": (np.dtype("f8"), 4)}, 8, 1, 16)),
    "code_of_no_dtype": dtype_of((3, "|", None, None, None, -1, -1, 0), "os.system"),
    "fraction_without_end": called("fractions.Fraction", "1e999999999"),
    "bytes_without_end": called("builtins.bytes", 2**40),
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_what_may_run_code_or_lies_about_its_memory_is_refused_by_its_name(name, tmp_path, monkeypatch):
    named, value = DANGEROUS[name]
    torch.save({"network_weights": {}, "logging": {"x": [value]}}, tmp_path / "c.pth")
    module, _, attribute = named.rpartition(".")
    rewrite_pickle(tmp_path / "c.pth", f"{__name__}\ncall_me\n".encode(), f"{module}\n{attribute}\n".encode())
    blocked = module in ("os", "posix", "nt", "sys")  # torch refuses these before it knows where they are
    shown = "getcwd" if value.reduced[1][:1] == (os.getcwd,) else named
    with pytest.raises(ModelError) as refused:
        Trust().load_checkpoint(tmp_path / "c.pth")
    for word in (shown, "c.pth", "--trust_model", "" if blocked or shown == "getcwd" else "['logging']['x'][0]"):
        assert word in str(refused.value), refused.value
    foreign = module.partition(".")[0] in ("torch", "numpy", "easydict", "nnunetv2") and named == name
    assert ("--trust " in str(refused.value)) == foreign


def test_array_whose_type_lies_is_that_of_its_bytes(tmp_path):
    """A void type that claims to be longer than its code, and to hold objects."""
    lying = Called("V1", False, True, state=(3, "|", None, None, None, 10**6, 1, 63))
    torch.save({"network_weights": {}, "extra": lying}, tmp_path / "c.pth")
    rewrite_pickle(tmp_path / "c.pth", f"{__name__}\ncall_me\n".encode(), b"numpy\ndtype\n")
    read = Trust().load_checkpoint(tmp_path / "c.pth")["extra"]
    assert (read.itemsize, read.hasobject) == (1, False)


def test_objects_of_a_trusted_package_are_built(tmp_path, monkeypatch):
    (tmp_path / "my_tools.py").write_text(
        "import os\n"
        "class Config:\n"
        "    def __init__(self, path): self.path, self.more = path, {}\n"
        "    def __reduce__(self): return Config, (self.path,), {'more': self.more}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    my_tools = importlib.import_module("my_tools")
    config = my_tools.Config(PosixPath("/x"))
    config.more = {"a": np.zeros(2)}
    torch.save({"network_weights": {}, "config": config}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match=r"my_tools\.Config at \['config'\].*give --trust my_tools"):
        Trust().load_checkpoint(tmp_path / "c.pth")
    read = Trust(("my_tools",)).load_checkpoint(tmp_path / "c.pth")["config"]
    assert (type(read), read.path, read.more["a"].shape) == (my_tools.Config, PosixPath("/x"), (2,))
    rewrite_pickle(tmp_path / "c.pth", b"my_tools\nConfig\n", b"my_tools\n_exit\n")  # what the package has imported
    with pytest.raises(ModelError, match=r"my_tools\._exit"):
        Trust(("my_tools",)).load_checkpoint(tmp_path / "c.pth")


def test_newer_pickle_is_refused_with_the_cure(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "c.pth", pickle_protocol=4)
    with pytest.raises(ModelError, match=r"c\.pth.*opcode 149.*torch\.save.*--trust_model"):
        Trust().load_checkpoint(tmp_path / "c.pth")


def test_loading_leaves_torchs_own_list_as_it_was(model):
    torch.serialization.add_safe_globals([np.dtype, (dict, "argparse.Namespace")])
    before = set(torch.serialization.get_safe_globals())
    spoil_checkpoint(model, lambda c: c.update(extra=[np.dtype("f4"), Namespace(a=1)]))
    read = Trust().load_checkpoint(model / "fold_0/checkpoint_final.pth")
    assert read["extra"] == [np.dtype("f4"), Namespace(a=1)]
    assert set(torch.serialization.get_safe_globals()) == before


# -- names in plans.json


EVIL_ARCHITECTURE = {
    "direct": "os.system",
    "through_an_allowed_module": "torch.nn.init.torch.os.system",
    "through_an_allowed_package": "nnunetv2.paths.os.system",
    "module_itself": "nnunetv2.paths.os",
    "function_of_an_allowed_package": "nnunetv2.model_sharing.model_download.download_and_install_from_url",
    "class_of_an_allowed_package": "nnunetv2.utilities.plans_handling.plans_handler.PlansManager",
    "builtin": "eval",
    "builtin_of_an_allowed_module": "torch.nn.__builtins__.eval",
    "with_empty_parts": "torch..nn.LeakyReLU",
    "begins_alike": "torch.nnx.LeakyReLU",
    "not_text": 3,
}


@pytest.mark.parametrize("entry", ["nonlin", "network_class_name"])
@pytest.mark.parametrize("name", EVIL_ARCHITECTURE)
def test_architecture_that_leads_elsewhere(name, entry, model, images, marker, tmp_path, capsys):
    def spoil(plans: dict[str, Any]) -> None:
        where = arch_kwargs(plans) if entry == "nonlin" else configuration(plans)["architecture"]
        where[entry] = EVIL_ARCHITECTURE[name]
        arch_kwargs(plans)["nonlin_kwargs"] = {"command": f"touch {marker}"}

    edit(model / "plans.json", spoil)
    assert predict(model, images("head")[0], tmp_path / "out") == 2
    assert not marker.exists()
    error = capsys.readouterr().err
    assert_one_line(error, ("plans.json", f"{entry!r}", repr(EVIL_ARCHITECTURE[name])))
    assert "--trust os" not in error


def test_control_stock_runs_what_the_plans_name(model, marker):
    """The spoilt plans of the test above are dangerous: without a gate the command is run."""
    edit(
        model / "plans.json",
        lambda p: arch_kwargs(p).update(nonlin="os.system", nonlin_kwargs={"command": f"touch {marker}"}),
    )
    with pytest.raises(ModelError):
        make_predictor(LowMemPredictor, str(model), trust_model=True)
    assert marker.exists()


def test_module_that_is_not_trusted_is_not_even_imported(model, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(model / "plans.json", lambda p: configuration(p)["architecture"].update(network_class_name="stranger.Net"))
    with pytest.raises(ModelError, match="give --trust stranger"):
        make_predictor(LowMemPredictor, str(model))
    assert "stranger" not in sys.modules


def test_architecture_of_a_trusted_package(model, tmp_path, monkeypatch):
    (tmp_path / "known_nets.py").write_text(
        "from dynamic_network_architectures.architectures.unet import PlainConvUNet\nclass Net(PlainConvUNet): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    edit(model / "plans.json", lambda p: configuration(p)["architecture"].update(network_class_name="known_nets.Net"))
    predictor = make_predictor(LowMemPredictor, str(model), trust=("known_nets",))
    assert type(predictor.network).__name__ == "Net"


def test_architecture_that_has_moved_is_found_as_stock_finds_it(model):
    moved = "dynamic_network_architectures.architectures.somewhere.PlainConvUNet"
    edit(model / "plans.json", lambda p: configuration(p)["architecture"].update(network_class_name=moved))
    assert type(make_predictor(LowMemPredictor, str(model)).network).__name__ == "PlainConvUNet"


NAMES = {
    "preprocessor_name": "subprocess",
    "normalization_schemes": ["os"],
    "resampling_fn_data": "partial",
    "resampling_fn_seg": "recursive_find_python_class",
    "resampling_fn_probabilities": "load_pickle",
    "image_reader_writer": "isfile",
    "label_manager": "get_labelmanager_class_from_plans",
}


@pytest.mark.parametrize("entry", NAMES)
def test_names_that_are_no_such_thing(entry, model, images, tmp_path, capsys):
    def spoil(plans: dict[str, Any]) -> None:
        holder = plans if entry in plans else configuration(plans)
        assert entry in holder
        holder[entry] = NAMES[entry]

    edit(model / "plans.json", spoil)
    assert predict(model, images("head")[0], tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, ("plans.json", entry))


def test_name_hidden_behind_a_good_one_elsewhere(model):
    """The configuration is what counts for nnU-Net, whatever the plans say beside it."""

    def spoil(plans: dict[str, Any]) -> None:
        plans["preprocessor_name"] = "DefaultPreprocessor"
        configuration(plans)["preprocessor_name"] = "subprocess"

    edit(model / "plans.json", spoil)
    with pytest.raises(ModelError, match=r"preprocessor_name.*subprocess"):
        make_predictor(LowMemPredictor, str(model))


def test_name_that_is_inherited(model):
    """The checkpoint asks for a configuration that takes the evil name over from another."""

    def spoil(plans: dict[str, Any]) -> None:
        plans["configurations"]["base"] = {**configuration(plans), "preprocessor_name": "subprocess"}
        plans["configurations"]["3d_fullres"] = {"inherits_from": "base"}

    edit(model / "plans.json", spoil)
    with pytest.raises(ModelError, match=r"preprocessor_name.*subprocess"):
        make_predictor(LowMemPredictor, str(model))


@pytest.mark.parametrize("legacy", ["os.system", "../PlainConvUNet"])
def test_plans_of_old_formats(legacy, images, models, tmp_path):
    model = Path(shutil.copytree(models(ModelSpec(legacy_plans=True), images("head")), tmp_path / "old"))
    edit(model / "plans.json", lambda p: configuration(p).update(UNet_class_name=legacy))
    with pytest.raises(ModelError, match=r"UNet|architecture"):
        make_predictor(LowMemPredictor, str(model))


# -- trainers


@pytest.mark.parametrize("name", ["os", "inspect", "NoSuchTrainer", "nnUNetTrainer.nnUNetTrainer", "PlansManager", 5])
def test_trainer_that_is_none(name, model):
    spoil_checkpoint(model, lambda c: c.update(trainer_name=name))
    with pytest.raises(ModelError, match="trainer_name"):
        make_predictor(LowMemPredictor, str(model))


@pytest.mark.skipif(trust.nnUNet_extTrainer is None, reason="new in nnU-Net 2.8")
def test_trainer_of_an_external_folder_needs_its_name(model, tmp_path, monkeypatch):
    folder = tmp_path / "trainers"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "special.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class SpecialTrainer(nnUNetTrainer): pass\n"
    )
    (folder / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    spoil_checkpoint(model, lambda c: c.update(trainer_name="SpecialTrainer"))
    with pytest.raises(ModelError, match=r"special\.py.*give --trust mine"):
        make_predictor(LowMemPredictor, str(model))
    predictor = make_predictor(LowMemPredictor, str(model), trust=("mine",))
    assert predictor.trainer_name == "SpecialTrainer"


def test_trainer_that_the_program_has_imported_is_no_stranger(model):
    class TrainerOfTheTool(nnUNetTrainer):
        pass

    spoil_checkpoint(model, lambda c: c.update(trainer_name="TrainerOfTheTool"))
    assert make_predictor(LowMemPredictor, str(model)).trainer_name == "TrainerOfTheTool"


# -- names of files


ENDINGS = ["/../../x.nii.gz", "/x.nii.gz", "\\..\\x.nii.gz", ".nii.gz/../..", "..nii", ".nii\0.gz", "", ".", "nii.gz",
           ".nii.gz\n", ".a" * 20, 3, None]  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_file_ending_that_leads_elsewhere(ending, model, images, tmp_path, capsys):
    edit(model / "dataset.json", lambda d: d.update(file_ending=ending))
    assert predict(model, images("head")[0], tmp_path / "out" / "below") == 2
    assert_one_line(capsys.readouterr().err, ("dataset.json", "file_ending"))
    assert list((tmp_path / "out" / "below").iterdir()) == []
    for trusted in (False, True):
        with pytest.raises(ModelError, match="file_ending"):
            make_predictor(LowMemPredictor, str(model), trust_model=trusted)


# -- sizes


ABSURD = {
    "patch": (lambda p: configuration(p).update(patch_size=[4096, 4096, 4096]), "68,719,476,736"),
    "patch_of_none": (lambda p: configuration(p).update(patch_size=[0, 8, 8]), "patch_size"),
    "patch_of_text": (lambda p: configuration(p).update(patch_size="abc"), "patch_size"),
    "features": (lambda p: arch_kwargs(p).update(features_per_stage=[8, 10**12]), "1,000,000,000,000"),
    "many_features": (lambda p: arch_kwargs(p).update(features_per_stage=[60_000, 60_000]), "weights"),
    "kernels": (lambda p: arch_kwargs(p).update(kernel_sizes=[[3, 3, 3], [999_999, 3, 3]]), "999,999"),
    "stages": (lambda p: arch_kwargs(p).update(n_stages=10**6), "1,000,000"),
    "convolutions": (lambda p: arch_kwargs(p).update(n_conv_per_stage=[1, 1000]), "1,000"),
    "spacing": (lambda p: configuration(p).update(spacing=[0, 1, 1]), "spacing"),
    "spacing_nan": (lambda p: configuration(p).update(spacing=[float("nan"), 1, 1]), "spacing"),
    "axes": (lambda p: p.update(transpose_forward=[0, 0, 2]), "transpose_forward"),
    "inherits_from_itself": (lambda p: configuration(p).update(inherits_from="3d_fullres"), "ircular"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers_are_refused_before_they_cost_anything(name, model, images, tmp_path, capsys):
    spoil, word = ABSURD[name]
    edit(model / "plans.json", spoil)
    assert predict(model, images("head")[0], tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, (word,))


def test_absurd_number_of_classes(model):
    edit(model / "dataset.json", lambda d: d.update(labels={"background": 0, **{f"l{i}": i for i in range(1, 70_000)}}))
    with pytest.raises(ModelError, match=r"70,000 heads.*65,535"):
        make_predictor(LowMemPredictor, str(model))


def test_refusal_allocates_nothing(model):
    """Under a limit of a few hundred megabytes, a network of 400 GB is refused by its numbers."""
    edit(model / "plans.json", lambda p: arch_kwargs(p).update(features_per_stage=[60_000, 60_000]))
    program = f"""
    import resource, torch
    from nnunet_lowmem import LowMemPredictor
    from nnunet_lowmem.errors import ModelError
    used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 400 * 2**20,) * 2)
    try:
        LowMemPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder({str(model)!r}, (0,))
    except ModelError as error:
        print(error)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert "the network is not built" in done.stdout, done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_name_their_fold(value, model):
    def spoil(checkpoint: dict[str, Any]) -> None:
        next(iter(checkpoint["network_weights"].values())).flatten()[3:5] = value

    spoil_checkpoint(model, spoil)
    with pytest.raises(ModelError, match=r"fold_0/checkpoint_final\.pth: 2 of the \d+ weights 'encoder.*NaN"):
        make_predictor(LowMemPredictor, str(model))
