"""Errors are also of the kind that stock raises there, and what other people's code raises ends a run as it is."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import INSTALLED, make_predictor, predict_ours, predict_stock

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import (
    BudgetError,
    CasesFailedError,
    LowMemError,
    MemoryExhaustedError,
    ModelError,
    UsageError,
    WriteError,
    because,
    twin,
)
from nnunet_lowmem.nnunet import model_keys

KINDS = (FileNotFoundError, OSError, RuntimeError, torch.cuda.OutOfMemoryError, MemoryError, ValueError)
MORE_KINDS = (AssertionError, KeyError, IndexError, EOFError, ImportError)


@pytest.fixture
def model(models, images) -> str:
    return models(ModelSpec(), images("head"))


@pytest.fixture
def array(images) -> tuple[np.ndarray, dict]:
    return SimpleITKIO().read_images(images("small"))


def kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in (*KINDS, *MORE_KINDS) if isinstance(error, kind)}


def raised(run: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011  # of which class is what is asked
        run()
    return info.value


def assert_as_stock(run: Callable[[type], Any], cause: bool = True) -> LowMemError:
    """Both raise; ours is one of ours, of stock's kinds, and says what has led to it."""
    stock, ours = raised(lambda: run(nnUNetPredictor)), raised(lambda: run(LowMemPredictor))
    assert isinstance(ours, LowMemError)
    assert kinds(ours) == kinds(stock), (repr(stock), repr(ours))
    assert (ours.__cause__ is not None) is cause
    return ours


# -- model folders


def rewrite_plans(folder: Path, text: str) -> None:
    (folder / "plans.json").write_text(text)


def edit_checkpoint(folder: Path, edit: Callable[[dict], Any]) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), True),
    "no dataset.json": (lambda folder: (folder / "dataset.json").unlink(), True),
    "no plans.json": (lambda folder: (folder / "plans.json").unlink(), True),
    "no fold": (lambda folder: shutil.rmtree(folder / "fold_0"), True),
    "no checkpoint": (lambda folder: (folder / "fold_0" / "checkpoint_final.pth").unlink(), True),
    "half of plans.json": (lambda folder: rewrite_plans(folder, (folder / "plans.json").read_text()[:99]), True),
    "empty checkpoint": (lambda folder: (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b""), True),
    "no weights": (lambda folder: edit_checkpoint(folder, lambda c: c.pop("network_weights")), False),
    "no trainer's name": (lambda folder: edit_checkpoint(folder, lambda c: c.pop("trainer_name")), True),
    "unknown trainer": (lambda folder: edit_checkpoint(folder, lambda c: c.update(trainer_name="nnUNetNo")), False),
    "unknown configuration": (
        lambda folder: edit_checkpoint(folder, lambda c: c["init_args"].update(configuration="x")),
        True,
    ),
    "other weights": (lambda folder: edit_checkpoint(folder, lambda c: c["network_weights"].popitem()), True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_model_folder(model, tmp_path, name):
    spoil, cause = BROKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    spoil(folder)
    error = assert_as_stock(lambda cls: make_predictor(cls, str(folder), (0,)), cause)
    assert isinstance(error, ModelError)
    assert error.exit_code == UsageError.exit_code
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


# -- arrays and files

ARRAYS = {
    "no channel axis": lambda a, p: (a[0], p),
    "five axes": lambda a, p: (a[None], p),
    "two channels": lambda a, p: (np.concatenate([a, a]), p),
    "no channels": lambda a, p: (a[:0], p),
    "no voxels": lambda a, p: (a[:, :0], p),
    "spacing of zero": lambda a, p: (a, {"spacing": [0.0, 5.0, 5.0]}),
    "another previous stage": lambda a, p: (a, p, np.zeros((1, 3, 3, 3), np.uint8)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array(model, array, name):
    arguments = ARRAYS[name](array[0], dict(array[1]))
    assert_as_stock(lambda cls: make_predictor(cls, model, (0,)).predict_single_npy_array(*arguments), cause=False)


def test_sizes_of_a_run(model, array):
    def with_step(cls: type, step: float) -> Any:
        predictor = make_predictor(cls, model, (0,))
        predictor.tile_step_size = step
        return predictor.predict_single_npy_array(array[0], dict(array[1]))

    assert "case array, start: tile step size" in str(assert_as_stock(lambda cls: with_step(cls, 2), cause=False))
    if INSTALLED >= (2, 6):  # before, stock predicts nothing and says nothing
        assert_as_stock(
            lambda cls: make_predictor(cls, model, (0,)).predict_from_files([], None, num_parts=2, part_id=3), False
        )
    assert (
        make_predictor(LowMemPredictor, model, (0,)).predict_from_files([["a"]], None, num_parts=2, part_id=2) is None
    )


def files(tmp_path: Path, content: bytes | None) -> list[list[str]]:
    path = tmp_path / "scan_0000.nii.gz"
    if content is not None:
        path.write_bytes(content)
    return [[str(path)]]


def without(content: dict, *path: str) -> dict:
    copied = copy.deepcopy(content)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return copied


IN_PLANS = [(key,) for key in (*model_keys.PLANS, *model_keys.EXPORT_PLANS, model_keys.INTENSITIES[0])]
IN_CONFIGURATION = [(key,) for key in (*model_keys.CONFIGURATION, *model_keys.EXPORT, *model_keys.PREPROCESSING)]
IN_ARCHITECTURE = [("architecture", key) for key in model_keys.ARCHITECTURE]


def check_model(plans: dict, dataset_json: dict) -> None:
    model_keys.check_files(plans, dataset_json, Path("model"))
    resolved = plans["configurations"]["3d_fullres"]
    model_keys.check_configuration(resolved, "3d_fullres", Path("model"))
    model_keys.check_case(plans, resolved, True, True)
    model_keys.check_architecture(resolved, "3d_fullres", Path("model"))


def test_what_a_model_lacks_is_named():
    plans, dataset_json = ModelSpec().plans(), ModelSpec().dataset_json()
    check_model(plans, dataset_json)
    check_model(ModelSpec(preprocessor="Other").plans(), {**dataset_json, "modality": {}})
    cases = [(without(plans, *path), dataset_json, path) for path in IN_PLANS]
    for path in [*IN_CONFIGURATION, *IN_ARCHITECTURE]:
        cases.append((without(plans, "configurations", "3d_fullres", *path), dataset_json, path))
    cases += [(plans, without(dataset_json, key), (key,)) for key in ("labels", "channel_names")]
    for wrong_plans, wrong_dataset, path in cases:
        error = raised(lambda plans=wrong_plans, dataset=wrong_dataset: check_model(plans, dataset))
        assert isinstance(error, ModelError), path
        assert isinstance(error, KeyError), path
        file = "plans.json" if wrong_dataset is dataset_json else "dataset.json"
        assert re.match(rf"(model.)?{file} lacks .*{path[-1]}", str(error)), (path, error)


def test_missing_resampling_of_probabilities(model, images, tmp_path):
    """Also where a configuration inherits: then it is not missing."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    plans = load_json(str(folder / "plans.json"))
    configurations = plans["configurations"]
    configurations["parent"] = dict(configurations["3d_fullres"])
    configurations["3d_fullres"]["inherits_from"] = "parent"
    del configurations["3d_fullres"]["resampling_fn_probabilities_kwargs"]
    save_json(plans, str(folder / "plans.json"))
    make_predictor(LowMemPredictor, str(folder), (0,))
    del configurations["parent"]["resampling_fn_probabilities_kwargs"]
    save_json(plans, str(folder / "plans.json"))
    stock = raised(lambda: predict_stock(make_predictor(nnUNetPredictor, str(folder)), [images("small")], None))
    ours = make_predictor(LowMemPredictor, str(folder), (0,))  # a client may do without
    error = raised(lambda: predict_ours(ours, [images("small")], None))
    assert kinds(error) == kinds(stock)
    words = "'resampling_fn_probabilities_kwargs' in the configuration, .*like 'resampling_fn_data_kwargs', with"
    assert re.search(words, str(error)), error


@pytest.mark.parametrize("content", [None, b"", b"no image"], ids=["missing", "empty", "text"])
def test_unreadable_image(model, tmp_path, content):
    """What stock's worker dies of is a RuntimeError in `predict_from_files`."""
    cases = files(tmp_path, content)
    error = assert_as_stock(lambda cls: make_predictor(cls, model, (0,)).predict_from_files_sequential(cases, None))
    assert isinstance(error, CasesFailedError)
    assert error.__cause__ is error.report.failed[0].error
    assert isinstance(error.__cause__.__cause__, Exception)
    for keeps in (True, False):
        predictor = make_predictor(LowMemPredictor, model, (0,), continue_on_error=keeps)
        assert kinds(raised(lambda predictor=predictor: predictor.predict_from_files(cases, None))) == {"RuntimeError"}


def test_output_that_cannot_be_written(model, array, tmp_path):
    """ITK has one kind of error for everything."""
    target = str(tmp_path / "none" / "scan")
    arguments = (array[0], dict(array[1]), None, target)
    error = raised(lambda: make_predictor(LowMemPredictor, model, (0,)).predict_single_npy_array(*arguments))
    assert isinstance(error, WriteError)
    assert {"RuntimeError", "FileNotFoundError"} <= kinds(error)
    assert isinstance(error.__cause__, FileNotFoundError)


def test_case_that_is_refused_is_one_that_would_have_run_out(model, array):
    predictor = make_predictor(LowMemPredictor, model, (0,), max_ram="1M")
    error = raised(lambda: predictor.predict_single_npy_array(array[0], dict(array[1])))
    assert isinstance(error, BudgetError)
    assert kinds(error) == {"MemoryError"}


# -- memory

OUT_OF_MEMORY = {
    "torch's": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory."),
    "numpy's": lambda: MemoryError(),
    "the C library's": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_network_that_runs_out_of_memory(model, images, name):
    error, array = OUT_OF_MEMORY[name](), SimpleITKIO().read_images(images("head"))
    predictor = make_predictor(LowMemPredictor, model, (0,))
    raise_after(predictor.network, 12, error)
    single = raised(lambda: predictor.predict_single_npy_array(array[0], dict(array[1])))
    of_all = raised(lambda: predictor.predict_from_list_of_npy_arrays([array[0]], None, [dict(array[1])], None))
    assert (type(single).__name__, type(of_all).__name__) == ("MemoryExhaustedError", "CasesFailedError")
    assert kinds(single) == kinds(of_all) == kinds(error)
    assert single.__cause__ is error
    assert isinstance(of_all.__cause__, MemoryExhaustedError)
    assert (of_all.__cause__.__cause__, error.__traceback__) == (error, None)


# -- code of others


class CancelError(Exception):
    """What a client raises."""


def raise_after(network: torch.nn.Module, calls: int, error: BaseException) -> list[int]:
    """Let a hook raise `error` at each call after so many; return the numbers of the calls."""
    seen: list[int] = []

    def hook(*_: Any) -> None:
        seen.append(len(seen) + 1)
        if len(seen) > calls:
            raise error

    network.encoder.stages[0].register_forward_hook(hook)
    return seen


def by_hook(predictor: Any, error: Exception) -> None:
    raise_after(predictor.network, 12, error)


def by_first_call(predictor: Any, error: Exception) -> None:
    raise_after(predictor.network, 0, error)


def by_network(predictor: Any, error: Exception) -> None:
    def forward(*_: Any) -> None:
        raise error

    predictor.network.forward = forward


def by_method(name: str) -> Callable[[Any, Exception], None]:
    def override(predictor: Any, error: Exception) -> None:
        def method(*_: Any, **__: Any) -> None:
            raise error

        setattr(predictor, name, method)

    return override


def by_weights(predictor: Any, error: Exception) -> None:
    def hook(*_: Any) -> None:
        raise error

    predictor.network._register_load_state_dict_pre_hook(hook)


FOREIGN = {
    "hook": by_hook,
    "hook, first tile": by_first_call,
    "network": by_network,
    "weights": by_weights,
    "on_plan": by_method("on_plan"),
    "on_case": by_method("on_case"),
    "on_progress": by_method("on_progress"),
    **{
        name: by_method(name)
        for name in (
            "predict_logits_from_preprocessed_data",
            "predict_sliding_window_return_logits",
            "_internal_maybe_mirror_and_predict",
            "_internal_predict_sliding_window_return_logits",
            "_internal_get_sliding_window_slicers",
        )
    },
}
ERRORS = {
    "own": lambda: CancelError("stop"),
    "RuntimeError": lambda: RuntimeError("shapes"),
    "ValueError": lambda: ValueError(1),
    "StopIteration": StopIteration,
}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_raise_ends_the_run(model, images, tmp_path, name, keeps):
    error = CancelError("stop", 3)
    cases = [images("small"), images("head"), images("small")]
    predictor = make_predictor(LowMemPredictor, model, (0,), continue_on_error=keeps)
    FOREIGN[name](predictor, error)
    targets = [str(tmp_path / "out" / f"case{number}") for number in range(3)]
    assert raised(lambda: predictor.predict_from_files(cases, targets)) is error
    assert (error.args, error.__cause__, error.__context__) == (("stop", 3), None, None)
    assert not predictor.run_report.failed
    whole = {f"case{number}.nii.gz" for number in range({"hook": 1, "on_case": 1}.get(name, 0))}
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == whole
    assert {case.case + ".nii.gz" for case in predictor.run_report.done} in (set(), {"small.nii.gz"})
    assert not list((tmp_path / "out").glob(".partial*"))


@pytest.mark.parametrize("name", ERRORS)
def test_any_error_reaches_the_caller_as_it_is(model, images, name):
    error = ERRORS[name]()
    predictor = make_predictor(LowMemPredictor, model, (0,))
    raise_after(predictor.network, 1, error)
    before = (type(error), error.args, str(error))
    assert raised(lambda: predictor.predict_from_files([images("small")] * 2, None)) is error
    assert (type(error), error.args, str(error)) == before


def test_the_command_counts_it_as_a_failure(model, images, tmp_path, monkeypatch, capsys):
    """One network call of the first case fails, the other case is there."""
    for name in ("head", "small"):
        (tmp_path / "in").mkdir(exist_ok=True)
        os.link(images(name)[0], tmp_path / "in" / f"{name}_0000.nii.gz")
    real, failed = LowMemPredictor._internal_maybe_mirror_and_predict, []

    def fails_once(self: Any, tile: torch.Tensor) -> torch.Tensor:
        if not tile.is_meta and not failed:  # where memory is only counted there is no case yet
            failed.append(1)
            raise CancelError("once")
        return real(self, tile)

    monkeypatch.setattr(nnUNetPredictor, "_internal_maybe_mirror_and_predict", fails_once)
    flags = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-f", "0", "-device", "cpu"]
    assert cli.predict_entry_point([*map(str, flags), "--disable_progress_bar"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "case head: failed in prediction, CancelError: once" in lines
    assert (
        len([line for line in lines if re.match(r"case small: done in [\d.]+ s, peak [\d.]+ GiB, \d+ label", line)])
        == 1
    )
    assert lines[-1] == f"1 of 2 cases done, 1 failed: {tmp_path / 'out' / 'lowmem_failures.json'}"
    assert not [line for line in lines if "source folder" in line or "process 0" in line or "on_device" in line]
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["small.nii.gz"]
    told = json.loads((tmp_path / "out" / "lowmem_failures.json").read_text())["failed"]
    assert [(case["case"], case["reason"]) for case in told] == [("head", "CancelError: once")]


# -- classes


@pytest.mark.parametrize("ours", [UsageError, ModelError, WriteError, MemoryExhaustedError, CasesFailedError])
@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS, UnicodeDecodeError, json.JSONDecodeError, CancelError])
def test_twins(ours, kind):
    """A message, one class more, and what pickle makes of it; where memory layouts forbid it, ours alone."""
    made = twin(ours, kind)
    error = made('a "message"')
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is made
    assert str(error) == str(again) == 'a "message"'
    assert (made.__name__, made.exit_code) == (ours.__name__, ours.exit_code)
    assert twin(made, kind) is made
    assert issubclass(twin(made, RuntimeError), RuntimeError) or kind is ImportError
    base = {UnicodeDecodeError: ValueError, json.JSONDecodeError: ValueError, CancelError: Exception}.get(kind, kind)
    assert issubclass(made, base) or (ours, kind) == (WriteError, ImportError)


def test_numbers_of_the_system_come_along():
    error = because(ModelError, "no plans", FileNotFoundError(2, "No such file", "plans.json"))
    assert (error.errno, error.filename, str(error)) == (2, "plans.json", "no plans")
