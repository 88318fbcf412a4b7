"""Volumes in formats that stock does not read: the labels that it finds in a NIfTI of the same voxels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec, write_model
from images import ct, head, second_channel, with_margin
from model_table import REGIONS, TWO_CHANNELS
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray
from oracle import make_predictor, predict_stock
from placing import input_on_disk
from volume_files import WRITERS, read_labels

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import planner
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.types import Place
from nnunet_lowmem.volumes import zarr_stores


class Case(NamedTuple):
    model: str
    voxels: NDArray[Any]
    spacing: tuple[float, ...]
    labels: NDArray[Any]
    folds: tuple[int, ...]
    passes: int


def _made(images: list[SimpleITK.Image], spec: ModelSpec, folder: Path) -> Case:
    """Write NIfTI files that lie nowhere in particular, and what stock makes of them."""
    (folder / "images").mkdir()
    files, arrays = [], []
    for number, image in enumerate(images):
        arrays.append(SimpleITK.GetArrayFromImage(image))
        plain = SimpleITK.GetImageFromArray(arrays[-1])
        plain.SetSpacing(image.GetSpacing())
        files.append(str(folder / "images" / f"case_{number:04d}.nii.gz"))
        SimpleITK.WriteImage(plain, files[-1])
    model = str(write_model(folder / "model", spec, files))
    predictor = make_predictor(nnUNetPredictor, model, spec.folds)
    predict_stock(predictor, [files], [str(folder / "stock")])
    voxels = arrays[0] if len(arrays) == 1 else np.stack([array.astype(np.float32) for array in arrays])
    labels = read_labels(folder / "stock.nii.gz")
    assert len(np.unique(labels)) > 2
    # the box of what is not zero; of float numbers whether all are; mean and deviation; tiles of each fold, or lines
    # and slabs where the image is resampled
    is_copied = spec.spacing == tuple(round(step, 3) for step in images[0].GetSpacing())
    of_image = len(spec.folds) if is_copied else 2
    passes = 1 + (voxels.dtype.kind == "f") + 2 * ("ZScore" in spec.normalisation[0]) + of_image
    return Case(model, voxels, images[0].GetSpacing()[::-1], labels, spec.folds, passes)


def _enlarged(image: SimpleITK.Image, size: tuple[int, int, int]) -> SimpleITK.Image:
    """The same field of view on a finer grid, whole numbers as in the original, 0.6 mm."""
    out = SimpleITK.ResampleImageFilter()
    out.SetReferenceImage(image)
    out.SetSize(size)
    out.SetOutputSpacing([n * old / new for n, old, new in zip(image.GetSize(), image.GetSpacing(), size, strict=True)])
    out.SetInterpolator(SimpleITK.sitkLinear)
    found = out.Execute(image)
    found.SetSpacing((0.6, 0.6, 0.6))
    return found


CASES: dict[str, tuple[Callable[[], list[SimpleITK.Image]], ModelSpec]] = {
    # nothing is resampled: tiles are read from the store while they are predicted
    "same_grid": (lambda: [ct()], ModelSpec(normalisation=("CTNormalization",), spacing=(3.0, 3.0, 3.0))),
    # statistics of the cropped volume, overlapping regions, folds and mirroring
    "cropped_regions_two_folds_mirrored": (
        lambda: [with_margin(head())],
        ModelSpec(**REGIONS, folds=(0, 1), mirror_axes=(1,)),
    ),
    "two_channels_transposed": (
        lambda: [head(), second_channel(head())],
        ModelSpec(**TWO_CHANNELS, transpose_forward=(2, 0, 1)),
    ),
    "300": (
        lambda: [_enlarged(ct(), (300, 300, 300))],
        ModelSpec(
            normalisation=("CTNormalization",), patch_size=(64, 64, 64), spacing=(0.6, 0.6, 0.6), features=(4, 8)
        ),
    ),
    "two_channels_same_grid": (
        lambda: [head(), second_channel(head())],
        ModelSpec(**TWO_CHANNELS, spacing=(5.0, 5.0, 5.0)),
    ),
}


SLOW = ("same_grid", "two_channels_transposed")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES if name != "300"],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    images, spec = CASES[request.param]
    return _made(images(), spec, tmp_path_factory.mktemp(request.param))


def predicted(case: Case, source: Any, target: Path, **options: Any) -> tuple[NDArray[Any], list[CaseReport]]:
    reports: list[CaseReport] = []
    predictor = make_predictor(LowMemPredictor, case.model, case.folds, on_case=reports.append, **options)
    predictor.predict_from_files(source, str(target))
    return read_labels(target), reports


def test_from_a_store_that_is_read_while_tiles_are_predicted(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "placements", input_on_disk)
    decoded, read = Counter[tuple[int, ...]](), zarr_stores.ZarrArray.read

    def counting(array: Any, box: Any) -> Any:
        decoded.update(product(*(range(b.start // n, -(-b.stop // n)) for b, n in zip(box, array.chunks, strict=True))))
        return read(array, box)

    monkeypatch.setattr(zarr_stores.ZarrArray, "read", counting)
    source = tmp_path / "sharded.ome.zarr"
    WRITERS[source.name](source, case.voxels, case.spacing)
    labels, (report,) = predicted(case, source, tmp_path / "labels.ome.zarr")
    assert np.array_equal(labels, case.labels)
    assert report.plan.placement.input is Place.DISK
    assert max(decoded.values()) <= case.passes


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("output", ["y.ome.zarr", "y.tif", "y.h5", "y.nii.gz"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_every_format(
    case: Case, name: str, output: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_disk:
        monkeypatch.setattr(planner, "placements", input_on_disk)
    WRITERS[name](tmp_path / name, case.voxels, case.spacing)
    labels, _ = predicted(case, str(tmp_path / name), tmp_path / output)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, case.labels)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_300_cubed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format in turn, of a volume whose chunks come and go; one after the other, since each takes a minute."""
    images, spec = CASES["300"]
    case = _made(images(), spec, tmp_path)
    monkeypatch.setattr(planner, "placements", input_on_disk)
    for number, name in enumerate(WRITERS):
        WRITERS[name](tmp_path / name, case.voxels, case.spacing)
        labels, (report,) = predicted(case, str(tmp_path / name), tmp_path / f"{number}.ome.zarr")
        assert report.plan.placement.input is Place.DISK
        assert np.array_equal(labels, case.labels), name
