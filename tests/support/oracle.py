"""Stock nnU-Net as oracle: the same model and images through both predictors, and what must be equal afterwards."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from skimage import io

from nnunet_lowmem.nnunet.installed import version_of

PROBABILITY_TOLERANCE = 2.0**-21  # stock's own softmax varies by as much with its number of threads
INSTALLED = tuple(map(int, version_of("nnunetv2").split(".")[:2]))
OLD = INSTALLED < (2, 8)
ARGS = "predict_from_raw_data_args.json"  # names its function's parameters, so it differs between the two


def make_predictor(
    cls: type[nnUNetPredictor], model: str, folds: Any = (0,), device: str = "cpu", **options: Any
) -> nnUNetPredictor:
    predictor = cls(device=torch.device(device), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(model, folds)
    return predictor


def outputs(cases: list[list[str]], folder: Path) -> list[str]:
    return [str(folder / os.path.basename(files[0]).removesuffix("_0000.nii.gz")) for files in cases]


def predict_stock(predictor: nnUNetPredictor, cases: Any, out: Any, previous: str | None = None, **kwargs: Any) -> Any:
    """Predict in this process: workers would give the same and cost seconds.

    Before 2.8 stock's sequential prediction forgets the one-hot of a cascade's previous stage: workers there.
    """
    if previous is not None and OLD:
        return predictor.predict_from_files(
            cases,
            out,
            num_processes_preprocessing=1,
            num_processes_segmentation_export=1,
            folder_with_segs_from_prev_stage=previous,
            **kwargs,
        )
    return predictor.predict_from_files_sequential(cases, out, folder_with_segs_from_prev_stage=previous, **kwargs)


def predict_ours(predictor: nnUNetPredictor, cases: Any, out: Any, previous: str | None = None, **kwargs: Any) -> Any:
    return predictor.predict_from_files(
        cases, out, num_processes_preprocessing=0, folder_with_segs_from_prev_stage=previous, **kwargs
    )


def record_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("lowmem_run-*.jsonl"))


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Every record in the folder, file by file."""
    return [json.loads(line) for file in record_files(folder) for line in file.read_text().splitlines() if line]


def recorded_names(folder: Path) -> list[str]:
    return sorted(name for record in recorded(folder) for name in record["outputs"])


def assert_same_folder(stock: Path, ours: Path) -> None:
    """Same file names, and in every file the same content."""
    names = sorted(p.name for p in stock.iterdir())
    assert sorted(p.name for p in ours.iterdir() if p not in record_files(ours)) == names
    for name in names:
        if name != ARGS:
            assert_same_file(stock / name, ours / name)


def assert_same_file(stock: Path, ours: Path) -> None:
    if stock.suffix == ".json":
        assert load_json(str(ours)) == load_json(str(stock))
    elif stock.suffix == ".npz":
        assert_same_archive(stock, ours)
    elif stock.suffix == ".pkl":
        expected = pickle.loads(stock.read_bytes())
        if OLD and isinstance(expected, np.ndarray):
            return  # stock's ensembling pickles the averaged probabilities there, by mistake
        expected.pop("class_locations", None)  # sampled for training from a previous stage; left out on purpose
        assert_same_object(expected, pickle.loads(ours.read_bytes()), stock.name)
    else:
        assert_same_segmentation(stock, ours)


def assert_same_archive(stock: Path, ours: Path) -> None:
    with np.load(stock) as expected, np.load(ours) as actual:
        assert actual.files == expected.files == ["probabilities"]
        assert_close_probabilities(expected["probabilities"], actual["probabilities"])


def assert_close_probabilities(expected: np.ndarray, actual: np.ndarray) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    difference = np.abs(expected - actual).max()
    assert difference <= PROBABILITY_TOLERANCE, f"probabilities differ by {difference:.3g}"


def assert_same_segmentation(stock: Path, ours: Path) -> None:
    assert read_geometry(ours) == read_geometry(stock)
    assert_same_array(read_voxels(stock), read_voxels(ours))


def assert_same_array(expected: Any, actual: Any) -> None:
    assert type(actual) is type(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    different = int((np.asarray(actual) != np.asarray(expected)).sum())
    assert different == 0, f"{different} of {np.size(expected)} voxels differ"


def read_voxels(path: Path) -> np.ndarray:
    """Decode the voxels in the type that the file stores."""
    if path.name.endswith((".nii", ".nii.gz")):
        return np.asarray(nibabel.load(path).dataobj)
    if path.suffix in (".nrrd", ".mha", ".gipl"):
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    return io.imread(path)


def read_geometry(path: Path) -> Any:
    if path.name.endswith((".nii", ".nii.gz")):
        return nibabel.load(path).header.binaryblock
    if path.suffix in (".nrrd", ".mha", ".gipl"):
        image = SimpleITK.ReadImage(str(path))
        return image.GetSpacing(), image.GetOrigin(), image.GetDirection()
    return None


def assert_same_object(expected: Any, actual: Any, where: str) -> None:
    """Equality of nnU-Net's properties: dictionaries, sequences, arrays, numbers, with their types."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert (where, list(actual)) == (where, list(expected))
        for key, value in expected.items():
            assert_same_object(value, actual[key], f"{where}[{key!r}]")
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype, where
        assert np.array_equal(actual, expected), where
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_object(value, actual[i], f"{where}[{i}]")
    else:
        assert actual == expected, where


def assert_same_return(expected: Any, actual: Any, probabilities: bool) -> None:
    """Lists of segmentations, or of (segmentation, probabilities)."""
    assert len(actual) == len(expected)
    for one, other in zip(expected, actual, strict=True):
        if probabilities:
            assert isinstance(other, tuple)
            assert_same_array(one[0], other[0])
            assert_close_probabilities(one[1], other[1])
        else:
            assert_same_array(one, other)


def own_lines(text: str) -> list[str]:
    """Leave out what nnU-Net before 2.8 prints when it is imported: which of its folders are not set."""
    return [line for line in text.splitlines() if not line.startswith("nnUNet_")]


def assert_one_line(stderr: str, words: Sequence[str]):
    assert stderr.endswith("\n")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, f"more than one line: {stderr!r}"
    for word in words:
        assert word in stderr, f"{word!r} is not in {stderr!r}"
