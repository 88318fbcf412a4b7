"""The validation at the end of training writes what stock's writes; the trainers that do it are stock's in all else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.configuration import default_num_processes
from tiny_training import (
    CASES,
    NAME,
    TRAINERS,
    VALIDATED,
    TinyTraining,
    assert_same_next_stages,
    assert_same_validation,
    moved,
)

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.predict import validation
from nnunet_lowmem.predict.cases import Failing
from nnunet_lowmem.predict.jobs import Files, Job, Stored
from nnunet_lowmem.predict.loading import load
from nnunet_lowmem.training import LowMemValidation

JOBS = [Job("case", None, Stored("case"))]


class Base:
    """What a trainer is to the mixin."""

    def __init__(self, is_ddp: bool) -> None:
        self.is_ddp, self.log, self.validated = is_ddp, [], []
        self.label_manager = SimpleNamespace()

    def print_to_log_file(self, text: str) -> None:
        self.log.append(text)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self.validated.append(save_probabilities)


class BaseLowMem(LowMemValidation, Base):
    """Nothing of its own."""


class Changed(LowMemValidation, Base):
    num_epochs = 5


class Derived(BaseLowMem):
    pass


def test_class_that_adds_nothing_has_the_name_of_its_trainer():
    assert [cls.__name__ for cls in (BaseLowMem, Changed, Derived)] == ["Base", "Changed", "Derived"]


def test_what_stock_has_to_do_is_left_to_it_and_told():
    trainer = BaseLowMem(is_ddp=True)
    trainer.perform_actual_validation(True)
    assert trainer.validated == [True]
    assert "leaves this validation to nnU-Net" in trainer.log[0]
    assert "several GPUs" in trainer.log[0]
    trainer = BaseLowMem(is_ddp=False)
    trainer.label_manager = type("OwnLabels", (), {"has_regions": False})()
    trainer.perform_actual_validation()
    assert trainer.validated == [False]
    assert "label manager OwnLabels" in trainer.log[0]


def test_trainers_are_found_where_nnunet_looks(monkeypatch):
    find_objects = pytest.importorskip("nnunetv2.utilities.find_objects")  # new in nnU-Net 2.8
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS[1]))
    for stock in ("nnUNetTrainer", "nnUNetTrainer_5epochs"):
        found = find_objects.recursive_find_trainer_class_by_name(stock + "LowMem")
        assert found.__name__ == stock
        assert issubclass(found, LowMemValidation)
        assert issubclass(found, find_objects.recursive_find_trainer_class_by_name(stock))
    with pytest.raises(RuntimeError, match="nnUNetTrainerNonsense"):
        find_objects.recursive_find_trainer_class_by_name("nnUNetTrainerNonsenseLowMem")


@pytest.fixture
def eleven_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(11)
    yield
    torch.set_num_threads(before)


def test_network_runs_on_as_many_threads_as_the_trainer_has(images, models, eleven_threads):
    """Stock sets a limit for predictions and none for validations; the output of the network depends on it."""
    predictor = LowMemPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(models(ModelSpec(), images("head")), (0,))
    case = load(Job("case", None, Files(images("head"))), predictor.picture(), None)
    seen = set()

    def note(network: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if not inputs[0].is_meta:  # where memory is only counted
            seen.add(torch.get_num_threads())

    predictor.network.register_forward_pre_hook(note)
    predictor._predict_unrecorded(JOBS, False, Failing(keep_going=False), lambda *_: case)
    assert seen == {min(11, default_num_processes)} != {11}, "run this with nnUNet_def_n_proc below 11"
    seen.clear()
    switched = []
    trainer = SimpleNamespace(
        network=predictor.network,
        plans_manager=predictor.plans_manager,
        configuration_manager=predictor.configuration_manager,
        dataset_json=predictor.dataset_json,
        inference_allowed_mirroring_axes=None,
        set_deep_supervision_enabled=switched.append,
    )
    with validation.prepared(trainer, predictor):
        assert switched == [False]
        predictor._predict_unrecorded(JOBS, False, Failing(keep_going=False), lambda *_: case)
    assert seen == {11}
    assert switched == [False, True]


# -- one preprocessed data set; the low resolution is trained on and validates all cases, the cascade one fold

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> TinyTraining:
    pytest.importorskip("nnunetv2.utilities.find_objects")  # trainers from outside are new in nnU-Net 2.8
    return TinyTraining(tmp_path_factory.mktemp("training")).prepare()


@pytest.fixture(scope="module")
def low(training) -> SimpleNamespace:
    log = training.train("3d_lowres", "all", "QuickTrainerLowMem")
    fold = training.results("3d_lowres") / "fold_all"
    ours, ours_next = moved(fold / "validation"), moved(fold.parent / "predicted_next_stage")
    training.train("3d_lowres", "all", "QuickTrainer", "--val")
    stock_next = Path(shutil.copytree(fold.parent / "predicted_next_stage", fold / "next_of_stock"))
    return SimpleNamespace(log=log, fold=fold, ours=ours, ours_next=ours_next, stock_next=stock_next)


@slow
def test_same_files_and_metrics(low):
    assert "validates: one case after the other in this process" in low.log
    assert "Mean Validation Dice" in low.log
    assert_same_validation(low.ours, low.fold / "validation", CASES)


@slow
def test_same_labels_for_all_next_stages(low):
    assert_same_next_stages(low.ours_next, low.stock_next, CASES)


@slow
def test_checkpoint_and_folder_are_those_of_the_base(training, low):
    checkpoint = torch.load(low.fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert checkpoint["trainer_name"] == "QuickTrainer"
    assert [path.name for path in (training.root / "results" / NAME).iterdir()] == [low.fold.parent.name]


@slow
def test_probabilities_of_a_finished_fold(training, low):
    training.train("3d_lowres", "0", "QuickTrainer")
    fold = training.results("3d_lowres") / "fold_0"
    shutil.rmtree(fold / "validation")
    training.train("3d_lowres", "0", "QuickTrainerLowMem", "--val", "--npz")
    ours = moved(fold / "validation")
    training.train("3d_lowres", "0", "QuickTrainer", "--val", "--npz")
    assert_same_validation(ours, fold / "validation", VALIDATED)
    for case in VALIDATED:
        actual, expected = (np.load(f / f"{case}.npz")["probabilities"] for f in (ours, fold / "validation"))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2.0**-21)


@slow
def test_cascade(training, low):
    training.train("3d_cascade_fullres", "0", "QuickTrainerLowMem")
    fold = training.results("3d_cascade_fullres") / "fold_0"
    ours = moved(fold / "validation")
    training.train("3d_cascade_fullres", "0", "QuickTrainer", "--val")
    assert_same_validation(ours, fold / "validation", VALIDATED)


@slow
def test_budget_of_the_environment_binds(training, low):
    words = ["1", "3d_lowres", "all", "-tr", "QuickTrainerLowMem", "-device", "cpu", "--val"]
    before = json.loads((low.fold / "validation" / "summary.json").read_text())
    done = training.run("nnUNetv2_train", *words, nnUNet_lowmem_max_ram="100M")
    assert done.returncode != 0
    assert "5 of 5 cases failed" in done.stderr
    assert "does not fit: RAM projected" in done.stderr
    assert json.loads((low.fold / "validation" / "summary.json").read_text()) == before
