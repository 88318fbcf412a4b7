"""Small things of nnU-Net's interface that programs lean on, as stock has them."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import INSTALLED, assert_same_object, make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import case_plan
from nnunet_lowmem.budget.planner import all_plans, plan_case
from nnunet_lowmem.predict.warming import warm_up
from nnunet_lowmem.types import Place


def both() -> tuple[type[nnUNetPredictor], ...]:
    """Stock's and ours; a module that held stock's class would be named by the test of what cannot be switched."""
    return nnUNetPredictor, LowMemPredictor


@pytest.fixture(scope="module")
def model(models, images) -> str:
    return models(ModelSpec(folds=(0, 1), mirror_axes=(2,)), images("small"))


@pytest.fixture(scope="module")
def file(images) -> str:
    return images("small")[0]


@pytest.fixture(scope="module")
def array(file) -> tuple[np.ndarray, dict]:
    return SimpleITKIO().read_images([file])


def single(p: Any, image: np.ndarray, properties: dict, *more: Any) -> Any:
    return p.predict_single_npy_array(image, dict(properties), *more)


def outcome(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return labels without their probabilities, which may differ in the last bits, or the class of the error."""
    try:
        result = run(*arguments)
    except Exception as error:
        return type(error)
    return result[0] if isinstance(result, tuple) else result


def assert_same(stock: Any, ours: Any) -> None:
    assert_same_object(stock, ours, "result")


# -- the state of torch


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device("cpu")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "double": lambda: default_type(torch.float64),
    "half": lambda: default_type(torch.float16),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize(("name", "probabilities"), [*((name, False) for name in STATES), ("double", True)])
def test_state_of_torch(model, array, name, probabilities):
    warm_up.cache_clear()
    predictors = [make_predictor(cls, model, (0, 1)) for cls in both()]
    with STATES[name]():
        stock, ours = (outcome(single, p, *array, None, None, probabilities) for p in predictors)
    assert_same(stock, ours)


@pytest.mark.parametrize("fast", [False, True])
def test_random_numbers_after_a_prediction(model, array, fast):
    """The first prediction of a process loads kernels, which is nobody's business."""

    def numbers(cls: type, **options: Any) -> list[float]:
        warm_up.cache_clear()
        torch.manual_seed(1)
        np.random.seed(1)  # the state that programs set
        random.seed(1)
        single(make_predictor(cls, model, (0, 1), **options), *array)
        return [float(torch.rand(1)), float(np.random.rand()), random.random()]

    assert numbers(nnUNetPredictor) == numbers(LowMemPredictor, fast=fast)


# -- what is passed in

TENSORS = {
    "requires grad": lambda: torch.ones(1, 20, 24, 28, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(1, 20, 24, 28)),
    "double": lambda: torch.ones(1, 20, 24, 28, dtype=torch.float64),
    "permuted": lambda: torch.arange(28 * 24 * 20.0).reshape(1, 28, 24, 20).permute(0, 3, 2, 1),
    "subclass": lambda: torch.ones(1, 20, 24, 28).as_subclass(type("Mine", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(model, name):
    stock, ours = (
        outcome(make_predictor(cls, model).predict_sliding_window_return_logits, TENSORS[name]()) for cls in both()
    )
    assert not getattr(ours, "requires_grad", False)
    assert_same(np.asarray(stock), np.asarray(ours))


def read_only(image: np.ndarray) -> np.ndarray:
    image = image.copy()
    image.flags.writeable = False
    return image


IMAGES = {
    "double": lambda a: a.astype(np.float64),
    "big endian": lambda a: a.astype(">i2"),
    "Fortran's order": np.asfortranarray,
    "backwards": lambda a: a[:, ::-1, :, ::-1],
    "read-only": read_only,
    "masked": lambda a: np.ma.masked_less(a, 60),
    "bool": lambda a: a > 60,
}


@pytest.mark.parametrize("name", IMAGES)
def test_image(model, array, name):
    image = IMAGES[name](array[0])
    before = np.array(image)
    stock, ours = (single(make_predictor(cls, model), image, array[1]) for cls in both())
    assert_same(stock, ours)
    assert (type(ours), ours.flags.writeable) == (np.ndarray, True)
    assert np.array_equal(before, np.array(image))


def test_properties_of_the_caller(model, array):
    """Stock's workers get copies; in the main process stock puts in what export reads."""
    found: list[dict[str, Any]] = []
    for cls in both():
        found.append({"spacing": (5.0, 5.0, 5.0), "mine": [1]})
        make_predictor(cls, model).predict_single_npy_array(array[0], found[-1])
    properties = {"spacing": (5.0, 5.0, 5.0), "mine": [1]}
    make_predictor(LowMemPredictor, model).predict_from_list_of_npy_arrays([array[0]] * 2, None, [properties] * 2, None)
    assert properties == {"spacing": (5.0, 5.0, 5.0), "mine": [1]}
    assert_same(*({name: [*map(list, map(np.atleast_1d, value))] for name, value in one.items()} for one in found))


AXES = {
    "False": False,
    "True": True,
    "0": 0,
    "none": (),
    "None": None,
    "numpy's": np.array([0, 2]),
    "set": {1},
    "(3,)": (3,),
}


@pytest.mark.parametrize("mirrors", [True, False])
@pytest.mark.parametrize("name", AXES)
def test_mirroring_axes(model, file, name, mirrors):
    def run(cls: type) -> Any:
        predictor = make_predictor(cls, model)
        predictor.allowed_mirroring_axes, predictor.use_mirroring = AXES[name], mirrors
        results = outcome(predictor.predict_from_files_sequential, [[file]], None)
        return results[0] if isinstance(results, list) else results

    assert_same(*map(run, both()))


def test_checkpoint_without_mirroring(models, images, array, tmp_path):
    folder = Path(models(ModelSpec(), images("small")))
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["inference_allowed_mirroring_axes"] = False
    other = tmp_path / "fold_0" / "checkpoint_final.pth"
    other.parent.mkdir()
    torch.save(checkpoint, other)
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    stock, ours = (make_predictor(cls, str(tmp_path), use_mirroring=False) for cls in both())
    assert stock.allowed_mirroring_axes is ours.allowed_mirroring_axes is False
    assert_same(single(stock, *array), single(ours, *array))


@pytest.mark.skipif(INSTALLED < (2, 6), reason="nnU-Net 2.5 takes text only")
def test_files_and_folders_as_paths(model, file, tmp_path):
    """Stock takes nothing for outputs but a folder given as text, and a list."""
    for target in (None, tmp_path / "out", (str(tmp_path / "case"),)):
        results = [
            make_predictor(cls, Path(model)).predict_from_files_sequential([[Path(file)]], target) for cls in both()
        ]
        assert_same(*results)
        assert len(results[0]) == 1
        assert not list(tmp_path.iterdir())


# -- what comes out


@pytest.mark.parametrize("probabilities", [False, True])
def test_results_are_plain_arrays_wherever_they_lie(model, array, monkeypatch, probabilities):
    """Everything that can be on the disk is there."""
    plans: list[Any] = []
    spilling = make_predictor(LowMemPredictor, model, on_plan=plans.append)

    def plan(*facts: Any) -> Any:
        return next((p for p in all_plans(*facts) if p.placement.label_map is Place.DISK), None) or plan_case(*facts)

    monkeypatch.setattr(case_plan, "plan_case", plan)
    result = single(spilling, *array, None, None, probabilities)
    expected = single(make_predictor(nnUNetPredictor, model), *array, None, None, probabilities)
    assert plans[-1].placement.label_map is Place.DISK
    labels = result[0] if probabilities else result
    assert [type(part) for part in (result if probabilities else [result])] == [np.ndarray] * (1 + probabilities)
    assert_same(expected[0] if probabilities else expected, labels)
    assert_same(pickle.loads(pickle.dumps(labels)), labels)
    labels[...] = 7
    assert labels.max() == 7


# -- the object


def attributes(p: Any) -> None:
    """Set what stock's `__init__` sets."""
    p.verbose = p.verbose_preprocessing = p.allow_tqdm = p.perform_everything_on_device = False
    p.tile_step_size, p.use_gaussian, p.use_mirroring, p.device = 0.5, True, True, torch.device("cpu")


def without_super(cls: type) -> Any:
    class Own(cls):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            attributes(self)

    return Own()


def without_init(cls: type) -> Any:
    made = cls.__new__(cls)
    attributes(made)
    return made


def with_own_before(cls: type) -> Any:
    class Own(cls):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            self.verbose, self.fast, self.mine = True, True, 1
            super().__init__(device=torch.device("cpu"), allow_tqdm=False)

    return Own()


def copied(cls: type) -> Any:
    return copy.deepcopy(cls(device=torch.device("cpu"), allow_tqdm=False))


@pytest.mark.parametrize("make", [without_super, without_init, with_own_before, copied])
def test_object(model, array, file, tmp_path, make):
    """Every way to predict, and once more from copies."""
    results = []
    for cls in both():
        predictor, target = make(cls), tmp_path / cls.__name__
        predictor.initialize_from_trained_model_folder(model, (0, 1))
        target.mkdir()
        predictor.predict_from_files_sequential([[file]], [str(target / "case")])
        labels = single(predictor, *array)
        again = pickle.loads(pickle.dumps(predictor)) if "<locals>" not in type(predictor).__qualname__ else predictor
        for other in (copy.copy(predictor), copy.deepcopy(predictor), again):
            assert_same(labels, single(other, *array))
        logits = np.asarray(predictor.predict_sliding_window_return_logits(torch.ones(1, 20, 24, 28)))
        results.append([labels, logits, (target / "case.nii.gz").read_bytes()])
    assert_same(*results)


def test_files_without_init(model, file):
    stock, ours = (without_super(cls) for cls in both())
    for p in (stock, ours):
        p.initialize_from_trained_model_folder(model, (0,))
    assert_same(stock.predict_from_files_sequential([[file]], None), ours.predict_from_files([[file]], None))
