"""Parts of a case: their labels, probabilities and geometry are the whole run's, from no tile but those they need."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from model_table import CHANNELS, REGIONS
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from oracle import assert_close_probabilities, make_predictor, predict_ours, predict_stock
from placing import finest_columns, straight_to_file

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import planner
from nnunet_lowmem.budget.arrays import Placement, allocations
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.errors import CasesFailedError, UsageError
from nnunet_lowmem.labels.counting import counted
from nnunet_lowmem.labels.resampling import resampling_tables
from nnunet_lowmem.nnunet import label_writing, predictors
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.types import Place
from nnunet_lowmem.window.tiling import axis_starts

Bounds = list[tuple[int, int]]

MODELS: dict[str, tuple[ModelSpec, str]] = {
    "z-score": (ModelSpec(), "head"),
    "ct": (ModelSpec(normalisation=("CTNormalization",)), "ct"),
    "cropped": (ModelSpec(transpose_forward=(1, 2, 0), file_ending=".nii"), "head_margin"),
    "masked": (ModelSpec(use_mask_for_norm=(True,)), "head_margin"),
    "two channels": (ModelSpec(**CHANNELS, use_mask_for_norm=(True, False), file_ending=".nii"), "head_holes"),
    "not resampled": (ModelSpec(spacing=(5.0, 5.0, 5.0)), "head"),
    "regions": (ModelSpec(**REGIONS, transpose_forward=(2, 0, 1), file_ending=".nii"), "head_margin"),
    "two folds, mirrored": (ModelSpec(folds=(0, 1), mirror_axes=(2,), file_ending=".nii"), "head"),
    "smaller than the patch": (ModelSpec(patch_size=(40, 40, 40)), "small"),
    "separate z": (ModelSpec(patch_size=(6, 32, 32), spacing=(5.0, 2.0, 2.2)), "aniso"),
    "slices": (ModelSpec(patch_size=(24, 20), spacing=(4.2, 4.3)), "head_margin"),
    "torch's resampling": (ModelSpec(resampling="torch"), "head_margin"),
}


def read_voxels(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Bounds:
    sizes = [rng.randint(1, max(1, 2 * size // 3)) for size in shape]
    starts = [rng.randint(0, whole - size) for whole, size in zip(shape, sizes, strict=True)]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def text_of(box: Bounds) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in box)


def slices_of(box: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in box)


def predict_part(
    model: str, files: list[str], output: Path, folds: Any = (0,), mirrors: bool = True, **options: Any
) -> CaseReport:
    reports: list[CaseReport] = []
    predictor = make_predictor(LowMemPredictor, model, folds, use_mirroring=mirrors, on_case=reports.append, **options)
    predict_ours(predictor, [files], [str(output)])
    return reports[0]


@pytest.fixture(autouse=True)
def _small_maps_leave(monkeypatch) -> None:
    """Let labels go straight to their file as those of large volumes do, wherever they can."""
    monkeypatch.setattr(label_writing, "STREAMED_FROM_BYTES", 0)
    monkeypatch.setattr(planner, "placements", straight_to_file)


# planes become final along the fastest axis of the file; all logits are needed first
KEPT = ["regions", "torch's resampling"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "two folds, mirrored" else []) for name in MODELS],
)
def test_labels_in_random_boxes_and_in_columns_are_those_of_stocks_whole_run(
    name, images, models, tmp_path, monkeypatch
):
    spec, image = MODELS[name]
    files = images(image)
    model = models(spec, files if image != "small" else images("head"))
    predict_stock(make_predictor(nnUNetPredictor, model, spec.folds), [files], [str(tmp_path / "stock")])
    whole = read_voxels(tmp_path / f"stock{spec.file_ending}")
    assert len(np.unique(whole)) > 1, "a map of one value tells nothing"
    rng = random.Random(name)
    may_be_cut = name not in ("smaller than the patch", "torch's resampling")
    for number in range(1 if may_be_cut else 2):
        box = random_box(rng, whole.shape)
        report = predict_part(model, files, tmp_path / str(number), spec.folds, bbox=text_of(box))
        found = read_voxels(tmp_path / f"{number}{spec.file_ending}")
        np.testing.assert_array_equal(found, whole[slices_of(box)], str(box))
        assert report.tiles <= report.tiles_of_case
        assert (report.plan.placement.label_map is None) == (name not in KEPT)
        assert {label.value: label.voxels for label in report.labels} == counted(found)
    if may_be_cut:  # each column is a box, and all of them are the whole
        monkeypatch.setattr(planner, "placements", finest_columns)
        report = predict_part(model, files, tmp_path / "columns", spec.folds)
        np.testing.assert_array_equal(read_voxels(tmp_path / f"columns{spec.file_ending}"), whole)
        assert np.prod(report.plan.placement.columns) > 1
        leaves = spec.file_ending == ".nii" and name not in KEPT  # a compressed file takes planes in order only
        assert (report.plan.placement.label_map is None) == leaves
        assert {label.value: label.voxels for label in report.labels} == counted(whole)
        assert report.tiles_of_case < report.tiles


@pytest.mark.parametrize(
    "name",
    ["cropped", "regions", pytest.param("two folds, mirrored", marks=pytest.mark.slow), "torch's resampling", "slices"],
)
def test_labels_in_a_region_are_those_of_the_whole_run_and_0_elsewhere(name, images, models, tmp_path):
    spec, image = MODELS[name]
    files = images(image)
    model = models(spec, files)
    predict_stock(make_predictor(nnUNetPredictor, model, spec.folds), [files], [str(tmp_path / "stock")])
    whole = read_voxels(tmp_path / f"stock{spec.file_ending}")
    mask = np.zeros_like(whole)
    rng = random.Random(name)
    for _ in range(2):
        mask[slices_of([(a, min(b, a + 5)) for a, b in random_box(rng, whole.shape)])] = 7
    write_like(files[0], mask, tmp_path / "mask.nii.gz")
    report = predict_part(model, files, tmp_path / "part", spec.folds, roi=tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_voxels(tmp_path / f"part{spec.file_ending}"), np.where(mask, whole, 0))
    assert report.tiles < report.tiles_of_case or name == "torch's resampling"
    box = [(0, size // 2) for size in whole.shape]
    predict_part(model, files, tmp_path / "both", spec.folds, roi=str(tmp_path / "mask.nii.gz"), bbox=text_of(box))
    np.testing.assert_array_equal(
        read_voxels(tmp_path / f"both{spec.file_ending}"), np.where(mask, whole, 0)[slices_of(box)]
    )


def write_like(file: str, voxels: np.ndarray, target: Path) -> None:
    image = SimpleITK.GetImageFromArray(voxels)
    image.CopyInformation(SimpleITK.ReadImage(file))
    SimpleITK.WriteImage(image, str(target))


def test_the_tiles_of_a_box_are_all_that_touch_what_its_voxels_are_interpolated_from(images, models, tmp_path):
    """Counted one by one, by the slow way: each output voxel's neighbours, and each tile that holds one of them."""
    spec, files = ModelSpec(), images("head")
    shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0])).shape
    spacing = SimpleITK.ReadImage(files[0]).GetSpacing()[::-1]
    network = tuple(round(n * old / new) for n, old, new in zip(shape, spacing, spec.spacing, strict=True))
    tables = resampling_tables(network, shape, None)
    rng = random.Random(4)
    for number in range(4):
        box = random_box(rng, shape)
        per_axis = []
        for axis, (start, stop) in enumerate(box):
            needed = {*tables[axis].low[start:stop].tolist(), *tables[axis].high[start:stop].tolist()}
            tile = spec.patch_size[axis]
            starts = axis_starts(max(network[axis], tile), tile, 0.5)
            per_axis.append(sum(bool(needed & set(range(first, first + tile))) for first in starts))
        report = predict_part(models(spec, files), files, tmp_path / str(number), mirrors=False, bbox=text_of(box))
        assert report.tiles == np.prod(per_axis), box


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
@pytest.mark.parametrize("codes", [pytest.param("RAS", marks=pytest.mark.slow), "LPS", "SLP"])
def test_a_box_lies_where_it_lies_in_the_whole_file_whoever_reads_it(reader, codes, images, models, tmp_path):
    skip_unless_there(reader)
    turned = SimpleITK.DICOMOrient(SimpleITK.ReadImage(images("head_margin")[0]), codes)
    SimpleITK.WriteImage(turned, str(tmp_path / "turned_0000.nii.gz"))
    files = [str(tmp_path / "turned_0000.nii.gz")]
    model = models(ModelSpec(reader=reader), images("head_margin"))
    predict_stock(make_predictor(nnUNetPredictor, model), [files], [str(tmp_path / "stock")])
    whole = SimpleITK.ReadImage(str(tmp_path / "stock.nii.gz"))
    box = random_box(random.Random(reader + codes), whole.GetSize()[::-1])
    predict_part(model, files, tmp_path / "part", bbox=[slice(*bounds) for bounds in box])
    z, y, x = slices_of(box)
    expected, found = whole[x, y, z], SimpleITK.ReadImage(str(tmp_path / "part.nii.gz"))
    np.testing.assert_array_equal(*map(SimpleITK.GetArrayFromImage, (found, expected)))
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(found, geometry)(), getattr(expected, geometry)(), atol=1e-4)


def skip_unless_there(reader: str) -> None:
    try:
        PlansManager({"image_reader_writer": reader}).image_reader_writer_class  # noqa: B018  # looks it up
    except RuntimeError:
        pytest.skip(f"this nnU-Net has no {reader}")


@pytest.mark.parametrize("name", ["cropped", "regions"])
def test_probabilities_of_a_part_are_those_of_the_whole_run(name, images, models, tmp_path):
    spec, image = MODELS[name]
    files = images(image)
    model = models(spec, files)
    shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0])).shape
    box = [(1, shape[0] // 2), (2, shape[1] - 3), (0, shape[2] // 2)]
    mask = np.zeros(shape, np.uint8)
    mask[: shape[0] // 3] = 1
    write_like(files[0], mask, tmp_path / "mask.nii.gz")
    for output, options in (
        ("whole", {}),
        ("part", {"bbox": text_of(box)}),
        ("region", {"roi": tmp_path / "mask.nii.gz"}),
    ):
        predictor = make_predictor(LowMemPredictor, model, **options)
        predict_ours(predictor, [files], [str(tmp_path / output)], save_probabilities=True)
    whole, part, region = (
        np.load(tmp_path / f"{output}.npz")["probabilities"] for output in ("whole", "part", "region")
    )
    assert_close_probabilities(whole[(slice(None), *slices_of(box))], part)
    background = np.zeros(len(whole), np.float32)
    background[0] = spec.regions_class_order is None
    assert_close_probabilities(np.where(mask, whole, background.reshape(-1, 1, 1, 1)), region)
    returned = predict_ours(make_predictor(LowMemPredictor, model, bbox=box), [files], None, save_probabilities=True)[0]
    np.testing.assert_array_equal(returned[1], part)


def test_logits_that_somebody_else_makes_are_cut(images, models, tmp_path):
    class Other(LowMemPredictor):
        def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
            return super().predict_logits_from_preprocessed_data(data)

    files = images("head_margin")
    model = models(ModelSpec(transpose_forward=(1, 2, 0)), files)
    predict_ours(make_predictor(LowMemPredictor, model), [files], [str(tmp_path / "whole")])
    box = [(3, 20), (4, 11), (8, 30)]
    predict_ours(make_predictor(Other, model, bbox=box), [files], [str(tmp_path / "part")])
    whole = read_voxels(tmp_path / "whole.nii.gz")
    np.testing.assert_array_equal(read_voxels(tmp_path / "part.nii.gz"), whole[slices_of(box)])


def test_arrays_take_a_box_and_an_array_as_mask(images, models):
    files = images("head_margin")
    model = models(ModelSpec(transpose_forward=(1, 2, 0)), files)
    predictor = make_predictor(LowMemPredictor, model)
    image, properties = predictor.plans_manager.image_reader_writer_class().read_images(files)

    def predicted() -> np.ndarray:
        return predictor.predict_single_npy_array(image, dict(properties))

    whole = predicted()
    predictor.bbox = "3:20,4:11,:"
    np.testing.assert_array_equal(predicted(), whole[3:20, 4:11])
    predictor.bbox, predictor.roi = None, np.zeros(whole.shape, bool)
    predictor.roi[5:9, 10:20, 10:20] = True
    np.testing.assert_array_equal(predicted(), np.where(predictor.roi, whole, 0))


def test_where_nothing_is_labelled_no_tile_is_computed(images, models, tmp_path, monkeypatch):
    """Beyond the box of what is not zero, and with an empty mask."""
    files = images("head_margin")
    model = models(ModelSpec(), files)
    assert not SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0]))[0, :3, :3].any()
    plans: list[CasePlanning] = []
    monkeypatch.setattr(
        CasePlanning, "recovery", lambda self, plan, real=CasePlanning.recovery: plans.append(self) or real(self, plan)
    )
    report = predict_part(model, files, tmp_path / "part", bbox="0:1,0:3,0:3")
    beside_gpu = replace(plans[-1].model, device="cuda")  # there is a plan for one, too
    assert list(allocations(beside_gpu, plans[-1].exact, Placement(window=Place.VRAM)))
    assert (report.tiles, read_voxels(tmp_path / "part.nii.gz").any()) == (0, False)
    shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0])).shape
    write_like(files[0], np.zeros(shape, np.uint8), tmp_path / "mask.nii.gz")
    predictor = make_predictor(LowMemPredictor, model, roi=tmp_path / "mask.nii.gz")
    predict_ours(predictor, [files], [str(tmp_path / "empty")], save_probabilities=True)
    assert not read_voxels(tmp_path / "empty.nii.gz").any()
    probabilities = np.load(tmp_path / "empty.npz")["probabilities"]
    assert probabilities.shape[1:] == shape
    assert (probabilities[0] == 1).all()


def test_a_part_that_a_case_cannot_have_fails_that_case_in_a_line(images, models, tmp_path):
    small, head = images("small"), images("head")
    model = models(ModelSpec(), head)
    predictor = make_predictor(LowMemPredictor, model, bbox="0:20,:,:")
    with pytest.raises(CasesFailedError, match=r"along z it goes from 0 to 20, there are \d+"):
        predict_ours(predictor, [small, head], [str(tmp_path / "small"), str(tmp_path / "head")])
    assert [path.name for path in tmp_path.glob("*.nii.gz")] == ["head.nii.gz"]
    predictor = make_predictor(LowMemPredictor, model, roi=head[0])
    with pytest.raises(CasesFailedError, match=r"the mask of the option roi has \(.*\) voxels, the image \(.*\)"):
        predict_ours(predictor, [small], [str(tmp_path / "other")])
    (tmp_path / "masks").mkdir()
    predictor = make_predictor(LowMemPredictor, model, roi=tmp_path / "masks")
    with pytest.raises(CasesFailedError, match=r"holds no mask small\.nii\.gz of case small"):
        predict_ours(predictor, [small], [str(tmp_path / "missing")])
    with pytest.raises(UsageError, match="write z0:z1,y0:y1,x0:x1"):
        predict_ours(make_predictor(LowMemPredictor, model, bbox="3"), [small], [str(tmp_path / "text")])


def test_a_mask_that_lies_elsewhere_is_told_of(images, models, tmp_path, caplog):
    files = images("head")
    image = SimpleITK.ReadImage(files[0])
    mask = SimpleITK.Cast(image > 0, SimpleITK.sitkUInt8)
    SimpleITK.WriteImage(mask, str(tmp_path / "there.nii.gz"))
    mask.SetOrigin([place + 7 for place in image.GetOrigin()])
    SimpleITK.WriteImage(mask, str(tmp_path / "elsewhere.nii.gz"))
    for name, is_told in (("there", False), ("elsewhere", True)):
        caplog.clear()
        predict_part(models(ModelSpec(), files), files, tmp_path / "out", roi=tmp_path / f"{name}.nii.gz")
        assert ("elsewhere.nii.gz does not lie in space where the image lies" in caplog.text) == is_told


def test_a_writer_of_somebody_elses_is_not_asked_for_a_part(images, models, tmp_path, monkeypatch):
    """Stock's loop runs then, over whole cases."""
    files = images("small")
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), images("head")), bbox="0:2,:,:")
    write = SimpleITKIO.write_seg

    def others(self: Any, *arguments: Any) -> None:
        write(self, *arguments)

    monkeypatch.setattr(SimpleITKIO, "write_seg", others)
    monkeypatch.setattr(predictor, "predict_from_data_iterator", lambda *_, **__: pytest.fail("not asked for a part"))
    with pytest.raises(UsageError, match="makes whole cases: the options bbox, roi and output_grid do not reach it"):
        predict_ours(predictor, [files], [str(tmp_path / "small")])


def test_environment_variables_name_a_part(images, models, tmp_path, monkeypatch):
    """As inside a tool that makes its predictor by itself."""
    files = images("head")
    model = models(ModelSpec(), files)
    shape = read_voxels(files[0]).shape
    mask = np.zeros(shape, np.uint8)
    mask[3:9, 4:20] = 1
    write_like(files[0], mask, tmp_path / "mask.nii.gz")
    monkeypatch.setenv("nnUNet_lowmem_bbox", "0:8,:,3:")
    monkeypatch.setenv("nnUNet_lowmem_roi", str(tmp_path / "mask.nii.gz"))
    predict_ours(
        make_predictor(LowMemPredictor, model, **predictors.options("lowmem", LowMemPredictor)),
        [files],
        [str(tmp_path / "part")],
    )
    monkeypatch.setenv("nnUNet_lowmem_bbox", "")
    monkeypatch.delenv("nnUNet_lowmem_roi")
    predict_ours(
        make_predictor(LowMemPredictor, model, **predictors.options("lowmem", LowMemPredictor)),
        [files],
        [str(tmp_path / "whole")],
    )
    whole = read_voxels(tmp_path / "whole.nii.gz")
    np.testing.assert_array_equal(read_voxels(tmp_path / "part.nii.gz"), np.where(mask, whole, 0)[:8, :, 3:])


def test_a_run_is_continued_with_the_same_mask_and_not_with_another(images, models, tmp_path):
    files = images("head")
    model = models(ModelSpec(), files)
    shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0])).shape
    for number, expected in ((1, 1), (1, 0), (2, 1)):
        mask = np.zeros(shape, np.uint8)
        mask[:number] = 1
        if expected:
            write_like(files[0], mask, tmp_path / "mask.nii.gz")
        reports: list[CaseReport] = []
        predictor = make_predictor(LowMemPredictor, model, roi=tmp_path / "mask.nii.gz", on_case=reports.append)
        predict_ours(predictor, [files], [str(tmp_path / "head")], overwrite=False)
        assert len(reports) == expected, number


def test_memory_of_a_part_is_planned_by_its_own_tiles(images, models, tmp_path):
    files = images("head")
    model = models(ModelSpec(patch_size=(12, 12, 12)), files)
    whole = predict_part(model, files, tmp_path / "whole", mirrors=False)
    part = predict_part(model, files, tmp_path / "part", mirrors=False, bbox="10:12,10:12,10:12")
    sizes = [
        {entry.name: entry.size_bytes for entry in report.plan.allocations}["rolling window"]
        for report in (whole, part)
    ]
    assert part.tiles < whole.tiles == part.tiles_of_case
    assert sizes[1] < sizes[0] / 2


def test_masks_lie_in_a_folder_under_the_names_of_cases(images, models, tmp_path):
    cases = [images("head"), images("small")]
    model = models(ModelSpec(), cases[0])
    (tmp_path / "masks").mkdir()
    for files, name in zip(cases, ("head", "small"), strict=True):
        shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files[0])).shape
        write_like(files[0], np.indices(shape).sum(0).astype(np.uint8) % 2, tmp_path / "masks" / f"{name}.nii.gz")
    for folder, options in (("whole", {}), ("part", {"roi": tmp_path / "masks"})):
        (tmp_path / folder).mkdir()
        targets = [str(tmp_path / folder / name) for name in ("head", "small")]
        predict_ours(make_predictor(LowMemPredictor, model, **options), cases, targets)
    for name in ("head.nii.gz", "small.nii.gz"):
        whole, part = (read_voxels(tmp_path / folder / name) for folder in ("whole", "part"))
        np.testing.assert_array_equal(part, whole * (np.indices(whole.shape).sum(0) % 2))
