"""Preprocessing against stock nnU-Net's ``DefaultPreprocessor``: the same image bit for bit, the same properties."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from oracle import INSTALLED
from preprocessing_oracle import (
    LABELS,
    ZSCORE,
    Model,
    aniso,
    as_type,
    assert_same,
    changed,
    ct,
    edges,
    fine_ct,
    head,
    previous_stage_of,
    stock,
    with_holes,
    with_margin,
    write,
)

from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.preprocessing import spline
from nnunet_lowmem.preprocessing.case import preprocess_array, preprocess_case
from nnunet_lowmem.preprocessing.sources import AsRead
from nnunet_lowmem.types import PreprocessedCase

MASK = (True, True, True)
#: Not resampled by the function of nnU-Net's that is known, so that the image has to be kept.
KEPT = ("no_resampling",)


@dataclass(frozen=True)
class Case:
    """One preprocessing; `resamples` and `crops` say what must really happen, so that equality means something."""

    name: str
    images: Callable[[], Sequence[SimpleITK.Image]]
    model: Model = field(default_factory=Model)
    resamples: bool = True
    crops: bool = False
    previous_stage: bool = False


CASES = [
    Case("ct_finer_than_the_model", lambda: [fine_ct()], Model(spacing=(1.5, 1.5, 1.5))),
    Case("ct_coarser_than_the_model", lambda: [ct()[:30, :28, :33]], Model(spacing=(1.1, 1.3, 1.9))),
    Case("ct_up_along_one_axis_down_along_another", lambda: [ct()], Model(spacing=(1.9, 4.1, 3.0))),
    Case("ct_on_the_models_grid", lambda: [ct()], Model(spacing=(3.0, 3.0, 3.0)), resamples=False),
    Case("zscore", lambda: [head()], Model(schemes=ZSCORE), crops=True),
    Case("zscore_on_the_models_grid", lambda: [head()], Model((4.0,) * 3, ZSCORE), resamples=False, crops=True),
    Case("zscore_in_the_mask", lambda: [with_holes(head())], Model(schemes=ZSCORE, masks=MASK), crops=True),
    # strides decide how numpy sums in float32: a crop of some axes only, axes permuted
    Case("zscore_margin", lambda: [with_margin(aniso())], Model((5.0, 2.0, 2.0), ZSCORE), crops=True),
    Case("zscore_margin_transposed", lambda: [with_margin(head())], Model((3.3, 3.9, 5.0), ZSCORE, transpose=(2, 0, 1)),
         crops=True),
    Case("zscore_float64", lambda: [as_type(head(), np.float64)], Model(schemes=ZSCORE), crops=True),
    Case("rescale", lambda: [head()], Model(schemes=("RescaleTo01Normalization",)), crops=True),
    Case("rgb", lambda: [head()], Model(schemes=("RGBTo01Normalization",)), crops=True),
    Case("no_normalisation", lambda: [head()], Model(schemes=("NoNormalization",)), crops=True),
    Case("margin", lambda: [with_margin(as_type(head(), np.int16))], crops=True),
    # the first planes show the whole extent of the rows, not that of the columns
    Case("box_grows_with_the_planes",
         lambda: [changed(ct(), lambda a: np.where((np.arange(60) < 9)[:, None, None] & (np.arange(70) > 60), 0, a))]),
    Case("all_zero", lambda: [changed(head(), np.zeros_like)], Model(schemes=ZSCORE, masks=MASK)),
    Case("all_zero_ct", lambda: [changed(head(), np.zeros_like)]),
    Case("float32_file", lambda: [edges(head())], Model(schemes=ZSCORE)),
    Case("float64_file", lambda: [as_type(ct(), np.float64)]),
    Case("int32_file", lambda: [changed(ct(), lambda a: a.astype(np.int32) * 100_003)]),
    Case("int64_file", lambda: [changed(ct(), lambda a: a.astype(np.int64) * 1_000_000_007)]),
    # too small for float32: nonzero in the file, zero for nnU-Net
    Case("vanishes_in_float32", lambda: [changed(head(), lambda a: np.where(a == 0, 1e-60, a))], crops=True),
    # one channel's zeros are another's voxels: the box is that of both
    Case("two_channels", lambda: [with_margin(head()), with_margin(edges(head()))],
         Model(schemes=("CTNormalization", "ZScoreNormalization"), masks=(False, True)), crops=True),
    Case("two_channels_of_disjoint_parts",
         lambda: [changed(head(), lambda a: np.where(np.arange(46) < 20, a, 0)),
                  changed(head(), lambda a: np.where(np.arange(46) < 20, 0, a).astype(np.float32))],
         Model(schemes=ZSCORE * 2, masks=MASK), crops=True),
    Case("channels_in_one_4d_file",
         lambda: [SimpleITK.JoinSeries([edges(head()), SimpleITK.Cast(head(), SimpleITK.sitkFloat32)])],
         Model(schemes=ZSCORE * 2)),
    Case("transposed_120", lambda: [ct()[:40, :46, :52]], Model((3.3, 3.9, 5.0), transpose=(1, 2, 0))),
    Case("transposed_201", lambda: [ct()[:40, :46, :52]], Model((3.3, 3.9, 5.0), transpose=(2, 0, 1))),
    Case("transposed_021", lambda: [ct()[:40, :46, :52]], Model((3.3, 3.9, 5.0), transpose=(0, 2, 1))),
    Case("separate_z", lambda: [aniso()], Model((6.5, 1.9, 1.2))),
    Case("separate_z_more_slices", lambda: [aniso()], Model((3.1, 1.9, 1.2), ZSCORE)),
    Case("separate_z_fewer_slices", lambda: [aniso()], Model((13.0, 1.9, 1.2))),
    Case("separate_z_twice_the_slices", lambda: [aniso()], Model((3.25, 1.5625, 1.5625))),
    Case("separate_z_of_the_target", lambda: [ct()[:40, :40, :40]], Model((9.9, 2.7, 2.2))),
    Case("separate_z_second_axis", lambda: [aniso()], Model((1.9, 5.0, 1.2), transpose=(1, 0, 2))),
    Case("separate_z_last_axis", lambda: [aniso()], Model((1.9, 1.2, 5.0), transpose=(1, 2, 0))),
    Case("separate_z_forced", lambda: [fine_ct()], Model((2.2, 1.5, 1.5), data={"force_separate_z": True})),
    Case("separate_z_forced_without_an_axis", lambda: [ct()], Model(data={"force_separate_z": True})),
    Case("separate_z_forbidden", lambda: [aniso()], Model((5.1, 1.9, 1.2), data={"force_separate_z": False})),
    Case("separate_z_threshold", lambda: [aniso()],
         Model((5.1, 1.9, 1.2), data={"separate_z_anisotropy_threshold": 9})),
    Case("2d", lambda: [aniso()], Model(spacing=(1.9, 1.2))),
    Case("2d_of_isotropic", lambda: [ct()[:40, :40, :20]], Model(spacing=(4.1, 2.2))),
    Case("2d_of_isotropic_transposed", lambda: [ct()[:40, :40, :20]], Model(spacing=(4.1, 2.2), transpose=(2, 1, 0))),
    Case("2d_image", lambda: [aniso()[:, :, 8]], Model(spacing=(1.9, 1.2))),
    Case("one_voxel", lambda: [ct()[:1, :1, :1]], Model(spacing=(1.0, 1.0, 1.0))),
    Case("one_voxel_kept", lambda: [ct()[:1, :1, :1]], Model(spacing=(3.0,) * 3), resamples=False),
    Case("one_slice", lambda: [head()[:, :, 20:21]], Model(schemes=ZSCORE, masks=MASK), crops=True),
    Case("one_row", lambda: [ct()[:, :1, :1]]),
    Case("to_one_voxel", lambda: [ct()[:5, :4, :3]], Model(spacing=(9.0, 12.0, 15.0))),
    Case("strong_downsampling", lambda: [fine_ct()], Model(spacing=(13.0, 8.1, 7.7))),
    Case("strong_upsampling", lambda: [ct()[:7, :6, :9]], Model(spacing=(0.6, 0.4, 0.5))),
    Case("cascade", lambda: [with_margin(head())], Model(schemes=ZSCORE), crops=True, previous_stage=True),
    Case("cascade_in_the_mask", lambda: [with_holes(head())], Model((3.1, 4.4, 4.0), ZSCORE, MASK, (1, 2, 0)),
         crops=True, previous_stage=True),
    Case("cascade_separate_z", lambda: [with_margin(aniso())], Model((4.1, 1.9, 1.2)), crops=True, previous_stage=True),
    Case("cascade_on_the_models_grid", lambda: [head()], Model((4.0,) * 3), resamples=False, crops=True,
         previous_stage=True),
    # not ours: called as they are
    Case("order_1", lambda: [ct()], Model(data={"order": 1})),
    Case("order_z_1", lambda: [aniso()], Model((4.1, 1.9, 1.2), data={"order_z": 1})),
    Case("order_z_1_same_slices", lambda: [aniso()], Model((6.5, 1.9, 1.2), data={"order_z": 1})),
    Case("torch_resampling", lambda: [ct()], Model(functions=("resample_torch_fornnunet",) * 2)),
    Case("no_resampling", lambda: [ct()], Model(functions=("no_resampling_hack",) * 2), resamples=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_stock(case: Case, tmp_path) -> None:
    if INSTALLED < (2, 6) and case.name == "no_resampling":
        pytest.skip("new in nnU-Net 2.6")
    images = case.images()
    files = write(tmp_path, images)
    previous = None
    if case.previous_stage:
        previous = files[0].replace("case_0000", "previous")
        SimpleITK.WriteImage(previous_stage_of(images[0]), previous)
    expected = stock(files, previous, case.model)
    actual = preprocess_case(files, previous, *case.model.managers(), LABELS, threads=2)
    assert_same(actual, expected, case.previous_stage)
    _assert_same_from_disk(case, files, previous, actual, tmp_path)
    properties = actual.properties
    cropped = properties["shape_after_cropping_and_before_resampling"]
    assert (cropped != properties["shape_before_cropping"]) == case.crops
    assert (actual.image.shape[1:] != cropped) == case.resamples
    if case.previous_stage:
        assert set(np.unique(actual.previous_stage)) == {-1, 0, 1, 2}


def _assert_same_from_disk(
    case: Case, files: list[str], previous: str | None, expected: PreprocessedCase, folder: Path
) -> None:
    """Nothing of the input in RAM: part by part out of its files and, compressed, out of a file of raw voxels."""
    compressed = [file + ".gz" for file in files]
    for file, smaller in zip(files, compressed, strict=True):
        Path(smaller).write_bytes(gzip.compress(Path(file).read_bytes(), 1))
    for paths, spills in ((files, 0), (compressed, len(files))):
        made: list[np.ndarray] = []

        def spill(shape: tuple[int, ...], dtype: np.dtype, made: list[np.ndarray] = made) -> np.ndarray:
            made.append(np.memmap(folder / f"spilled_{len(made)}", mode="w+", shape=shape, dtype=dtype))
            return made[-1]

        managers = case.model.managers()
        actual = preprocess_case(paths, previous, *managers, LABELS, spill=spill, keeps_image=False)
        assert sum(array.dtype != bool for array in made) == spills
        assert sum(array.dtype == bool for array in made) <= any(case.model.masks), (
            "a mask is made where it is asked for"
        )
        image, stage = np.asarray(actual.image), expected.previous_stage
        due = expected.image, stage if stage is None else stage[None], expected.properties
        assert_same(replace(actual, image=image), due, case.previous_stage)
        if isinstance(actual.image, AsRead):
            box = tuple(slice(size // 3, size - size // 4) for size in image.shape[1:])
            assert np.array_equal(actual.image[(slice(None), *box)], image[(slice(None), *box)])
            part = actual.image.within(box)
            assert part.shape == (len(image), *(len(range(*cut.indices(10**6))) for cut in box))
            assert np.array_equal(part[:1, 1:, :, :-1], image[(slice(None), *box)][:1, 1:, :, :-1])
        assert isinstance(actual.image, AsRead) == (not case.resamples and case.name not in KEPT)


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_array_equals_stock_and_stays_untouched(case: Case, tmp_path) -> None:
    plans, configuration = case.model.managers()
    image, properties = plans.image_reader_writer_class().read_images(write(tmp_path, case.images()))
    before, ours = image.copy(), dict(properties)
    expected = DefaultPreprocessor(verbose=False).run_case_npy(image, None, properties, plans, configuration, LABELS)
    actual = preprocess_array(image, None, ours, plans, configuration, LABELS)
    assert actual.properties is ours
    assert_same(actual, (expected[0], expected[1], properties))
    assert np.array_equal(image, before)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "channels_last": lambda a: np.ascontiguousarray(np.moveaxis(a, 0, -1)).transpose(3, 0, 1, 2),
    "channels_between": lambda a: np.ascontiguousarray(a.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3),
    "reversed": lambda a: np.ascontiguousarray(a[:, ::-1, :, ::-1])[:, ::-1, :, ::-1],
    "part_of_a_larger_array": lambda a: np.pad(a, [(0, 0), (0, 0), (1, 2), (3, 0)])[:, :, 1:-2, 3:],
    "float16": lambda a: a.astype(np.float16),
    "big_endian": lambda a: a.astype(">f4"),
    "uint8": lambda a: a.astype(np.uint8),
    "bool": lambda a: a > 100,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2])
def test_array_in_any_layout_equals_stock(layout: str, channels: int) -> None:
    # no crop: it would break up the runs that numpy sums in one go, whatever the layout
    array = SimpleITK.GetArrayFromImage(edges(head()))
    image = LAYOUTS[layout](np.stack([array, array[::-1] * 0.3][:channels]))
    model = Model(schemes=ZSCORE * channels, transpose=(1, 0, 2))
    properties, ours = {"spacing": [4.0, 4.0, 4.0]}, {"spacing": [4.0, 4.0, 4.0]}
    expected = DefaultPreprocessor(False).run_case_npy(image, None, properties, *model.managers(), LABELS)
    actual = preprocess_array(image, None, ours, *model.managers(), LABELS, threads=2)
    assert_same(actual, (expected[0], expected[1], properties))


def test_previous_stage_in_memory_equals_stock_and_stays_untouched() -> None:
    image = SimpleITK.GetArrayFromImage(with_margin(head()))[None]
    previous = SimpleITK.GetArrayFromImage(previous_stage_of(with_margin(head())))[None]
    properties, ours = {"spacing": [4.0, 4.0, 4.0]}, {"spacing": [4.0, 4.0, 4.0]}
    managers = Model(transpose=(2, 0, 1)).managers()
    expected = DefaultPreprocessor(False).run_case_npy(image, previous.astype(np.int16), properties, *managers, LABELS)
    actual = preprocess_array(image, previous, ours, *managers, LABELS)
    assert_same(actual, (expected[0], expected[1], properties), previous_stage=True)
    assert previous.min() == 0


@st.composite
def arrays_and_spacings(draw) -> tuple[np.ndarray, list[float], Model]:
    shape = draw(st.tuples(*[st.integers(1, 24)] * 3))
    image = np.random.default_rng(draw(st.integers(0, 2**32))).integers(-900, 400, (1, *shape)).astype(np.int16)
    image[:, : draw(st.integers(0, 2))] = 0
    image[..., : draw(st.integers(0, 2))] = 0
    spacings = st.floats(0.4, 6.0)
    spacing = draw(st.lists(spacings, min_size=3, max_size=3))
    transpose = draw(st.permutations([0, 1, 2]))
    model = Model(
        spacing=tuple(spacing[axis] * shape[axis] / draw(st.integers(1, 30)) for axis in transpose),
        schemes=(draw(st.sampled_from(["CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization"])),),
        masks=(draw(st.booleans()),),
        transpose=tuple(transpose),
        data={"force_separate_z": draw(st.sampled_from([None, True, False]))},
    )
    return image, spacing, model


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrays_and_spacings())
def test_any_shape_and_spacing_equals_stock(example) -> None:
    image, spacing, model = example
    properties, ours = {"spacing": spacing}, {"spacing": spacing}
    try:
        expected = DefaultPreprocessor(False).run_case_npy(image, None, properties, *model.managers(), LABELS)
    except (ValueError, ZeroDivisionError):  # what is left after the crop is less than half a voxel
        with pytest.raises(UsageError, match="leaves"):
            preprocess_array(image, None, ours, *model.managers(), LABELS)
        return
    actual = preprocess_array(image, None, ours, *model.managers(), LABELS, threads=2)
    assert_same(actual, (expected[0], expected[1], properties))


def test_without_matching_kernels_nnunet_resamples(monkeypatch, tmp_path) -> None:
    files = write(tmp_path, [ct()])
    monkeypatch.setattr(spline, "matches_scipy", lambda: False)
    monkeypatch.setattr(spline, "zoom_cubic", None)
    assert_same(preprocess_case(files, None, *Model().managers(), LABELS), stock(files, None, Model()))


def test_does_not_make_a_segmentation_for_a_ct(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("nnunet_lowmem.preprocessing.case.nonzero_mask", None)
    monkeypatch.setattr("nnunetv2.preprocessing.resampling.default_resampling.resample_data_or_seg", None)
    files = write(tmp_path, [with_margin(as_type(head(), np.int16))])
    assert preprocess_case(files, None, *Model().managers(), LABELS).image.any()


def test_allocate_makes_the_image(tmp_path) -> None:
    files = write(tmp_path, [ct()])
    on_disk = partial(np.memmap, tmp_path / "image", mode="w+")
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(on_disk(shape=shape, dtype=dtype))
        return made[-1]

    case = preprocess_case(files, None, *Model().managers(), LABELS, threads=2, allocate=allocate)
    assert len(made) == 1
    assert case.image is made[0]
    assert_same(case, stock(files, None, Model()))


def test_leaves_no_thread_behind(tmp_path) -> None:
    files = write(tmp_path, [ct()])
    before = threading.active_count()
    preprocess_case(files, None, *Model().managers(), LABELS, threads=3)
    assert threading.active_count() == before


def test_other_preprocessor_class_is_called(monkeypatch, tmp_path) -> None:
    class Doubling(DefaultPreprocessor):
        def run_case_npy(self, *args: Any) -> Any:
            data, *rest = super().run_case_npy(*args)
            return 2 * data, *rest

    files = write(tmp_path, [ct()])
    expected = stock(files, None, Model())
    plans, configuration = Model().managers()
    monkeypatch.setattr(type(configuration), "preprocessor_class", Doubling)
    case = preprocess_case(files, None, plans, configuration, LABELS)
    assert_same(case, (2 * expected[0], *expected[1:]))
    image, properties = plans.image_reader_writer_class().read_images(files)
    assert_same(preprocess_array(image, None, properties, plans, configuration, LABELS), (case.image, *expected[1:]))


def test_other_normalisation_is_called_with_the_whole_channel_and_the_mask(monkeypatch, tmp_path) -> None:
    seen = []

    class Shifting(ZScoreNormalization):
        def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
            seen.append(None if seg is None else seg.copy())
            return super().run(image, seg) + np.float32(3)

    for module in (
        "nnunetv2.preprocessing.preprocessors.default_preprocessor",
        "nnunet_lowmem.preprocessing.normalisation",
    ):
        monkeypatch.setattr(f"{module}.recursive_find_python_class", lambda *args: Shifting)
    files = write(tmp_path, [with_holes(head())])
    expected = stock(files, None, Model())
    assert_same(preprocess_case(files, None, *Model().managers(), LABELS), expected)
    assert len(seen) == 2
    assert np.array_equal(*seen)
    assert set(np.unique(seen[0])) == {-1, 0}


def test_resampling_function_gets_all_channels_at_once(monkeypatch, tmp_path) -> None:
    shapes = []

    def mixing(data: np.ndarray, *args: Any) -> np.ndarray:
        shapes.append(data.shape)
        return resample_data_or_seg_to_shape(data, *args, order=3) + data.mean()

    model = Model(schemes=("CTNormalization",) * 2)
    files = write(tmp_path, [ct(), ct()])
    monkeypatch.setattr(ConfigurationManager, "resampling_fn_data", partial(mixing))
    expected = stock(files, None, model)
    assert_same(preprocess_case(files, None, *model.managers(), LABELS), expected)
    assert shapes[0] == shapes[1] == (2, *expected[2]["shape_after_cropping_and_before_resampling"])


@pytest.mark.parametrize("given, wanted", [(1, 2), (2, 1)])
def test_wrong_number_of_channels_is_refused_with_both_numbers(given: int, wanted: int, tmp_path) -> None:
    with pytest.raises(UsageError, match=f"has {given} channels, the model takes {wanted}"):
        preprocess_case(write(tmp_path, [ct()] * given), None, *Model(schemes=ZSCORE * wanted).managers(), LABELS)


def test_previous_stage_of_another_shape_is_refused_with_both_shapes(tmp_path) -> None:
    previous = str(tmp_path / "previous.nii")
    SimpleITK.WriteImage(previous_stage_of(head())[1:], previous)
    with pytest.raises(UsageError, match=r"shape \(46, 55, 45\), the image has \(46, 55, 46\)"):
        preprocess_case(write(tmp_path, [head()]), previous, *Model().managers(), LABELS)


def test_resampling_to_nothing_is_refused_with_both_spacings(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"\[3\.0, 3\.0, 3\.0\] to \[99\.0, 3\.0, 3\.0\] mm leaves \(0, 4, 4\)"):
        preprocess_case(write(tmp_path, [ct()[:4, :4, :4]]), None, *Model(spacing=(99.0, 3.0, 3.0)).managers(), LABELS)


def test_unknown_normalisation_is_named() -> None:
    image = np.ones((1, 4, 4, 4), np.float32)
    with pytest.raises(ModelError, match="GhostNormalization"):
        preprocess_array(
            image, None, {"spacing": [1, 1, 1]}, *Model(schemes=("GhostNormalization",)).managers(), LABELS
        )
