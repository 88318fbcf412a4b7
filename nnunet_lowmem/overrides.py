"""What of nnU-Net our way bypasses, and whether somebody has put something else in its place.

Programs subclass nnU-Net's predictor, set methods on objects, and patch classes and modules. Whatever our way calls is
theirs by itself; what it does *instead* is listed in `ROWS`. Where a name of a row is neither nnU-Net's nor ours,
nnU-Net's way is taken from that step on.

A function counts as nnU-Net's if it was compiled from the file of nnU-Net's module that it lives in, under its own
name, and nothing but torch's context decorator (``@torch.inference_mode()``) is wrapped around it. So it does not
matter who was imported first.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization import default_normalization_schemes

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

RAW = "nnunetv2.inference.predict_from_raw_data"
PREDICTOR = f"{RAW}:nnUNetPredictor"
_ITERATORS = "nnunetv2.inference.data_iterators"
_EXPORT = "nnunetv2.inference.export_prediction"
_LABELS = "nnunetv2.utilities.label_handling.label_handling"
_LABEL_MANAGER = f"{_LABELS}:LabelManager"
_PREPROCESSOR = "nnunetv2.preprocessing.preprocessors.default_preprocessor"
_NORMALISATION = "nnunetv2.preprocessing.normalization.default_normalization_schemes"
_CROPPING = "nnunetv2.preprocessing.cropping.cropping"
_RESAMPLING = "nnunetv2.preprocessing.resampling.default_resampling"
_TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
_BASE_READER = "nnunetv2.imageio.base_reader_writer:BaseReaderWriter"
_READERS = (
    "simpleitk_reader_writer:SimpleITKIO",
    "simpleitk_reader_writer:SimpleITKIOWithReorient",
    "nibabel_reader_writer:NibabelIO",
    "nibabel_reader_writer:NibabelIOWithReorient",
    "natural_image_reader_writer:NaturalImage2DIO",
    "tif_reader_writer:Tiff3DIO",
)


class Step(Enum):
    """Where nnU-Net's way begins; the value says what that costs."""

    ENTRY = "it is called as it is, and what it does by itself has no bounds"
    LISTING = "the cases of a folder are listed by it"
    FILES = "nnU-Net's own workers preprocess the files, whole images at a time"
    ARRAYS = "nnU-Net's own workers preprocess the arrays, whole images at a time"
    ADAPTER = "it preprocesses the array, as a whole"
    READING = "images are read by nnU-Net, whole and as float32"
    PREPROCESSING = "images are preprocessed by nnU-Net, as a whole"
    NORMALISATION = "it is called with a whole channel at a time"
    RESAMPLING = "nnU-Net's resampling is called, which takes whole arrays in double precision"
    NETWORK = "without --fast, which goes another way through the network"
    ITERATION = "it gets the preprocessed cases, and what becomes of them has no bounds"
    LOGITS = "it makes the logits, and all of a case are held in RAM"
    WINDOW = "nnU-Net's own sliding window runs, and all logits of a case are held in RAM"
    LABELS = "all logits of a case are held in RAM and converted by nnU-Net, as a whole"
    EXPORT = "all logits of a case are held in RAM, and it writes the files by itself"
    VALIDATION = "nnU-Net's trainer validates by itself"
    WRITING = "nnU-Net's own workers write the files, with all logits of a case in RAM"


@dataclass(frozen=True)
class Row:
    """Names that our way does not call.

    Attributes
    ----------
    owner : str
        ``module`` or ``module:Class``, where nnU-Net looks the names up.
    step : Step
    names : tuple of str
    superseded : tuple of str
        Packages whose replacements ours makes superfluous: they are passed over.
    """

    owner: str
    step: Step
    names: tuple[str, ...]
    superseded: tuple[str, ...] = ()


# its exact resampling has the same labels, and its approximation is what a user of ours does without
_APPROXIMATIONS = ("totalsegmentator",)

ROWS = (
    Row(
        PREDICTOR,
        Step.ENTRY,
        (
            "predict_from_files",
            "predict_from_files_sequential",
            "predict_from_list_of_npy_arrays",
            "predict_single_npy_array",
            "predict_from_data_iterator",
        ),
        _APPROXIMATIONS,
    ),
    Row(PREDICTOR, Step.ENTRY, ("initialize_from_trained_model_folder", "predict_sliding_window_return_logits")),
    Row(RAW, Step.LISTING, ("create_lists_from_splitted_dataset_folder",)),
    Row(PREDICTOR, Step.FILES, ("_internal_get_data_iterator_from_lists_of_filenames",)),
    Row(RAW, Step.FILES, ("preprocessing_iterator_fromfiles",)),
    Row(_ITERATORS, Step.FILES, ("preprocess_fromfiles_save_to_queue",)),
    Row(PREDICTOR, Step.ARRAYS, ("get_data_iterator_from_raw_npy_data",)),
    Row(RAW, Step.ARRAYS, ("preprocessing_iterator_fromnpy",)),
    Row(_ITERATORS, Step.ARRAYS, ("preprocess_fromnpy_save_to_queue",)),
    Row(RAW, Step.ADAPTER, ("PreprocessAdapterFromNpy",)),
    Row(f"{_ITERATORS}:PreprocessAdapterFromNpy", Step.ADAPTER, ("__init__", "generate_train_batch")),
    *(Row(f"nnunetv2.imageio.{reader}", Step.READING, ("read_images", "read_seg")) for reader in _READERS),
    *(Row(f"nnunetv2.imageio.{reader}", Step.WRITING, ("write_seg",)) for reader in _READERS),
    Row(_BASE_READER, Step.READING, ("_check_all_same",)),
    Row(
        f"{_PREPROCESSOR}:DefaultPreprocessor",
        Step.PREPROCESSING,
        ("run_case", "run_case_npy", "_normalize", "modify_seg_fn"),
    ),
    Row(_PREPROCESSOR, Step.PREPROCESSING, ("crop_to_nonzero", "compute_new_shape", "recursive_find_python_class")),
    Row(
        _CROPPING,
        Step.PREPROCESSING,
        ("create_nonzero_mask", "binary_fill_holes", "get_bbox_from_mask", "bounding_box_to_slice"),
    ),
    *(
        Row(f"{_NORMALISATION}:{scheme}Normalization", Step.NORMALISATION, ("__init__", "run"))
        for scheme in ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01")
    ),
    Row(
        _RESAMPLING,
        Step.RESAMPLING,
        (
            "resample_data_or_seg_to_shape",
            "resample_data_or_seg",
            "determine_do_sep_z_and_axis",
            "get_do_separate_z",
            "get_lowres_axis",
            "resize",
            "resize_segmentation",
            "map_coordinates",
        ),
    ),
    Row(PREDICTOR, Step.NETWORK, ("_internal_maybe_mirror_and_predict",)),
    Row(PREDICTOR, Step.ITERATION, ("predict_from_data_iterator",), _APPROXIMATIONS),
    Row(
        PREDICTOR,
        Step.LOGITS,
        ("predict_logits_from_preprocessed_data", "predict_sliding_window_return_logits"),
    ),
    Row(
        PREDICTOR,
        Step.WINDOW,
        ("_internal_predict_sliding_window_return_logits", "_internal_get_sliding_window_slicers"),
    ),
    Row(RAW, Step.WINDOW, ("compute_steps_for_sliding_window", "pad_nd_image")),
    Row(RAW, Step.LOGITS, ("convert_labelmap_to_one_hot",)),
    Row(_ITERATORS, Step.LOGITS, ("convert_labelmap_to_one_hot",)),
    Row(
        _LABEL_MANAGER,
        Step.LABELS,
        (
            "convert_logits_to_segmentation",
            "convert_probabilities_to_segmentation",
            "apply_inference_nonlin",
            "revert_cropping_on_probabilities",
        ),
    ),
    Row(_LABELS, Step.LABELS, ("insert_crop_into_image",)),
    *(
        Row(module, Step.LABELS, ("convert_predicted_logits_to_segmentation_with_correct_shape",), _APPROXIMATIONS)
        for module in (RAW, _EXPORT)
    ),
    Row(_EXPORT, Step.LABELS, ("insert_crop_into_image",)),
    Row(RAW, Step.EXPORT, ("export_prediction_from_logits",), _APPROXIMATIONS),
    Row(_EXPORT, Step.WRITING, ("save_pickle",)),
    Row(
        _TRAINER,
        Step.VALIDATION,
        (
            "nnUNetPredictor",
            "export_prediction_from_logits",
            "resample_and_save",
            "compute_metrics_on_folder",
            "convert_labelmap_to_one_hot",
        ),
    ),
)

#: What our way calls where nnU-Net calls it: what stands there runs by itself.
CALLED: dict[str, tuple[str, ...]] = {
    PREDICTOR: ("__init__", "manual_initialization", "_manage_input_and_output_lists", "auto_detect_available_folds"),
    RAW: (
        "PlansManager",
        "compute_gaussian",
        "determine_num_input_channels",
        "load_json",
        "nnUNetPredictor",
        "recursive_find_trainer_class_by_name",
    ),
    _LABEL_MANAGER: (
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
    _LABELS: ("LabelManager", "softmax_helper_dim0", "get_labelmanager_class_from_plans"),
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
    ),
    _ITERATORS: ("PreprocessAdapter",),
    f"{_PREPROCESSOR}:DefaultPreprocessor": ("__init__", "_sample_foreground_locations", "run", "run_case_save"),
    _RESAMPLING: ("compute_new_shape", "resample_data_or_seg_to_spacing"),
    _CROPPING: ("crop_to_nonzero",),
}

# nnU-Net preprocesses and exports in fresh processes, where what was replaced in this one may or may not be seen
IN_WORKERS_BEFORE = (Step.READING, Step.PREPROCESSING, Step.NORMALISATION, Step.RESAMPLING)
IN_WORKERS_AFTER = (Step.LABELS, Step.EXPORT, Step.WRITING, Step.RESAMPLING)

_STOCK_PACKAGES = ("nnunetv2", "acvl_utils", "batchgenerators", "skimage", "scipy")
_OURS = "nnunet_lowmem"
_TORCHS_DECORATOR = "torch.utils._contextlib"


def found(step: Step, *holders: object) -> list[str]:
    """Name what somebody else's has taken the place of, among the rows of a step.

    Parameters
    ----------
    step : Step
    *holders : object
        Instances or classes to look at: the predictor, the label manager, the preprocessor's class, ... A row about a
        class is passed over where no holder is of that class; rows about modules always count.
    """
    return [
        f"{row.owner.rpartition('.')[2].replace(':', '.')}.{name}"
        for row in ROWS
        if row.step is step
        for places in _places(row.owner, holders)
        for name in row.names
        if _is_replaced(places, name, row.superseded)
    ]


def replaced(predictor: Any, *steps: Step) -> list[str]:
    """Name what somebody else's has taken the place of for a predictor with a model, among the rows of some steps."""
    configuration, labels = predictor.configuration_manager, predictor.label_manager
    adapter = predict_from_raw_data.PreprocessAdapterFromNpy
    schemes = [getattr(default_normalization_schemes, name, None) for name in configuration.normalization_schemes]
    classes = (configuration.preprocessor_class, predictor.plans_manager.image_reader_writer_class, adapter, *schemes)
    return [name for step in steps for name in found(step, predictor, labels, *classes)]


def tell(predictor: Any, *steps: Step) -> None:
    """Log what is replaced, and what that costs."""
    for step in steps:
        if names := replaced(predictor, step):
            logger.warning("%s: not nnU-Net's own; %s", ", ".join(names), step.value)


def of_validation(trainer: Any) -> list[str]:
    """Name what is replaced of that which a trainer's own validation uses."""
    steps = (Step.VALIDATION, Step.LOGITS, Step.WINDOW, Step.RESAMPLING, Step.LABELS)
    return [name for step in steps for name in found(step, nnUNetPredictor, trainer.label_manager)]


def of_prediction(fast: bool) -> tuple[Step, ...]:
    """Return the steps from a preprocessed image to its labels, in this process."""
    return (*((Step.NETWORK,) if fast else ()), Step.LOGITS, Step.WINDOW, Step.LABELS, Step.EXPORT)


def unless_replaced(method: Method) -> Method:
    """Let a method of ours give way to what stands under its name in nnU-Net's class, if that is not nnU-Net's own."""
    name = method.__name__
    row = next(row for row in ROWS if row.step is Step.ENTRY and name in row.names)
    is_told_of = any(name in other.names for other in ROWS if other.step is Step.LOGITS)  # once per run, not per fold

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not _is_replaced([vars(nnUNetPredictor)], name, row.superseded):
            return method(self, *arguments, **keywords)
        if not is_told_of:
            logger.warning("nnUNetPredictor.%s: not nnU-Net's own; %s", name, Step.ENTRY.value)
        replacement = vars(nnUNetPredictor)[name]
        bound = replacement.__get__(self, type(self)) if hasattr(type(replacement), "__get__") else replacement
        return bound(*arguments, **keywords)

    return call  # type: ignore[return-value]  # of the same signature


def _places(owner: str, holders: tuple[object, ...]) -> Iterator[list[Mapping[str, Any]]]:
    """Give for each holder where Python looks for its names, one place after the other.

    A class derived from one of nnU-Net's is a class of its own, which the plans name: what it overrides replaces
    nothing. Of the predictor, derived classes are what programs are made of.
    """
    module, _, name = owner.partition(":")
    if not name:
        if module in sys.modules:  # what is not imported has not been patched
            yield [vars(sys.modules[module])]
        return
    for holder in holders:
        classes = list((holder if isinstance(holder, type) else type(holder)).__mro__)
        names = [(cls.__module__, cls.__qualname__) for cls in classes]
        if (module, name) in names:
            first = 0 if owner == PREDICTOR else names.index((module, name))
            own = [] if isinstance(holder, type) else [getattr(holder, "__dict__", {})]
            yield [*own, *map(vars, classes[first:])]


def _is_replaced(places: Sequence[Mapping[str, Any]], name: str, superseded: tuple[str, ...]) -> bool:
    values = (place[name] for place in places if name in place)
    standing = next((value for value in values if not _is_of(value, (_OURS,))), None)
    return standing is not None and not is_stocks(standing, name) and not _is_of(standing, superseded)


def is_stocks(value: Any, name: str) -> bool:
    """Whether what stands under a name is nnU-Net's own, or that of a package which nnU-Net takes it from."""
    function = _bare(value)
    module = _module(function)
    if not _is_within(module, _STOCK_PACKAGES):
        return False
    code = getattr(function, "__code__", None)
    if code is None or not _is_within(module, ("nnunetv2",)):
        return True
    file = code.co_filename.replace("\\", "/")
    return bool(code.co_name == name and file.endswith(module.replace(".", "/") + ".py"))


def _bare(value: Any) -> Any:
    """Take off what binds a function to a class, and torch's decorator."""
    value = getattr(value, "__func__", value)  # static methods, class methods, bound methods
    while _module(value) == _TORCHS_DECORATOR:
        value = value.__wrapped__
    return value


def _is_of(value: Any, packages: tuple[str, ...]) -> bool:
    return _is_within(_module(_bare(value)), packages)


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return module.partition(".")[0] in packages


def _module(value: Any) -> str:
    """Where a function was compiled, whatever it says of itself; where a class says it was."""
    namespace = getattr(value, "__globals__", None)
    name = namespace.get("__name__") if isinstance(namespace, dict) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""
