"""The table of what our way does instead of calling nnU-Net, and of where nnU-Net's way begins if that was replaced.

See `lookup` for how a replacement is recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

RAW = "nnunetv2.inference.predict_from_raw_data"
PREDICTOR = f"{RAW}:nnUNetPredictor"
_ITERATORS = "nnunetv2.inference.data_iterators"
_EXPORT = "nnunetv2.inference.export_prediction"
_LABELS = "nnunetv2.utilities.label_handling.label_handling"
LABEL_MANAGER = f"{_LABELS}:LabelManager"
_PREPROCESSOR = "nnunetv2.preprocessing.preprocessors.default_preprocessor"
DEFAULT_PREPROCESSOR = f"{_PREPROCESSOR}:DefaultPreprocessor"
NORMALISATION = "nnunetv2.preprocessing.normalization.default_normalization_schemes"
_CROPPING = "nnunetv2.preprocessing.cropping.cropping"
_RESAMPLING = "nnunetv2.preprocessing.resampling.default_resampling"
_TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
_BASE_READER = "nnunetv2.imageio.base_reader_writer:BaseReaderWriter"
SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
READERS = (
    "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIO",
    "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIOWithReorient",
    "nnunetv2.imageio.nibabel_reader_writer:NibabelIO",
    "nnunetv2.imageio.nibabel_reader_writer:NibabelIOWithReorient",
    "nnunetv2.imageio.natural_image_reader_writer:NaturalImage2DIO",
    "nnunetv2.imageio.tif_reader_writer:Tiff3DIO",
)
#: Functions that plans may name for resampling.
RESAMPLINGS = (
    "resample_data_or_seg_to_shape",
    "resample_torch_fornnunet",
    "resample_torch_simple",
    "no_resampling_hack",
)


class Step(Enum):
    """Where nnU-Net's way begins; the value says what that costs."""

    ENTRY = "it is called as it is, and what it does by itself has no bounds"
    LISTING = "it lists the cases, and those that are there already are left out only if it says so"
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
    Row(PREDICTOR, Step.LISTING, ("_manage_input_and_output_lists",)),
    Row(RAW, Step.LISTING, ("create_lists_from_splitted_dataset_folder",)),
    Row("SimpleITK", Step.READING, ("ReadImage", "GetArrayFromImage")),
    Row("nibabel", Step.READING, ("load",)),
    Row(PREDICTOR, Step.FILES, ("_internal_get_data_iterator_from_lists_of_filenames",)),
    Row(RAW, Step.FILES, ("preprocessing_iterator_fromfiles",)),
    Row(_ITERATORS, Step.FILES, ("preprocess_fromfiles_save_to_queue",)),
    Row(PREDICTOR, Step.ARRAYS, ("get_data_iterator_from_raw_npy_data",)),
    Row(RAW, Step.ARRAYS, ("preprocessing_iterator_fromnpy",)),
    Row(_ITERATORS, Step.ARRAYS, ("preprocess_fromnpy_save_to_queue",)),
    Row(RAW, Step.ADAPTER, ("PreprocessAdapterFromNpy",)),
    Row(f"{_ITERATORS}:PreprocessAdapterFromNpy", Step.ADAPTER, ("__init__", "generate_train_batch")),
    *(Row(reader, Step.READING, ("read_images", "read_seg")) for reader in READERS),
    *(Row(reader, Step.WRITING, ("write_seg",)) for reader in READERS),
    Row(_BASE_READER, Step.READING, ("_check_all_same",)),
    Row(
        DEFAULT_PREPROCESSOR,
        Step.PREPROCESSING,
        ("run_case", "run_case_npy", "_normalize", "modify_seg_fn"),
    ),
    Row(_PREPROCESSOR, Step.PREPROCESSING, ("crop_to_nonzero", "compute_new_shape", "recursive_find_python_class")),
    Row(
        _CROPPING,
        Step.PREPROCESSING,
        ("create_nonzero_mask", "binary_fill_holes", "get_bbox_from_mask", "bounding_box_to_slice"),
    ),
    *(Row(f"{NORMALISATION}:{scheme}", Step.NORMALISATION, ("__init__", "run")) for scheme in SCHEMES),
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
        LABEL_MANAGER,
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
    Row(_EXPORT, Step.LABELS, ("insert_crop_into_image", "bounding_box_to_slice")),  # before 2.6 the latter
    Row(RAW, Step.EXPORT, ("export_prediction_from_logits",), _APPROXIMATIONS),
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

#: Modules that define what nnU-Net imports into the owners above; of other packages the package.
HOMES: dict[str, str] = {
    "GetArrayFromImage": "SimpleITK",
    "PreprocessAdapterFromNpy": _ITERATORS,
    "ReadImage": "SimpleITK",
    "binary_fill_holes": "scipy",
    "bounding_box_to_slice": "acvl_utils",
    "compute_metrics_on_folder": "nnunetv2.evaluation.evaluate_predictions",
    "compute_new_shape": _RESAMPLING,
    "compute_steps_for_sliding_window": "nnunetv2.inference.sliding_window_prediction",
    "convert_labelmap_to_one_hot": _LABELS,
    "convert_predicted_logits_to_segmentation_with_correct_shape": _EXPORT,
    "create_lists_from_splitted_dataset_folder": "nnunetv2.utilities.utils",
    "crop_to_nonzero": _CROPPING,
    "export_prediction_from_logits": _EXPORT,
    "get_bbox_from_mask": "acvl_utils",
    "insert_crop_into_image": "acvl_utils",
    "load": "nibabel",
    "load_json": "batchgenerators",
    "map_coordinates": "scipy",
    "nnUNetPredictor": RAW,
    "no_resampling_hack": "nnunetv2.preprocessing.resampling.no_resampling",
    "pad_nd_image": "acvl_utils",
    "preprocessing_iterator_fromfiles": _ITERATORS,
    "preprocessing_iterator_fromnpy": _ITERATORS,
    "recursive_find_python_class": "nnunetv2.utilities.find_class_by_name",
    "recursive_find_trainer_class_by_name": "nnunetv2.utilities.find_objects",
    "resample_and_save": _EXPORT,
    "resample_data_or_seg_to_shape": _RESAMPLING,
    "resample_torch_fornnunet": "nnunetv2.preprocessing.resampling.resample_torch",
    "resample_torch_simple": "nnunetv2.preprocessing.resampling.resample_torch",
    "resize": "skimage",
    "resize_segmentation": "batchgenerators",
}
