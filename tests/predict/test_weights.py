"""The weights of the folds are the predictor's once they are read, wherever they are kept, and stay what stock has."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec
from images import SUPPORT
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_array, make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.ladder import Recovery
from nnunet_lowmem.budget.planner import all_plans, plan_case
from nnunet_lowmem.errors import ModelError
from nnunet_lowmem.network import tile_memory
from nnunet_lowmem.predict.setup import Setup, checksum
from nnunet_lowmem.predict.weights import FoldWeights
from nnunet_lowmem.types import Place
from nnunet_lowmem.window.tiling import tile_grid

MIB = 2**20
CHECKPOINT = "checkpoint_final.pth"
# large enough to be moved: 221 KiB and more
SPEC = ModelSpec(folds=(0, 1), features=(32, 64), patch_size=(12, 16, 12))

Predictor = nnUNetPredictor


@pytest.fixture(scope="module")
def model(models, images) -> str:
    return models(SPEC, images("small"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A model folder to do with as one likes."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def predicted(images) -> Callable[[Predictor], np.ndarray]:
    image, properties = SimpleITKIO().read_images(images("small"))
    return lambda predictor: predictor.predict_single_npy_array(image, dict(properties))


@pytest.fixture(scope="module")
def expected(model, predicted) -> np.ndarray:
    labels = predicted(make_predictor(Predictor, model, (0, 1)))
    assert len(np.unique(labels)) >= 3
    return labels


# -- the model folder is read once


def removed(predictor: Predictor, folder: Path) -> Predictor:
    shutil.rmtree(folder)
    return predictor


def overwritten(predictor: Predictor, folder: Path) -> Predictor:
    for fold in ("fold_0", "fold_1"):
        checkpoint = torch.load(folder / fold / CHECKPOINT, weights_only=False)
        for value in checkpoint["network_weights"].values():
            value.mul_(-1)
        torch.save(checkpoint, folder / fold / CHECKPOINT)
    return predictor


def truncated(predictor: Predictor, folder: Path) -> Predictor:
    os.truncate(folder / "fold_0" / CHECKPOINT, 1000)
    return predictor


def pickled(predictor: Predictor, folder: Path) -> Predictor:
    content = pickle.dumps(predictor)
    shutil.rmtree(folder)
    return pickle.loads(content)


def copied(predictor: Predictor, folder: Path) -> Predictor:
    predictor = copy.deepcopy(predictor)
    shutil.rmtree(folder)
    return predictor


@pytest.mark.parametrize(
    "happens, on_disk",
    [
        (overwritten, False),
        (truncated, True),
        (pickled, False),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((removed, False), (removed, True), (copied, True))),
    ],
)
def test_what_happens_to_the_folder_later_changes_nothing(happens, on_disk, folder, predicted, expected):
    predictor = make_predictor(LowMemPredictor, str(folder), (0, 1))
    if on_disk:
        predictor.picture().weights.move()
    assert_same_array(expected, predicted(happens(predictor, folder)))


def test_relative_folder_and_another_working_directory(folder, predicted, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    predictor = make_predictor(LowMemPredictor, folder.name, (0, 1))
    monkeypatch.chdir("/")
    assert_same_array(expected, predicted(predictor))
    assert str(Path(folder.name, "fold_1", CHECKPOINT)) in predictor.picture().weights.name(1)


def test_loader_that_decrypts_is_only_there_while_the_model_is_read(folder, predicted, expected, monkeypatch):
    load = torch.load
    for path in folder.glob(f"*/{CHECKPOINT}"):
        path.write_bytes(bytes(byte ^ 90 for byte in path.read_bytes()))

    def decrypting(path: str, map_location: torch.device, weights_only: bool) -> Any:
        assert path.endswith(".pth")  # a text, as from stock
        assert map_location.type == "cpu"
        content = bytes(byte ^ 90 for byte in Path(path).read_bytes())
        return load(io.BytesIO(content), map_location=map_location, weights_only=weights_only)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", decrypting)
        predictor = make_predictor(LowMemPredictor, str(folder), (0, 1))
    assert_same_array(expected, predicted(predictor))


@pytest.mark.slow
def test_another_process_needs_no_folder(folder, predicted, expected, images, tmp_path):
    predictor = make_predictor(LowMemPredictor, str(folder), (0, 1))
    predictor.picture().weights.move()
    (tmp_path / "predictor").write_bytes(pickle.dumps(predictor))
    shutil.rmtree(folder)
    program = """
import pickle, numpy, sys
with open(sys.argv[1], "rb") as file:
    predictor = pickle.load(file)
numpy.save(sys.argv[2], predictor.predict_from_files_sequential([[sys.argv[3]]], None)[0])
"""
    files = [str(tmp_path / "predictor"), str(tmp_path / "labels.npy"), images("small")[0]]
    subprocess.run([sys.executable, "-c", program, *files], check=True, capture_output=True, timeout=120)
    assert_same_array(expected, np.load(files[1]))


def test_fold_that_cannot_be_read_leaves_the_predictor_as_it_was(folder, model, predicted, expected):
    predictor = make_predictor(LowMemPredictor, model, (0, 1))
    os.truncate(folder / "fold_1" / CHECKPOINT, 1000)
    with pytest.raises(ModelError, match="fold_1"):
        predictor.initialize_from_trained_model_folder(str(folder), (0, 1))
    assert_same_array(expected, predicted(predictor))


# -- a plain list of dicts of tensors


def biased(parameters: Any) -> None:
    """Edit in place: another class wins here and there."""
    for fold in parameters:
        for name, value in fold.items():
            if "seg_layers" in name and name.endswith("bias"):
                value[0] -= 3


def edited(predictor: Predictor, other: Predictor) -> None:
    biased(predictor.list_of_parameters)


def appended(predictor: Predictor, other: Predictor) -> None:
    predictor.list_of_parameters.append(other.list_of_parameters[0])


def added(predictor: Predictor, other: Predictor) -> None:
    predictor.list_of_parameters = predictor.list_of_parameters + other.list_of_parameters


def extended(predictor: Predictor, other: Predictor) -> None:
    predictor.list_of_parameters.extend(other.list_of_parameters)
    predictor.list_of_parameters.insert(0, predictor.list_of_parameters[1])


def popped(predictor: Predictor, other: Predictor) -> None:
    predictor.list_of_parameters.pop(0)


def assigned(predictor: Predictor, other: Predictor) -> None:
    predictor.list_of_parameters[1] = other.list_of_parameters[0]
    predictor.list_of_parameters[0] = {**predictor.list_of_parameters[0]}


def assigned_key(predictor: Predictor, other: Predictor) -> None:
    for name, value in predictor.list_of_parameters[1].items():
        predictor.list_of_parameters[1][name] = value * 0.9


def deepcopied(predictor: Predictor, other: Predictor) -> None:
    before = predictor.list_of_parameters
    predictor.list_of_parameters = copy.deepcopy(before)
    biased(before)
    biased(predictor.list_of_parameters)
    biased(predictor.list_of_parameters)


def through_numpy(predictor: Predictor, other: Predictor) -> None:
    for fold in predictor.list_of_parameters:
        for value in fold.values():
            array = value.numpy()
            array *= 0.9


def own_tuple(predictor: Predictor, other: Predictor) -> None:
    state = {name: value * 0.95 for name, value in predictor.list_of_parameters[0].items()}
    predictor.list_of_parameters = (state, other.network.state_dict())


def averaged(predictor: Predictor, other: Predictor) -> None:
    first, second = predictor.list_of_parameters
    predictor.list_of_parameters = [{name: (first[name] + second[name]) / 2 for name in first}]


CHANGES = [edited, appended, added, extended, popped, assigned, assigned_key, deepcopied, through_numpy, own_tuple]


@pytest.fixture(scope="module")
def changed(model, predicted) -> Callable[[Any], np.ndarray]:
    """What stock makes of changed weights; made once for each change."""
    made: dict[str, np.ndarray] = {}

    def labels(change: Any) -> np.ndarray:
        if change.__name__ not in made:
            stock, other = (make_predictor(Predictor, model, folds) for folds in ((0, 1), (1,)))
            change(stock, other)
            made[change.__name__] = predicted(stock)
        return made[change.__name__]

    return labels


@pytest.mark.parametrize(
    "change, on_disk",
    [
        (edited, False),
        (edited, True),
        (appended, False),
        *(pytest.param(change, False, marks=pytest.mark.slow) for change in (*CHANGES[2:], averaged)),
        *(pytest.param(change, True, marks=pytest.mark.slow) for change in (appended, through_numpy)),
    ],
)
def test_changed_weights_give_stocks_labels(change, on_disk, model, predicted, changed, expected):
    """Between two predictions, with the weights in RAM and moved to a file."""
    predictor, other = (make_predictor(LowMemPredictor, model, folds) for folds in ((0, 1), (1,)))
    if on_disk:
        assert_same_array(expected, predicted(predictor))
        predictor.picture().weights.move()
        other.picture().weights.move()
        assert predictor.picture().weights.movable_bytes == 0
    change(predictor, other)
    assert_same_array(changed(change), predicted(predictor))


def test_changes_are_told_apart_by_done_records(model, predicted):
    """By the weights themselves; where they are kept and who copied them does not matter."""
    predictor, other = (make_predictor(LowMemPredictor, model, folds) for folds in ((0, 1), (1,)))
    size = predictor.picture().weights.movable_bytes
    before = checksum(predictor.picture(), False)
    assert predictor.picture().weights.movable_bytes == size > 0
    predictor.picture().weights.move()
    predictor = pickle.loads(pickle.dumps(predictor))
    assert checksum(predictor.picture(), False) == before
    predictor.list_of_parameters = [{name: value.clone() for name, value in fold.items()}
                                    for fold in predictor.list_of_parameters]  # fmt: skip
    assert checksum(predictor.picture(), False) == before
    seen = {before}
    for change in CHANGES[:7]:
        changing = copy.deepcopy(predictor)
        change(changing, other)
        seen.add(checksum(changing.picture(), False))
    assert len(seen) == 6  # `added` and `appended` make the same, and `assigned` has one fold twice
    predictor.list_of_parameters = None
    assert checksum(predictor.picture(), False) not in seen


def test_weights_are_named_by_their_checkpoint_as_long_as_they_come_from_there(model):
    predictor = make_predictor(LowMemPredictor, model, (0, 1))
    assert predictor.picture().weights.name(1) == str(Path(model, "fold_1", CHECKPOINT))
    predictor.list_of_parameters.append(predictor.list_of_parameters[0])
    assert predictor.picture().weights.name(1) == "entry 1 of list_of_parameters"


# -- in a file


def tensors() -> dict[str, Any]:
    shared = torch.randn(300, 400)
    return {
        "shared": shared,
        "again": shared,
        "part": shared[100:],
        "parameter": torch.nn.Parameter(torch.randn(200, 300)),
        "half": torch.randn(400, 500).half(),
        "small": torch.randn(3),
        "number": 5,
    }


def deleted_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("(deleted)")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_moved_tensors_are_the_same_objects_and_the_file_goes_with_them(tmp_path):
    held = tensors()
    values, objects = copy.deepcopy(held), dict(held)
    gc.collect()
    before, opened = deleted_files(), descriptors()
    weights = FoldWeights([held], (), tmp_path)
    size = weights.movable_bytes
    assert size == 4 * 300 * 400 + 4 * 200 * 300 + 2 * 400 * 500
    assert weights.move() == size
    assert weights.move() == weights.movable_bytes == 0
    assert weights.are_on_disk
    assert len(deleted_files()) == len(before) + 1
    assert list(tmp_path.iterdir()) == []
    assert all(held[name] is value for name, value in objects.items())
    assert all(torch.equal(held[name], values[name]) for name in held if name != "number")
    assert held["parameter"].requires_grad
    held["part"][0] = 7  # what shares memory goes on sharing it
    assert (held["shared"][100] == 7).all()
    other = copy.deepcopy(held)
    other["part"][1] = 8
    assert (other["shared"][101] == 8).all()
    assert not (held["shared"][101] == 8).any()
    assert FoldWeights([other], (), tmp_path).movable_bytes == size  # in RAM again
    other = pickle.loads(pickle.dumps(held))
    assert torch.equal(other["part"], held["part"])
    assert FoldWeights([other], (), tmp_path).movable_bytes > 0
    del objects, other
    held.clear()
    assert deleted_files() == before
    assert descriptors() == opened


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_file_goes_with_the_predictor(model, predicted):
    """At once, not at the next garbage collection."""
    gc.collect()
    before = deleted_files()
    predictor = make_predictor(LowMemPredictor, model)
    predicted(predictor)
    predictor.picture().weights.move()
    predicted(predictor)
    assert len(deleted_files()) == len(before) + 1
    assert pickle.loads(pickle.dumps(predictor)).list_of_parameters
    gc.disable()
    try:
        predictor.list_of_parameters = copy.deepcopy(predictor.list_of_parameters)
        assert deleted_files() == before
        predictor.picture().weights.move()
        predicted(predictor)
        del predictor
        assert deleted_files() == before
    finally:
        gc.enable()


def test_memory_that_others_use_stays_where_it_is(tmp_path):
    """Else an edit through a view, an array or the network would be lost without a word."""
    linear = torch.nn.Linear(400, 400)
    held = {**tensors(), **linear.state_dict(), "array": torch.from_numpy(np.zeros((400, 400)))}
    del held["again"], held["part"], held["shared"]
    view, array = held["parameter"].data.view(-1), held["half"].numpy()
    weights = FoldWeights([held], (), tmp_path)
    assert weights.movable_bytes == weights.move() == 0
    view[:], array[:], linear.weight.data[:] = 1, 2, 3
    assert [float(held[name].detach().mean()) for name in ("parameter", "half", "weight")] == [1, 2, 3]


@pytest.mark.parametrize(
    "free, room, in_ram",
    [(2**40, 2**40, 2), (0, 2**40, 0), (0, 0, 2), ("fold", 2**40, 1), (0, "fold", 1)],
)
def test_a_quarter_of_the_free_ram_is_for_weights(free, room, in_ram, model, monkeypatch, predicted, expected):
    """What is beyond goes to disk as it is read, as long as there is room; none is offered where that is in RAM."""
    fold = make_predictor(LowMemPredictor, model).picture().weights.movable_bytes
    free, room = 4 * fold if free == "fold" else free, fold if room == "fold" else room
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_lowmem.budget.machine.ram_limit", lambda _: (free + 1, 1))
        patch.setattr("nnunet_lowmem.predict.weights.spill_bytes", lambda _: room)
        predictor = make_predictor(LowMemPredictor, model, (0, 1))
    assert predictor.picture().weights.movable_bytes == in_ram * fold
    assert_same_array(expected, predicted(predictor))


def test_plan_says_where_the_weights_are(model, images, monkeypatch):
    """Without room for all, the weights go to a file and stay there; the labels are the same."""
    monkeypatch.setattr(tile_memory, "_reset_peak", lambda: None)  # as expected from tensors: the same each time
    monkeypatch.setattr(tile_memory, "_sampled", lambda run: (run(), tile_memory.Taken(0)))
    free, plans = [], []
    roomy = make_predictor(LowMemPredictor, model, (0, 1), on_plan=free.append)
    first = roomy.predict_from_files_sequential([images("small")], None)[0]
    assert free[0].placement.weights is Place.RAM
    kept = {a.name: a.size_bytes for a in free[0].allocations}["weights of all folds"]
    assert kept == roomy.picture().weights.movable_bytes
    predictor = make_predictor(LowMemPredictor, model, (0, 1), on_plan=plans.append)
    real = Setup.budget

    def tight(setup: Setup, with_children: bool) -> Budget:
        """A budget in which nothing but the weights has to leave."""
        budget = real(setup, with_children)
        planned = free[0].projected_bytes(Place.RAM) - free[0].budget.reserved_ram_bytes
        return Budget(budget.reserved_ram_bytes + planned - 1, None, budget.reserved_ram_bytes, 0, budget.disk_bytes)

    monkeypatch.setattr(Setup, "budget", tight)
    second = predictor.predict_from_files_sequential([images("small")] * 2, None)
    assert [plan.placement.weights for plan in plans] == [Place.DISK, Place.DISK]
    assert "on disk: weights" in plans[1].placement.in_words()
    assert predictor.picture().weights.movable_bytes == 0
    for labels in second:
        assert_same_array(first, labels)


def test_weights_are_the_first_step_where_memory_is_gone():
    facts = ModelFacts(4, 1, 2, 0, MIB, 1, kept_bytes=100 * MIB)
    case = CaseFacts("case", tile_grid((40, 30, 32), (16, 16, 16), 0.5), (40, 30, 32), (40, 30, 32), True, 0, 0, MIB)
    plan, plans = plan_case(facts, case, Budget()), all_plans(facts, case, Budget())
    seen = []
    recovery = Recovery(plan, plans, lambda following: seen.append(following.placement))
    failures: Iterator[bool] = iter([True, True])

    def operation() -> int:
        if next(failures, False):
            raise MemoryError("no")
        return 1

    assert recovery.run(operation) == 1
    assert [chosen.weights for chosen in seen] == [Place.DISK, Place.DISK]
    assert seen[0].window is Place.RAM
    assert all(one != two for one, two in pairwise(seen))
    assert "on disk: weights" in recovery.steps[0]


# -- the budget


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_many_heavy_folds_are_read_and_used_within_a_small_budget(models, images, tmp_path):
    """Measured while they are read, and under the kernel's limit for what follows."""
    spec = ModelSpec(folds=(0,), features=(128, 512), patch_size=(12, 16, 12))
    model = Path(models(spec, images("small")))
    size = (model / "fold_0" / CHECKPOINT).stat().st_size
    assert size > 16 * MIB
    for fold in range(1, 5):
        (tmp_path / "model" / f"fold_{fold}").mkdir(parents=True)
        os.link(model / "fold_0" / CHECKPOINT, tmp_path / "model" / f"fold_{fold}" / CHECKPOINT)
    shutil.copytree(model, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "images").mkdir()
    shutil.copy(images("small")[0], tmp_path / "images")
    free = in_child(tmp_path, "free")
    assert free["cases"][0]["placement"]["weights"] == "RAM"
    assert free["cases"][0]["projected"] > free["least"] + 4 * size
    tight = in_child(tmp_path, "tight", max_ram=free["least"] + 12 * MIB, limit=True)
    (case,) = tight["cases"]
    assert tight["error"] is None
    assert tight["left"] == []
    assert tight["outputs"] == free["outputs"]
    assert case["placement"]["weights"] == "disk"
    assert case["measured"] <= case["projected"] <= case["budget"]
    assert case["projected"] <= 1.25 * case["measured"] + 64 * MIB
    assert tight["loading"] <= free["least"] < free["loading"]


def in_child(root: Path, name: str, **options: Any) -> dict[str, Any]:
    (root / name / "tmp").mkdir(parents=True)
    given = {"model": root / "model", "images": root / "images", "output": root / name / "out"}
    given = {key: str(value) for key, value in {**given, "tmp_dir": root / name / "tmp"}.items()}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "projection_child.py"),
         json.dumps({**given, "folds": list(range(5)), **options})],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])
