"""What programs put in the place of nnU-Net's methods and functions runs here as in stock, and a line tells of it."""

from __future__ import annotations

import functools
import json
import shutil
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling, resample_torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray
from oracle import INSTALLED, assert_same_array, assert_same_folder, make_predictor
from scipy import ndimage

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import PREDICTOR, RAW, ROWS, Step


def classes() -> tuple[type[nnUNetPredictor], ...]:
    """Stock's and ours; a module that held stock's class would be named by the test of what cannot be switched."""
    return nnUNetPredictor, LowMemPredictor


@pytest.fixture(scope="module")
def model(images, models) -> str:
    spec = ModelSpec(
        mirror_axes=(1,), transpose_forward=(1, 2, 0), patch_size=(28, 24, 20), normalisation=("CTNormalization",)
    )
    return models(spec, images("head_margin"))


@pytest.fixture
def array(images) -> tuple[NDArray[np.float32], dict[str, Any]]:
    reader = import_module("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()
    return reader.read_images(images("head_margin"))


def owner_of(name: str) -> Any:
    module, _, cls = name.partition(":")
    return getattr(import_module(module), cls) if cls else import_module(module)


# -- the table


_EXPORT = "nnunetv2.inference.export_prediction"
_PREPROCESSING = "nnunetv2.preprocessing.preprocessors.default_preprocessor"
_CROPPING = "nnunetv2.preprocessing.cropping.cropping"
_RESAMPLING = "nnunetv2.preprocessing.resampling.default_resampling"
_LABELS = "nnunetv2.utilities.label_handling.label_handling:LabelManager"
_NORMALISATION = "nnunetv2.preprocessing.normalization.default_normalization_schemes:CTNormalization"
_READER = "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIO"

#: What our way calls where nnU-Net calls it: what stands there runs by itself.
CALLED: dict[str, tuple[str, ...]] = {
    PREDICTOR: ("__init__", "manual_initialization", "auto_detect_available_folds"),
    RAW: (
        "PlansManager",
        "compute_gaussian",
        "determine_num_input_channels",
        "load_json",
        "nnUNetPredictor",
        "recursive_find_python_class",
        "recursive_find_trainer_class_by_name",
    ),
    _LABELS: (
        "__init__",
        "_sanity_check",
        "_get_all_labels",
        "_get_regions",
        "_determine_ignore_label",
        "has_regions",
        "has_ignore_label",
        "all_regions",
        "all_labels",
        "ignore_label",
        "filter_background",
        "foreground_regions",
        "foreground_labels",
        "num_segmentation_heads",
    ),
    _LABELS.partition(":")[0]: ("LabelManager", "softmax_helper_dim0", "get_labelmanager_class_from_plans"),
}

#: What our way does without, and does not look at: it does not change labels, or nnU-Net's predictor does not use it.
IGNORED: dict[str, tuple[str, ...]] = {
    RAW: (
        "ConfigurationManager",
        "MultiThreadedAugmenter",
        "_getDefaultValue",
        "check_workers_alive_and_busy",
        "dummy_context",
        "empty_cache",
        "get_output_folder",
        "predict_entry_point",
        "predict_entry_point_modelfolder",
        "recursive_fix_for_json_export",
        "tqdm",
    ),
    _EXPORT: (
        "ConfigurationManager",
        "LabelManager",
        "PlansManager",
        "comp_blosc2_params",
        "export_prediction_from_logits",
        "nnUNetDatasetBlosc2",
        "resample_and_save",
        "save_pickle",
    ),
    "nnunetv2.inference.data_iterators": ("PreprocessAdapter",),
    f"{_PREPROCESSING}:DefaultPreprocessor": ("__init__", "_sample_foreground_locations", "run", "run_case_save"),
    _RESAMPLING: ("compute_new_shape", "resample_data_or_seg_to_spacing"),
    _CROPPING: ("crop_to_nonzero",),
}


def bypassed(owner: str) -> set[str]:
    return {name for row in ROWS if row.owner == owner for name in row.names}


def listed(owner: str) -> set[str]:
    """All names of an owner that somebody has thought of."""
    return bypassed(owner) | set(CALLED.get(owner, ())) | set(IGNORED.get(owner, ()))


@pytest.mark.parametrize(
    "owner",
    [PREDICTOR, RAW, _EXPORT, f"{_PREPROCESSING}:DefaultPreprocessor", _CROPPING, _RESAMPLING, _LABELS, _READER],
)
def test_everything_that_stock_has_there_was_thought_of(owner: str):
    """A method that is new in nnU-Net fails this until it is known whether our way calls it."""
    unknown = {name for name, value in vars(owner_of(owner)).items() if acts(name, value, owner)} - listed(owner)
    assert not unknown


def acts(name: str, value: Any, owner: str) -> bool:
    """Whether a name of an owner is something that nnU-Net calls there, and no tool of Python's."""
    if ":" in owner:
        methods = types.FunctionType | staticmethod | classmethod | property
        return isinstance(value, methods) and (name == "__init__" or not name.startswith("__"))
    module = getattr(value, "__module__", None) or ""
    packages = ("nnunetv2", "acvl_utils", "skimage", "scipy", "batchgenerators", "tqdm")
    return callable(value) and module.split(".")[0] in packages and "file_and_folder" not in module


def test_no_name_stands_twice():
    for owner in {row.owner for row in ROWS}:
        called, ignored = set(CALLED.get(owner, ())), set(IGNORED.get(owner, ()))
        assert not bypassed(owner) & called
        assert not (bypassed(owner) | called) & ignored


def test_what_is_installed_is_not_taken_for_replaced(model):
    predictor = make_predictor(LowMemPredictor, model)
    assert lookup.replaced(predictor, *Step) == []
    assert [name for step in Step for name in lookup.found(step, nnUNetPredictor, LabelManager)] == []


def test_page_about_differences_holds_the_table():
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()
    for step in Step:
        names = [f"`{name}`" for row in ROWS if row.step is step for name in row.names]
        line = next((line for line in page.splitlines() if line.startswith(f"| {step.value} |")), "")
        assert set(names) == {word for word in line.split("|")[-2].replace(",", " ").split() if word}, step
    for names in IGNORED.values():
        assert all(f"`{name}`" in page for name in names)


# -- whose function it is


def plain(self: Any) -> int:
    return 1


@functools.wraps(nnUNetPredictor.predict_sliding_window_return_logits)
def claims_to_be_stocks(*arguments: Any) -> Any:
    return None


def edited_source() -> Any:
    """Stock's function compiled once more from text, in nnU-Net's module."""
    namespace: dict[str, Any] = {}
    exec(compile("def compute_gaussian(): pass", "<patched>", "exec"), vars(predict_from_raw_data), namespace)
    return namespace["compute_gaussian"]


STOCKS = nnUNetPredictor.predict_sliding_window_return_logits


@pytest.mark.parametrize(
    ("value", "name", "is_stocks"),
    [
        (STOCKS, "predict_sliding_window_return_logits", True),
        (torch.no_grad()(STOCKS), "predict_sliding_window_return_logits", True),
        (nnUNetPredictor.__dict__["auto_detect_available_folds"], "auto_detect_available_folds", True),
        (STOCKS, "predict_logits_from_preprocessed_data", False),
        (claims_to_be_stocks, "predict_sliding_window_return_logits", False),
        (torch.autocast("cpu", torch.bfloat16)(STOCKS), "predict_sliding_window_return_logits", False),
        (functools.partialmethod(STOCKS), "predict_sliding_window_return_logits", False),
        (mock.MagicMock(wraps=STOCKS), "predict_sliding_window_return_logits", False),
        (mock.create_autospec(STOCKS), "predict_sliding_window_return_logits", False),
        (edited_source(), "compute_gaussian", False),
        (plain, "plain", False),
        (None, "plain", False),
    ],
)
def test_whose_function_it_is(value: Any, name: str, is_stocks: bool):
    home = "nnunetv2.inference.sliding_window_prediction" if name == "compute_gaussian" else RAW
    assert lookup.is_stocks(value, name, home) is is_stocks


def test_functions_of_other_modules_of_nnunet_and_of_other_names_are_not_what_nnunet_put_there():
    assert lookup.is_stocks(ndimage.binary_fill_holes, "binary_fill_holes")
    assert not lookup.is_stocks(ndimage.binary_erosion, "binary_fill_holes")
    assert lookup.is_stocks(default_resampling.compute_new_shape, "compute_new_shape")
    assert not lookup.is_stocks(default_resampling.compute_new_shape, "compute_new_shape", RAW)
    assert not lookup.is_stocks(resample_torch.resample_torch_simple, "resample_data_or_seg_to_shape")


def of_totalsegmentator(self: Any, *arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("ours supersedes it")


of_totalsegmentator = types.FunctionType(
    of_totalsegmentator.__code__, {**globals(), "__name__": "totalsegmentator.nnunet_runtime_patches"}
)


def test_what_ours_supersedes_is_passed_over(model, array, monkeypatch):
    """TotalSegmentator overwrites these when it is imported."""
    predictor = make_predictor(LowMemPredictor, model, tile_step_size=1)
    expected = predictor.predict_single_npy_array(*array)
    for row in ROWS:
        if row.superseded:
            for name in row.names:
                monkeypatch.setattr(owner_of(row.owner), name, of_totalsegmentator)
    assert lookup.replaced(predictor, *Step) == []
    assert_same_array(expected, predictor.predict_single_npy_array(*array))


# -- the same as stock with the same replacement


def after(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a replacement of a function that changes what it returns."""

    def make(function: Any) -> Any:
        def replacement(*arguments: Any, **keywords: Any) -> Any:
            return change(function(*arguments, **keywords))

        return replacement

    return make


def weaker_background(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[0] -= 3
    return logits


def dimmed(data: Any) -> Any:
    return np.clip(data, None, 0.2 * data.max()) if isinstance(data, np.ndarray) else data.clamp(max=0.2 * data.max())


def first_of(change: Callable[[Any], Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda result: (change(result[0]), *result[1:])


def dimmed_resampling(data: Any, *arguments: Any, **keywords: Any) -> Any:
    return dimmed(
        default_resampling.resample_data_or_seg(np.asarray(data), arguments[0], keywords.get("is_seg", False), order=1)
    )


class Negative(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return -self.layer(features)


def fewer_planes(box: list[list[int]]) -> list[list[int]]:
    return [[low + 2, high] for low, high in box]


class DimmingAdapter(predict_from_raw_data.PreprocessAdapterFromNpy):
    def generate_train_batch(self) -> dict[str, Any]:
        item = super().generate_train_batch()
        return {**item, "data": dimmed(item["data"])}


def without_first_label(labels: Any) -> Any:
    labels[labels == 1] = 0
    return labels


REPLACEMENTS: dict[tuple[str, str], Any] = {
    (PREDICTOR, "predict_logits_from_preprocessed_data"): after(weaker_background),
    (PREDICTOR, "predict_sliding_window_return_logits"): after(weaker_background),
    (PREDICTOR, "_internal_predict_sliding_window_return_logits"): after(weaker_background),
    (PREDICTOR, "_internal_get_sliding_window_slicers"): after(
        lambda slicers: slicers[:-2] + slicers[:1] * 9 + slicers[-2:]
    ),
    (PREDICTOR, "_internal_maybe_mirror_and_predict"): after(weaker_background),
    (RAW, "compute_steps_for_sliding_window"): after(
        lambda steps: [[start // 2 for start in s[:-1]] + s for s in steps]
    ),
    (RAW, "pad_nd_image"): after(first_of(dimmed)),
    (RAW, "compute_gaussian"): after(torch.ones_like),
    (RAW, "PreprocessAdapterFromNpy"): lambda _: DimmingAdapter,
    (f"{_PREPROCESSING}:DefaultPreprocessor", "run_case_npy"): after(first_of(dimmed)),
    (f"{_PREPROCESSING}:DefaultPreprocessor", "_normalize"): after(dimmed),
    (_PREPROCESSING, "crop_to_nonzero"): after(first_of(dimmed)),
    (_PREPROCESSING, "compute_new_shape"): after(lambda shape: shape + 3),
    (_CROPPING, "create_nonzero_mask"): after(lambda mask: mask & (np.arange(len(mask)) > 9)[:, None, None]),
    (_CROPPING, "get_bbox_from_mask"): after(fewer_planes),
    (_NORMALISATION, "run"): after(dimmed),
    (_RESAMPLING, "resample_data_or_seg"): after(dimmed),
    (_RESAMPLING, "resize"): after(np.abs),
    (_RESAMPLING, "determine_do_sep_z_and_axis"): after(lambda _: (True, 0)),
    (_LABELS, "convert_logits_to_segmentation"): after(without_first_label),
    (_LABELS, "convert_probabilities_to_segmentation"): after(without_first_label),
    (RAW, "convert_predicted_logits_to_segmentation_with_correct_shape"): after(without_first_label),
}
# one of each mechanism; the others under -m slow
QUICK = (
    "predict_logits_from_preprocessed_data",
    "_internal_get_sliding_window_slicers",
    "run_case_npy",
    "convert_logits_to_segmentation",
)


@pytest.fixture(scope="module")
def unchanged(model, images) -> NDArray[Any]:
    reader = import_module("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()
    image, properties = reader.read_images(images("head_margin"))
    return make_predictor(nnUNetPredictor, model, tile_step_size=1).predict_single_npy_array(image, properties)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(owner, name, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for owner, name in REPLACEMENTS
    ],
)
def test_replacement_counts_as_in_stock(owner, name, model, array, unchanged, monkeypatch, caplog):
    if name == "convert_logits_to_segmentation" and INSTALLED < (2, 6):
        pytest.skip("nnU-Net 2.5 decides by probabilities")
    both = [make_predictor(cls, model, tile_step_size=1) for cls in classes()]
    holder = owner_of(owner)
    monkeypatch.setattr(holder, name, REPLACEMENTS[owner, name](getattr(holder, name)))
    image, properties = array
    expected, actual = (predictor.predict_single_npy_array(image, dict(properties)) for predictor in both)
    assert not np.array_equal(expected, unchanged), "a replacement that changes nothing shows nothing"
    assert_same_array(expected, actual)
    told = [message for message in caplog.messages if "not nnU-Net's own" in message]
    needs_no_word = name in CALLED.get(owner, ()) or name == "_internal_maybe_mirror_and_predict"
    assert len(told) == (0 if needs_no_word else 1)
    assert needs_no_word or name in told[0]


class DimmingPreprocessor(DefaultPreprocessor):
    def run_case_npy(self, *arguments: Any, **keywords: Any) -> Any:
        return first_of(dimmed)(super().run_case_npy(*arguments, **keywords))


class DimmingNormalization(CTNormalization):
    def run(self, image: Any, seg: Any = None) -> Any:
        return dimmed(super().run(image, seg))


class OwnLabels(LabelManager):
    def convert_logits_to_segmentation(self, logits: Any) -> Any:
        return without_first_label(super().convert_logits_to_segmentation(logits))


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        pytest.param(_PREPROCESSING, "DefaultPreprocessor", DimmingPreprocessor, marks=pytest.mark.slow),
        pytest.param(_NORMALISATION.partition(":")[0], "CTNormalization", DimmingNormalization, marks=pytest.mark.slow),
        pytest.param(
            _LABELS.partition(":")[0],
            "LabelManager",
            OwnLabels,
            marks=pytest.mark.skipif(INSTALLED < (2, 6), reason="nnU-Net 2.5 decides by probabilities"),
        ),
        pytest.param(_RESAMPLING, "resample_data_or_seg_to_shape", dimmed_resampling, marks=pytest.mark.slow),
    ],
)
def test_what_stands_under_a_name_that_plans_use(owner, name, replacement, model, array, unchanged, monkeypatch):
    """It is the program's and not the model's, so it needs no trust."""
    monkeypatch.setattr(owner_of(owner), name, replacement)
    both = [make_predictor(cls, model, tile_step_size=1) for cls in classes()]
    expected, actual = (predictor.predict_single_npy_array(array[0], dict(array[1])) for predictor in both)
    assert not np.array_equal(expected, unchanged)
    assert_same_array(expected, actual)


def test_reading_library_that_is_patched(model, images, unchanged, monkeypatch, tmp_path):
    monkeypatch.setattr(SimpleITK, "GetArrayFromImage", after(dimmed)(SimpleITK.GetArrayFromImage))
    results = []
    for cls in classes():
        predictor = make_predictor(cls, model, tile_step_size=1)
        results.append(predictor.predict_from_files_sequential([images("head_margin")], None)[0])
    assert not np.array_equal(results[0], unchanged)
    assert_same_array(*results)


def test_override_that_asks_for_gradients(model, array):
    """As in test-time adaptation: stock's tiles are made outside of inference mode."""

    def sharpened(self: Any, tile: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            tile = tile.clone().requires_grad_(True)
            self.network(tile).square().sum().backward()
            return self.network(tile.detach() + 0.5 * tile.grad.sign()).detach()

    results = []
    for cls in classes():
        client = type("Client", (cls,), {"_internal_maybe_mirror_and_predict": sharpened})
        results.append(
            make_predictor(client, model, tile_step_size=1).predict_single_npy_array(array[0], dict(array[1]))
        )
    assert_same_array(*results)


@pytest.mark.slow
@pytest.mark.parametrize("value", [1, 2.5, torch.full((1,), 0.5)])
def test_weights_of_a_tile_that_are_a_number(value, model, array, monkeypatch):
    monkeypatch.setattr(predict_from_raw_data, "compute_gaussian", lambda *_, **__: value)
    both = [make_predictor(cls, model, tile_step_size=1) for cls in classes()]
    assert_same_array(*(predictor.predict_single_npy_array(array[0], dict(array[1])) for predictor in both))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [np.array([0, 2]), [1], None])
def test_mirroring_axes_of_any_kind(axes, model, array):
    both = [make_predictor(cls, model, tile_step_size=1) for cls in classes()]
    for predictor in both:
        predictor.allowed_mirroring_axes = axes
    assert_same_array(*(predictor.predict_single_npy_array(array[0], dict(array[1])) for predictor in both))


@pytest.mark.parametrize(
    "change", ["hook", *(pytest.param(c, marks=pytest.mark.slow) for c in ("forward", "layer", "weights"))]
)
def test_fast_network_that_is_changed_after_a_prediction(change, model, array):
    predictors = [
        make_predictor(cls, model, tile_step_size=1, **options)
        for cls, options in zip(classes(), ({}, {"fast": True}), strict=True)
    ]
    results = []
    for predictor in predictors:
        before = predictor.predict_single_npy_array(array[0], dict(array[1]))
        network = predictor.network
        if change == "hook":
            network.register_forward_hook(lambda module, inputs, output: -output)
        elif change == "forward":
            network.forward = after(torch.neg)(network.forward)
        elif change == "layer":
            network.decoder.seg_layers[-1] = Negative(network.decoder.seg_layers[-1])
            predictor.list_of_parameters = [network.state_dict()]
        else:
            weights = {name: value.clone() for name, value in network.state_dict().items()}
            weights["decoder.seg_layers.0.bias"] += torch.arange(4.0) * 3
            network.load_state_dict(weights, assign=True)
            predictor.list_of_parameters = [weights]
        results.append(predictor.predict_single_npy_array(array[0], dict(array[1])))
        assert not np.array_equal(results[-1], before)
    assert (results[0] != results[1]).mean() < 0.001


class CoarsePlans(predict_from_raw_data.PlansManager):
    def __init__(self, plans: Any) -> None:
        super().__init__(plans)
        self.plans["configurations"]["3d_fullres"]["spacing"] = [5.5, 5.0, 4.5]


class SteepTrainer(nnUNetTrainer):
    @staticmethod
    @functools.wraps(nnUNetTrainer.build_network_architecture)
    def build_network_architecture(*arguments: Any, **keywords: Any) -> Any:
        network = nnUNetTrainer.build_network_architecture(*arguments, **keywords)
        for module in network.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.negative_slope = 0.9
        return network


def with_other_order(content: dict[str, Any]) -> dict[str, Any]:
    if "transpose_forward" in content:
        content = {**content, "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    return content


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        pytest.param("recursive_find_trainer_class_by_name", lambda name: SteepTrainer),
        pytest.param("PlansManager", CoarsePlans, marks=pytest.mark.slow),
        pytest.param("load_json", after(with_other_order)(predict_from_raw_data.load_json), marks=pytest.mark.slow),
    ],
)
def test_model_is_loaded_with_what_a_program_has_put_there(name, replacement, model, array, unchanged, monkeypatch):
    if not hasattr(predict_from_raw_data, name):
        pytest.skip("not in this nnU-Net")
    monkeypatch.setattr(predict_from_raw_data, name, replacement)
    both = [make_predictor(cls, model, tile_step_size=1) for cls in classes()]
    expected, actual = (predictor.predict_single_npy_array(array[0], dict(array[1])) for predictor in both)
    assert not np.array_equal(expected, unchanged)
    assert_same_array(expected, actual)


def test_folds_are_those_that_a_program_finds(model, monkeypatch):
    monkeypatch.setattr(nnUNetPredictor, "auto_detect_available_folds", staticmethod(lambda folder, name: [0, 0]))
    assert len(make_predictor(LowMemPredictor, model, None).list_of_parameters) == 2


@pytest.mark.parametrize("place", ["object", pytest.param("subclass", marks=pytest.mark.slow)])
def test_replacement_on_object_and_subclass(place, model, array):
    results = []
    for cls in classes():
        original = cls.predict_sliding_window_return_logits
        change = lambda self, data, original=original: weaker_background(original(self, data))  # noqa: E731  # a method
        made = type("Client", (cls,), {"predict_sliding_window_return_logits": change}) if place == "subclass" else cls
        predictor = make_predictor(made, model, tile_step_size=1)
        if place == "object":
            predictor.predict_sliding_window_return_logits = types.MethodType(change, predictor)
        results.append(predictor.predict_single_npy_array(array[0], dict(array[1])))
    assert_same_array(*results)


@pytest.mark.parametrize(
    "answer",
    [
        "float32",
        pytest.param("infinite", marks=pytest.mark.slow),
        pytest.param("fewer heads", marks=pytest.mark.slow),
        pytest.param("doubled", marks=pytest.mark.slow),
    ],
)
def test_unusual_logits_of_an_override(answer, model, array):
    def change(logits: torch.Tensor) -> Any:
        if answer == "float32":
            return logits.float() * 1.0001
        if answer == "infinite":
            return torch.cat([logits[:1], torch.full_like(logits[1:2], -torch.inf), logits[2:]])
        return logits[:3] if answer == "fewer heads" else logits * 2

    outcomes = []
    for cls in classes():
        original = cls.predict_logits_from_preprocessed_data
        client = type("Client", (cls,), {"predict_logits_from_preprocessed_data": after(change)(original)})
        predictor = make_predictor(client, model, tile_step_size=1)
        try:
            outcomes.append(predictor.predict_single_npy_array(array[0], dict(array[1])))
        except AssertionError as error:
            outcomes.append(str(error)[:60])
    assert type(outcomes[0]) is type(outcomes[1])
    assert np.array_equal(outcomes[0], outcomes[1])


# -- files


def predict_files(
    cls: type[nnUNetPredictor], model: str, cases: Any, out: Path, method: str = "predict_from_files"
) -> Any:
    predictor = make_predictor(cls, model, tile_step_size=1)
    workers = {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}
    return getattr(predictor, method)(cases, str(out), **(workers if method == "predict_from_files" else {}))


class OwnItems:
    """Makes the preprocessed cases itself, as FL4Health does."""

    def _internal_get_data_iterator_from_lists_of_filenames(
        self: Any, files, stages, outputs, processes
    ) -> Iterator[dict]:
        assert processes == 1
        preprocessor = self.configuration_manager.preprocessor_class(verbose=False)
        for case, output in zip(files, outputs, strict=True):
            given = (self.plans_manager, self.configuration_manager, self.dataset_json)
            data, _, properties = preprocessor.run_case(case, None, *given)
            yield {"data": torch.from_numpy(dimmed(data)), "ofile": output, "data_properties": properties}


class OwnIteration:
    """Takes the preprocessed cases and writes something else of them."""

    def predict_from_data_iterator(self: Any, data_iterator, save_probabilities=False, processes=3) -> list[Any]:
        kept = []
        for item in data_iterator:
            logits = self.predict_logits_from_preprocessed_data(item["data"])
            np.save(item["ofile"] + ".npy", logits[1].numpy())
            kept.append((item["ofile"].rpartition("/")[2], sorted(item["data_properties"]), tuple(logits.shape)))
        return kept


@pytest.mark.parametrize("client", [OwnItems, OwnIteration])
def test_own_part_of_predicting_files(client, model, images, tmp_path, monkeypatch):
    """What the client leaves to stock is done without processes on both sides."""
    returned = []
    for cls, who in zip(classes(), ("stock", "ours"), strict=True):
        if cls is nnUNetPredictor:  # in this process, to save the seconds that its processes take
            cls = type("Serial", (cls,), serial_stock())
        mixed = type("Client", (client, cls), {})
        returned.append(predict_files(mixed, model, [images("head_margin")], tmp_path / who))
    assert returned[0] == returned[1]
    if client is OwnIteration:
        expected, actual = (np.load(tmp_path / who / "head_margin.npy") for who in ("stock", "ours"))
        assert_same_array(expected, actual)
    else:
        assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def serial_stock() -> dict[str, Any]:
    """Stock's iterators with everything in this process."""

    def items(self: Any, files: Any, stages: Any, outputs: Any, processes: int) -> Iterator[dict[str, Any]]:
        preprocessor = self.configuration_manager.preprocessor_class(verbose=False)
        for case, output in zip(files, outputs, strict=True):
            given = (self.plans_manager, self.configuration_manager, self.dataset_json)
            data, _, properties = preprocessor.run_case(case, None, *given)
            yield {"data": torch.from_numpy(data), "ofile": output, "data_properties": properties}

    def iterate(self: Any, iterator: Any, probabilities: bool = False, processes: int = 1) -> list[None]:
        for item in iterator:
            logits = self.predict_logits_from_preprocessed_data(item["data"])
            predict_from_raw_data.export_prediction_from_logits(
                logits, item["data_properties"], self.configuration_manager, self.plans_manager, self.dataset_json,
                item["ofile"], probabilities,
            )  # fmt: skip
        return [None]

    return {"_internal_get_data_iterator_from_lists_of_filenames": items, "predict_from_data_iterator": iterate}


def test_own_export_of_files(model, images, tmp_path, monkeypatch):
    export = predict_from_raw_data.export_prediction_from_logits

    def with_logits(
        logits: Any, properties: Any, configuration: Any, plans: Any, dataset: Any, output: str, *more: Any
    ):
        np.save(output + ".npy", np.asarray(logits)[2])
        export(logits, properties, configuration, plans, dataset, output, *more)

    monkeypatch.setattr(predict_from_raw_data, "export_prediction_from_logits", with_logits)
    for cls, who in zip(classes(), ("stock", "ours"), strict=True):
        (tmp_path / who).mkdir()
        predict_files(cls, model, [images("head_margin")], tmp_path / who, "predict_from_files_sequential")
    expected, actual = (np.load(tmp_path / who / "head_margin.npy") for who in ("stock", "ours"))
    assert_same_array(expected, actual)
    for who in ("stock", "ours"):
        (tmp_path / who / "head_margin.npy").unlink()
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


@pytest.mark.parametrize(
    "name", ["predict_from_files", "predict_single_npy_array", "initialize_from_trained_model_folder"]
)
def test_entry_that_is_patched_in_stocks_class_is_called(name, monkeypatch, caplog):
    monkeypatch.setattr(nnUNetPredictor, name, lambda self, *arguments, **keywords: (self, arguments, keywords))
    predictor = LowMemPredictor(device=torch.device("cpu"), allow_tqdm=False)
    assert getattr(predictor, name)(1, two=2) == (predictor, (1,), {"two": 2})
    assert f"{name}: not nnU-Net's own" in caplog.text
    monkeypatch.setattr(nnUNetPredictor, name, mock.Mock(return_value=5))  # which Python does not bind
    assert getattr(predictor, name)(1) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [(_LABELS, "convert_logits_to_segmentation"), (f"{_PREPROCESSING}:DefaultPreprocessor", "_normalize")],
)
def test_what_runs_in_stocks_processes_is_seen_when_it_is_in_stock(owner, name, model, images, tmp_path, monkeypatch):
    """A patch of this process alone does not reach them."""
    holder = owner_of(owner)
    monkeypatch.setattr(holder, name, REPLACEMENTS[owner, name](getattr(holder, name)))
    for cls, who in zip(classes(), ("stock", "ours"), strict=True):
        predict_files(cls, model, [images("head_margin"), images("head")], tmp_path / who)
    assert_same_folder(tmp_path / "stock", tmp_path / "ours")


def test_case_without_its_first_channel_is_refused_before_anybody_iterates(model, images, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a_0001.nii.gz").write_bytes(Path(images("head_margin")[0]).read_bytes())
    predictor = make_predictor(type("Client", (OwnItems, LowMemPredictor), {}), model)
    with pytest.raises(UsageError, match="channel 0 is missing"):
        predictor.predict_from_files(str(tmp_path / "in"), str(tmp_path / "out"))


@pytest.mark.parametrize("entry", ["preprocessor_name", "label_manager", "resampling_fn_data"])
def test_names_of_nnunet_are_for_their_own_entries(entry, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    plans = json.loads((folder / "plans.json").read_text())
    holder = plans if entry in plans else plans["configurations"]["3d_fullres"]
    holder[entry] = "CTNormalization"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match="CTNormalization"):
        make_predictor(LowMemPredictor, str(folder))
