"""`LowMemPredictor` in the place of `nnUNetPredictor`: same parameters, same return values, same bits."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec, architecture
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from oracle import (
    ARGS,
    assert_close_probabilities,
    assert_same_array,
    assert_same_folder,
    assert_same_object,
    assert_same_return,
    make_predictor,
    predict_stock,
)

import nnunet_lowmem
from nnunet_lowmem import LowMemPredictor

METHODS = [
    "__init__",
    "initialize_from_trained_model_folder",
    "manual_initialization",
    "predict_from_files",
    "predict_from_files_sequential",
    "predict_from_data_iterator",
    "predict_from_list_of_npy_arrays",
    "predict_single_npy_array",
    "get_data_iterator_from_raw_npy_data",
    "predict_logits_from_preprocessed_data",
    "predict_sliding_window_return_logits",
]
PREDICTIONS = [name for name in METHODS if name.startswith("predict_") and "logits" not in name]

Array = tuple[NDArray[np.float32], dict[str, Any]]


@pytest.fixture(scope="module")
def both(images, models) -> list[nnUNetPredictor]:
    """Stock's predictor and ours with the same model: two folds, mirrored, transposed."""
    spec = ModelSpec(
        folds=(0, 1), mirror_axes=(2,), transpose_forward=(1, 2, 0), patch_size=(20, 24, 24), spacing=(6.5, 6.0, 6.1)
    )
    model = models(spec, images("head_margin"))
    return [make_predictor(cls, model, (0, 1)) for cls in (nnUNetPredictor, LowMemPredictor)]


@pytest.fixture
def array(both, images) -> Array:
    """Image (channels, z, y, x) and properties as the model's reader gives them."""
    return both[0].plans_manager.image_reader_writer_class().read_images(images("head_margin"))


@pytest.fixture
def preprocessed(both, array: Array) -> Iterator[dict[str, Any]]:
    stock = both[0]
    return PreprocessAdapterFromNpy(
        [array[0]], None, [array[1]], None, stock.plans_manager, stock.dataset_json, stock.configuration_manager
    )


# -- signatures


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_stocks_in_order_then_keywords(name: str):
    stock = list(inspect.signature(getattr(nnUNetPredictor, name)).parameters.values())
    ours = list(inspect.signature(getattr(LowMemPredictor, name)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(stock)]] == [(p.name, p.default, p.kind) for p in stock]
    assert all(p.default is not p.empty for p in ours[len(stock) :])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_are_defined_on_the_class_itself(name: str):
    """TotalSegmentator overwrites them on the stock class, and hands over a keyword of its own."""
    assert name in vars(LowMemPredictor)
    assert "use_cropped_logits_resampling" in inspect.signature(getattr(LowMemPredictor, name)).parameters


def test_predictor_is_a_stock_predictor(both):
    assert isinstance(both[1], nnUNetPredictor)


def test_state_after_initialisation_is_stocks(both):
    stock, ours = both
    assert set(vars(stock)) <= set(vars(ours))
    for name in ("dataset_json", "trainer_name", "allowed_mirroring_axes", "tile_step_size", "device"):
        assert getattr(ours, name) == getattr(stock, name)
    assert ours.plans_manager.plans == stock.plans_manager.plans
    assert ours.configuration_manager.configuration == stock.configuration_manager.configuration


def test_weights_of_the_folds_are_stocks(both):
    stock, ours = (predictor.list_of_parameters for predictor in both)
    assert type(ours) is type(stock) is list
    assert list(map(type, ours)) == list(map(type, stock))
    assert len(ours) == len(stock) == 2
    for expected, actual in zip(stock, ours, strict=True):
        assert list(actual) == list(expected)
        assert all(type(actual[key]) is torch.Tensor and torch.equal(actual[key], expected[key]) for key in expected)


# -- logits


def test_sliding_window_logits_are_bitwise_stocks(both, preprocessed):
    data = next(preprocessed)["data"]
    expected, actual = (predictor.predict_sliding_window_return_logits(data) for predictor in both)
    assert_same_array(expected, actual)
    assert expected.dtype == torch.half
    assert actual.device == expected.device


def test_logits_of_all_folds_are_bitwise_stocks(both, preprocessed):
    data = next(preprocessed)["data"]
    expected, actual = (predictor.predict_logits_from_preprocessed_data(data) for predictor in both)
    assert_same_array(expected, actual)


def test_prediction_leaves_torchs_threads_and_the_input_alone(both, preprocessed):
    data = next(preprocessed)["data"]
    before, threads = data.clone(), torch.get_num_threads()
    both[1].predict_logits_from_preprocessed_data(data)
    assert torch.equal(data, before)
    assert torch.get_num_threads() == threads


def test_infinite_logits_raise_as_in_stock(images, models):
    model = models(ModelSpec(patch_size=(32, 32, 32)), images("head"))
    data = torch.zeros((1, 32, 32, 40))
    for cls in (nnUNetPredictor, LowMemPredictor):
        predictor = make_predictor(cls, model)
        weights = {key: value.clone() for key, value in predictor.list_of_parameters[0].items()}
        weights["decoder.seg_layers.0.bias"][:] = 60000.0
        predictor.list_of_parameters = [weights]
        with pytest.raises(RuntimeError, match=r"(?i)inf"):
            predictor.predict_logits_from_preprocessed_data(data)


# -- arrays in, arrays out


@pytest.mark.parametrize("probabilities", [False, True])
def test_single_array_returns_what_stock_returns(probabilities: bool, both, array: Array):
    image, properties = array
    expected, actual = (
        predictor.predict_single_npy_array(image, dict(properties), None, None, probabilities) for predictor in both
    )
    if probabilities:
        assert isinstance(actual, tuple)
        assert_close_probabilities(expected[1], actual[1])
        expected, actual = expected[0], actual[0]
    assert_same_array(expected, actual)
    assert len(np.unique(actual)) >= 3


@pytest.mark.parametrize("probabilities", [False, True])
def test_single_array_to_file(probabilities: bool, both, array: Array, tmp_path: Path):
    image, properties = array
    for predictor, who in zip(both, ("stock", "ours"), strict=True):
        (tmp_path / who).mkdir()
        out = str(tmp_path / who / "case")
        assert predictor.predict_single_npy_array(image, dict(properties), None, out, probabilities) is None
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_single_array_leaves_the_callers_image_alone(both, array: Array):
    image, properties = array
    before = image.copy()
    both[1].predict_single_npy_array(image, properties)
    assert np.array_equal(image, before)


def test_single_array_needs_only_a_spacing(both, array: Array):
    image, properties = array
    expected, actual = (p.predict_single_npy_array(image, {"spacing": properties["spacing"]}) for p in both)
    assert_same_array(expected, actual)


def test_properties_receive_what_stock_writes_into_them(both, array: Array):
    """Callers pass them on to nnU-Net's export functions."""
    image, properties = array
    given = [dict(properties), dict(properties)]
    for predictor, entry in zip(both, given, strict=True):
        predictor.predict_single_npy_array(image, entry)
    assert_same_object(*given, "properties")


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_single_array_of_another_type(dtype: type, both, array: Array):
    image, properties = array
    expected, actual = (p.predict_single_npy_array(image.astype(dtype), dict(properties)) for p in both)
    assert_same_array(expected, actual)


def test_cascade_from_arrays(images, models, tmp_path: Path):
    files = images("head_margin")
    first = models(ModelSpec(spacing=(8.0, 7.0, 6.0)), files)
    predict_stock(make_predictor(nnUNetPredictor, first), [files], str(tmp_path))
    model = models(ModelSpec(previous_stage="3d_lowres"), files, str(tmp_path / "head_margin.nii.gz"))
    both = [make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor)]
    reader = both[0].plans_manager.image_reader_writer_class()
    image, properties = reader.read_images(files)
    previous, _ = reader.read_seg(str(tmp_path / "head_margin.nii.gz"))
    expected, actual = (p.predict_single_npy_array(image, dict(properties), previous) for p in both)
    assert_same_array(expected, actual)
    (listed,) = both[1].predict_from_list_of_npy_arrays([image], [previous], [dict(properties)], None)
    assert_same_array(expected, listed)


@pytest.mark.parametrize("probabilities", [False, True])
def test_iterator_without_output_file_returns_a_list(probabilities: bool, both, array: Array, preprocessed):
    stock, ours = both
    item = next(preprocessed)
    expected = stock.predict_single_npy_array(array[0], dict(array[1]), None, None, probabilities)
    actual = ours.predict_from_data_iterator(iter([item, item]), probabilities)
    assert isinstance(actual, list)
    assert_same_return([expected, expected], actual, probabilities)


def test_iterator_takes_stocks_own_iterator(both, array: Array, preprocessed):
    actual = both[1].predict_from_data_iterator(preprocessed)
    assert_same_return([both[0].predict_single_npy_array(array[0], dict(array[1]))], actual, False)


def test_iterator_reads_and_removes_a_file_instead_of_an_array(both, array: Array, preprocessed, tmp_path: Path):
    item = next(preprocessed)
    np.save(tmp_path / "data.npy", item["data"].numpy())
    actual = both[1].predict_from_data_iterator(iter([{**item, "data": str(tmp_path / "data.npy")}]))
    assert_same_return([both[0].predict_single_npy_array(array[0], dict(array[1]))], actual, False)
    assert not (tmp_path / "data.npy").exists()


def test_iterator_with_output_file_returns_none_for_it(both, array: Array, preprocessed, tmp_path: Path):
    for who in ("stock", "ours"):
        (tmp_path / who).mkdir()
    both[0].predict_single_npy_array(array[0], dict(array[1]), None, str(tmp_path / "stock" / "case"))
    item = {**next(preprocessed), "ofile": str(tmp_path / "ours" / "case")}
    assert both[1].predict_from_data_iterator(iter([item])) == [None]
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_empty_iterator_returns_an_empty_list(both):
    assert both[1].predict_from_data_iterator(iter([])) == []


def test_list_of_arrays_returns_a_list(both, array: Array):
    image, properties = array
    other = np.ascontiguousarray(image[:, :, ::-1])
    expected = [both[0].predict_single_npy_array(a, dict(properties)) for a in (image, other)]
    actual = both[1].predict_from_list_of_npy_arrays([image, other], None, [dict(properties), dict(properties)], None)
    assert_same_return(expected, actual, False)


def test_one_array_instead_of_a_list(both, array: Array, tmp_path: Path):
    image, properties = array
    expected = both[0].predict_single_npy_array(image, dict(properties), None, None, True)
    actual = both[1].predict_from_list_of_npy_arrays(image, None, dict(properties), None, save_probabilities=True)
    assert_same_return([expected], actual, True)
    name = str(tmp_path / "case")
    assert both[1].predict_from_list_of_npy_arrays(image, None, dict(properties), name) == [None]
    assert (tmp_path / "case.nii.gz").exists()


# -- files


def test_sequential_prediction_writes_and_returns_what_stock_does(both, images, tmp_path: Path):
    results = []
    for predictor, who in zip(both, ("stock", "ours"), strict=True):
        (tmp_path / who).mkdir()
        results.append(predictor.predict_from_files_sequential([images("head_margin")], str(tmp_path / who)))
    assert results == [[], []]
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")
    assert_same_arguments(tmp_path)


def test_sequential_prediction_in_memory(both, images):
    expected, actual = (p.predict_from_files_sequential([images("head_margin")], None) for p in both)
    assert_same_return(expected, actual, False)


def test_recorded_arguments_of_predict_from_files_are_stocks_parameters(both, images, tmp_path: Path):
    both[1].predict_from_files([images("head_margin")], str(tmp_path), num_processes_preprocessing=0)
    recorded = json.loads((tmp_path / ARGS).read_text())
    parameters = inspect.signature(nnUNetPredictor.predict_from_files).parameters
    assert set(recorded) == {name for name in parameters if name != "self"}
    assert recorded["overwrite"] is True


@pytest.mark.slow
def test_workers_of_stock_write_and_return_the_same(both, images, tmp_path: Path):
    """Everywhere else stock predicts in this process; this is nnUNetv2_predict's way, with its pools."""
    cases = [images("head_margin"), images("head")]
    results = [
        predictor.predict_from_files(cases, str(tmp_path / who), True, True, 1, 1)
        for predictor, who in zip(both, ("stock", "ours"), strict=True)
    ]
    assert results == [[None, None], [None, None]]
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")
    assert_same_arguments(tmp_path)


def assert_same_arguments(folder: Path) -> None:
    stock, ours = (json.loads((folder / who / ARGS).read_text()) for who in ("stock", "ours"))
    target = "output_folder_or_list_of_truncated_output_files"
    assert {**ours, target: ""} == {**stock, target: ""}


# -- a network from the caller, as at the end of a training


def test_manual_initialisation_predicts_with_the_network_as_it_is(both, preprocessed):
    data = next(preprocessed)["data"]
    expected, actual = (manually(cls, both[0]).predict_sliding_window_return_logits(data) for cls in map(type, both))
    assert_same_array(expected, actual)


def manually(cls: type[nnUNetPredictor], source: nnUNetPredictor) -> nnUNetPredictor:
    plans = PlansManager(source.plans_manager.plans)
    configuration = plans.get_configuration("3d_fullres")
    channels = determine_num_input_channels(plans, configuration, source.dataset_json)
    network = nnUNetTrainer.build_network_architecture(*architecture(plans, configuration), channels, 4, False)
    network.load_state_dict(source.list_of_parameters[1])
    predictor = cls(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(network, plans, configuration, None, source.dataset_json, "nnUNetTrainer", (0,))
    return predictor


# -- import


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_neither_torch_nor_nnunet():
    heavy = {"torch", "nnunetv2", "numba", "numpy", "SimpleITK", "scipy"}
    assert modules_after("import nnunet_lowmem, nnunet_lowmem.errors").isdisjoint(heavy)


@pytest.mark.slow
def test_asking_for_the_predictor_imports_them():
    assert {"torch", "nnunetv2"} <= modules_after("from nnunet_lowmem import LowMemPredictor")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = nnunet_lowmem.NoSuchThing


def test_errors_survive_pickling():
    for cls in vars(nnunet_lowmem.errors).values():
        if isinstance(cls, type) and issubclass(cls, Exception):
            again = pickle.loads(pickle.dumps(cls("what happened")))
            assert (type(again), str(again)) == (cls, "what happened")
