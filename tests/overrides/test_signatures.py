"""Arguments that only the installed nnU-Net knows: newer versions and forks have some, and insert them anywhere."""

from __future__ import annotations

import inspect
import logging
import textwrap

import pytest
import torch
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from oracle import assert_same_array, assert_same_return, make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import ModelError, UsageError

CPU = torch.device("cpu")
ARRAY = ("predict_single_npy_array", "segmentation_previous_stage: np.ndarray = None,")
LOADING = ("initialize_from_trained_model_folder", "checkpoint_name: str")


@pytest.fixture
def forked(monkeypatch):
    """Give a method of nnU-Net a parameter before one that it has, as if its file said so."""

    def change(name: str, before: str, parameter: str, beginning: str) -> None:
        source = textwrap.dedent(inspect.getsource(vars(nnUNetPredictor)[name]))
        changed = source.replace(before, f"{parameter}, {before}", 1)
        assert changed != source
        head, body = changed.split(":\n", 1)
        code = compile(f"{head}:\n    {beginning}\n{body}", predict_from_raw_data.__file__, "exec")
        namespace = {}
        exec(code, vars(predict_from_raw_data), namespace)
        monkeypatch.setattr(nnUNetPredictor, name, namespace[name])

    return change


@pytest.fixture
def model(images, models) -> str:
    return models(ModelSpec(patch_size=(10, 12, 12)), images("small"))


@pytest.fixture
def array(images):
    return SimpleITKIO().read_images(images("small"))


def test_what_says_nothing_new_goes_our_way_and_else_nnunets(forked, model, array, caplog):
    forked(*ARRAY, "per_fold: bool = False", "if per_fold: return 'of the fork'")
    stock, ours = (make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor))
    image, properties = array
    with caplog.at_level(logging.WARNING):
        for arguments, keywords in (((), {}), ((False, None, None), {}), ((), {"per_fold": False})):
            one, other = (p.predict_single_npy_array(image, properties, *arguments, **keywords) for p in (stock, ours))
            assert_same_array(one, other)
        assert not caplog.records
        assert ours.predict_single_npy_array(image, properties, per_fold=True) == "of the fork"
        assert ours.predict_single_npy_array(image, properties, True) == "of the fork"
    assert "predict_single_npy_array(per_fold=True): known to the installed nnU-Net alone" in caplog.text


def test_a_fork_that_adds_folds_up_in_its_own_way_is_followed(monkeypatch, images, models, array, caplog):
    """As nnunetv2-neuropoly 2.6.2 does: the first fold counts twice."""
    source = textwrap.dedent(inspect.getsource(nnUNetPredictor.predict_logits_from_preprocessed_data))
    changed = source.replace("    else:\n            prediction +=", "    if True:\n            prediction +=")
    assert changed != source
    namespace = {}
    exec(compile(changed, predict_from_raw_data.__file__, "exec"), vars(predict_from_raw_data), namespace)
    model = models(ModelSpec(patch_size=(10, 12, 12), folds=(0, 1)), images("small"))
    monkeypatch.setattr(nnUNetPredictor, *namespace.popitem())
    stock, ours = (
        make_predictor(cls, model, (0, 1)).predict_single_npy_array(*array, save_or_return_probabilities=True)
        for cls in (nnUNetPredictor, LowMemPredictor)
    )
    assert_same_return([stock], [ours], probabilities=True)
    assert "predict_logits_from_preprocessed_data: not nnU-Net's own; it makes the logits" in caplog.text


@pytest.mark.parametrize("call", [lambda p: p.predict_from_files([], None, nonsense=1), lambda p: type(p)(nonsense=1)])
@pytest.mark.parametrize("cls", [nnUNetPredictor, LowMemPredictor])
def test_what_neither_knows_is_an_error(cls, call, model):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'"):
        call(make_predictor(cls, model))


def test_constructor_takes_what_the_installed_one_takes(forked):
    forked("__init__", "device: torch.device", "patience: int = 3", "self.patience = patience")
    for cls in (nnUNetPredictor, LowMemPredictor):
        assert cls(device=CPU).patience == 3
        assert cls(0.5, True, False, True, 7, CPU).patience == 7
        assert cls(patience=5, device=CPU, use_mirroring=False).use_mirroring is False
    assert LowMemPredictor(patience=5, device=CPU, max_ram="4G").max_ram == "4G"


def test_loading_that_only_nnunet_knows_is_for_trusted_models(forked, model):
    forked(*LOADING, "strict: bool = True", "self.was_strict = strict")
    with pytest.raises(UsageError, match=r"initialize_from_trained_model_folder\(strict=False\).*trust_model=True"):
        LowMemPredictor(device=CPU).initialize_from_trained_model_folder(model, (0,), strict=False)
    trusting = LowMemPredictor(device=CPU, trust_model=True)
    trusting.initialize_from_trained_model_folder(model, (0,), False)
    assert trusting.was_strict is False
    untouched = LowMemPredictor(device=CPU)
    untouched.initialize_from_trained_model_folder(model, (0,), True)
    assert not hasattr(untouched, "was_strict")


def test_a_program_may_bring_the_trainer(model, monkeypatch):
    """As the spinal cord toolbox does with its fork of nnU-Net: the checkpoint names one that is not installed."""

    class Brought(nnUNetTrainer):
        pass

    load = torch.load
    renamed = {"trainer_name": "NotInstalled"}
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **kwargs) | renamed)
    predictor = LowMemPredictor(device=CPU)
    with pytest.raises(ModelError, match="NotInstalled"):
        predictor.initialize_from_trained_model_folder(model, (0,))
    predictor.initialize_from_trained_model_folder(model, (0,), trainer_class=Brought)
    assert predictor.trainer_name == "NotInstalled"
