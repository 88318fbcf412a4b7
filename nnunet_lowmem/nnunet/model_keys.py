"""The table of what plans.json and dataset.json must have: what nnU-Net, or this package, looks up without asking.

Stock finds out when it needs an entry, which may be once a case is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import ModelError, because, twin

DATASET = ("labels",)
PLANS = ("configurations", "image_reader_writer", "transpose_forward")
#: Of the configuration that the checkpoint asks for, what it inherits included.
CONFIGURATION = ("preprocessor_name", "patch_size", "spacing", "normalization_schemes")
#: What becomes of logits goes by: programs that make labels of them by themselves do without.
EXPORT = ("resampling_fn_probabilities", "resampling_fn_probabilities_kwargs")
EXPORT_PLANS = ("transpose_backward",)
#: What nnU-Net's own preprocessor looks up; others have their own needs, and so have programs that preprocess.
PREPROCESSING = (
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
#: Of the architecture, which nnU-Net itself makes of plans in old formats.
ARCHITECTURE = ("network_class_name", "arch_kwargs", "_kw_requires_import")
#: Either of these, where the second is how older versions called it.
CHANNELS = ("channel_names", "modality")
INTENSITIES = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")

_OWN_PREPROCESSOR = "DefaultPreprocessor"


def check_files(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], folder: Path) -> None:
    """Check what is needed whatever the configuration.

    Raises
    ------
    ModelError
        With the file and the entry; of the kind that stock raises where it looks for it.
    """
    advice = "dataset.json of the training data has it"
    _need(DATASET, dataset_json, folder / "dataset.json", advice=advice)
    if not any(key in dataset_json for key in CHANNELS):
        raise _lacking(folder / "dataset.json", " or ".join(map(repr, CHANNELS)), advice)
    _need(PLANS, plans, folder / "plans.json")


def configuration(plans_manager: Any, name: str, folder: Path) -> Any:
    """Return nnU-Net's manager of a configuration.

    Raises
    ------
    ModelError
        If it is of an old format and lacks an entry.
    """
    try:
        return plans_manager.get_configuration(name)
    except KeyError as error:
        told = f"{folder / 'plans.json'}: configuration {name!r} lacks {error}, and 'architecture' as well; {_ADVICE}"
        raise because(ModelError, told, error) from error


def check_configuration(resolved: Mapping[str, Any], name: str, folder: Path) -> None:
    """Check a configuration, with what it inherits, for what every prediction needs.

    Raises
    ------
    ModelError
        With the file, the configuration and the entry.
    """
    _need(CONFIGURATION, resolved, folder / "plans.json", f" in configuration {name!r}")


def check_case(plans: Mapping[str, Any], resolved: Mapping[str, Any], preprocesses: bool, exports: bool) -> None:
    """Check what one case needs, before it is computed.

    Parameters
    ----------
    plans, resolved : dict
        plans.json, and its configuration with what that inherits.
    preprocesses, exports : bool
        Whether nnU-Net's way, or ours in its place, makes the image, and labels of the logits.

    Raises
    ------
    ModelError
        With the file and the entry.
    """
    file, own = Path("plans.json"), preprocesses and resolved.get("preprocessor_name") == _OWN_PREPROCESSOR
    if exports:
        _need(EXPORT_PLANS, plans, file)
        _need(EXPORT, resolved, file, " in the configuration")
    if own:
        _need(PREPROCESSING, resolved, file, " in the configuration")
        if not any(key in plans for key in INTENSITIES):
            raise _lacking(file, repr(INTENSITIES[0]), _ADVICE)


def check_architecture(resolved: Mapping[str, Any], name: str, folder: Path) -> None:
    """Check what nnU-Net's trainers build their network from; trainers of others have their own needs.

    Raises
    ------
    ModelError
        With the file, the configuration and the entry.
    """
    where = f" in 'architecture' of configuration {name!r}"
    _need(ARCHITECTURE, resolved["architecture"], folder / "plans.json", where)


_ADVICE = "take it from the plans that the model was trained with"


def _need(keys: Sequence[str], holder: Mapping[str, Any], file: Path, where: str = "", advice: str = _ADVICE) -> None:
    """Refuse what lacks a key; say what stands in its place as a rule, where another tells."""
    for key in keys:
        if key not in holder:
            like = key.replace("_probabilities", "_data")
            if like != key and like in holder:
                order = ", with 'order': 1" if key.endswith("_kwargs") else ""
                advice = f"{advice}; as a rule it is like {like!r}{order}"
            raise _lacking(file, f"{key!r}{where}", advice)


def _lacking(file: Path, entry: str, advice: str) -> ModelError:
    return twin(ModelError, KeyError)(f"{file} lacks {entry}, which prediction needs: {advice}")
