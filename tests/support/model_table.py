"""The table of `test_every_model`: a row is a model, an image, and the options of one prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from factory import ModelSpec


@dataclass(frozen=True)
class Row:
    """One prediction; `classes` values at least must occur in stock's map, so that equality means something."""

    name: str
    spec: ModelSpec = field(default_factory=ModelSpec)
    image: str = "head"
    fit: str | None = None
    classes: int = 3
    folds: Any = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    probabilities: bool = False
    in_memory: bool = False
    slow: bool = False


OVERLAPPING = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
LARGE_VALUES = {"background": 0, "a": [1, 2], "b": 300, "c": 256, "d": 2}
MANY_IN_REGIONS = {"background": 0, "all": list(range(1, 261)), "upper": list(range(200, 261)), "top": 260}
REGIONS: dict[str, Any] = {"labels": OVERLAPPING, "regions_class_order": (1, 2, 3)}
CHANNELS: dict[str, Any] = {"channels": ("T1", "edges"), "normalisation": ("ZScoreNormalization",) * 2}
TWO_CHANNELS = {**CHANNELS, "use_mask_for_norm": (False, False)}

LABELS = [
    # regions overlap: later entries of regions_class_order overwrite earlier ones, voxels in none stay background
    Row("regions", ModelSpec(**REGIONS)),
    # same, where the network's grid is the image's: no resampling, only the threshold
    Row("regions_same_grid", ModelSpec(labels=OVERLAPPING, regions_class_order=(3, 1, 2), spacing=(5.0, 5.0, 5.0))),
    # four foreground labels make a uint8 map, which 300 and 256 do not fit: they wrap to 44 and 0, as in stock
    Row("regions_wrap_in_uint8", ModelSpec(labels=LARGE_VALUES, regions_class_order=(1, 300, 256, 2))),
    # the same values fit when 255 or more foreground labels make the map uint16
    Row("regions_uint16", ModelSpec(labels=MANY_IN_REGIONS, regions_class_order=(1, 300, 260)), slow=True),
    # an ignore label beside regions gets no head
    Row("regions_ignore", ModelSpec(labels={**OVERLAPPING, "ignore": 4}, regions_class_order=(1, 2, 3))),
    # an ignore label has no head of its own and never appears
    Row("ignore_label", ModelSpec(labels={"background": 0, "a": 1, "b": 2, "ignore": 3})),
    # label values with gaps: the map holds the index of the head
    Row("labels_with_gaps", ModelSpec(labels={"background": 0, "a": 5, "b": 9, "c": 40})),
    # one foreground class
    Row("two_classes", ModelSpec(labels=2), classes=2),
    # 254 foreground labels are the most that a uint8 map takes, 255 the fewest of a uint16 map
    Row("255_classes", ModelSpec(labels=255, patch_size=(32, 32, 32)), classes=200, slow=True),
    Row("256_classes", ModelSpec(labels=256, patch_size=(32, 32, 32)), classes=200),
    # uint16 map, uint16 file
    Row("300_classes", ModelSpec(labels=300, patch_size=(32, 32, 32)), classes=240, slow=True),
    # the head alone is hundreds of megabytes per tile in a full-sized patch
    Row("700_classes", ModelSpec(labels=700, patch_size=(24, 24, 24), spacing=(6.5, 7.0, 7.5)), classes=500),
]

INPUT = [
    # two files per case, each normalised on its own
    Row("two_channels", ModelSpec(**TWO_CHANNELS), "head_two_channels"),
    # statistics over the nonzero mask only, closed pockets filled, open ones not; one channel masked, one not
    Row("mask_for_norm", ModelSpec(**CHANNELS, use_mask_for_norm=(True, False)), "head_holes"),
    # masked, and with the mask's own crop
    Row("mask_for_norm_margin", ModelSpec(use_mask_for_norm=(True,)), "head_margin", slow=True),
    # a single slice: the hole filling is three-dimensional, so nothing is filled
    Row("mask_for_norm_one_slice", ModelSpec(use_mask_for_norm=(True,)), "one_slice", "head", classes=2),
    # minimum to 0, maximum to 1
    Row("rescale_to_01", ModelSpec(normalisation=("RescaleTo01Normalization",)), slow=True),
    # clipped and scaled by the plans' intensities
    Row("ct_normalisation", ModelSpec(normalisation=("CTNormalization",)), "ct"),
    Row("no_normalisation", ModelSpec(normalisation=("NoNormalization",)), slow=True),
    # a different scheme for each channel
    Row(
        "mixed_normalisation",
        ModelSpec(**{**TWO_CHANNELS, "normalisation": ("CTNormalization", "RescaleTo01Normalization")}),
        "head_two_channels",
    ),
    # 4D file: all channels in one; SimpleITKIO reads it but cannot write its geometry, so arrays are returned
    Row(
        "channels_in_4d_file",
        ModelSpec(**TWO_CHANNELS),
        "head_4d",
        in_memory=True,
    ),
]

SHAPES = [
    # asymmetric zero margin: cropped before, zero after
    Row("zero_margin", ModelSpec(), "head_margin"),
    # nothing to crop to
    Row("all_zero", ModelSpec(), "zeros", "head", classes=1),
    # the network's axis 0 is another axis of the file
    Row("transpose_120", ModelSpec(transpose_forward=(1, 2, 0)), "head_margin"),
    Row("transpose_201", ModelSpec(transpose_forward=(2, 0, 1)), "head_margin", slow=True),
    Row("transpose_210", ModelSpec(transpose_forward=(2, 1, 0)), "head_margin", slow=True),
    Row("transpose_102_regions", ModelSpec(**REGIONS, transpose_forward=(1, 0, 2))),
    # padded to the patch, cut afterwards, on all three axes
    Row("smaller_than_patch", ModelSpec(patch_size=(40, 40, 40)), "small", "head", classes=2),
    Row("one_voxel", ModelSpec(), "one_voxel", "head", classes=1),
    # thin along each axis in turn
    Row("one_slice", ModelSpec(), "one_slice", "head", classes=2),
    Row("one_row", ModelSpec(), "one_row", "head", classes=1),
    Row("two_columns", ModelSpec(), "two_columns", "head", classes=2),
    # one tile on axis 0, several on the others: the window rolls along another axis
    Row("one_tile_on_axis_0", ModelSpec(patch_size=(48, 20, 24))),
    # finer than the image, and coarser
    Row("upsampled_for_network", ModelSpec(spacing=(3.3, 3.6, 2.9))),
    Row("downsampled_for_network", ModelSpec(spacing=(6.9, 7.5, 6.1))),
]


def anisotropic(name: str, image: str = "aniso", **changes: Any) -> Row:
    base: dict[str, Any] = {"patch_size": (6, 32, 32), "spacing": (5.0, 2.0, 2.2)}
    kwargs = {k: changes.pop(k) for k in ("order_z", "force_separate_z", "order") if k in changes}
    return Row(name, ModelSpec(**{**base, **changes}, probabilities_kwargs=kwargs), image)


ANISOTROPY = [
    # 6.5 mm slices: bilinear in plane, nearest along z, halves upwards
    anisotropic("separate_z"),
    # nearest along z with an exact 1:2 and 2:1 ratio: every coordinate is a tie
    anisotropic("separate_z_ties_up", spacing=(13.0, 2.0, 2.0), patch_size=(4, 32, 32)),
    anisotropic("separate_z_ties_down", spacing=(3.25, 1.0, 1.0), patch_size=(12, 32, 32)),
    # linear along z
    anisotropic("separate_z_order_1", order_z=1),
    # in-plane grid unchanged, only z differs, and the other way round
    anisotropic("separate_z_only", spacing=(4.5, 1.5625, 1.5625)),
    anisotropic("separate_z_in_plane_only", spacing=(6.5, 2.0, 2.2)),
    # separation off and on by order; "on" looks at the network's spacing alone
    anisotropic("force_separate_z_false", force_separate_z=False),
    anisotropic("force_separate_z_true", force_separate_z=True),
    anisotropic("force_separate_z_true_order_1", force_separate_z=True, order_z=1),
    # two axes share the largest spacing: no separation although it is forced
    anisotropic("two_coarse_axes", spacing=(5.0, 5.0, 1.5), force_separate_z=True),
    # the original spacing decides: the network's is isotropic
    anisotropic("image_spacing_decides", spacing=(2.5, 2.5, 2.5), patch_size=(24, 24, 24)),
    # the network's spacing decides: the image is isotropic; its coarse axis is the last one
    anisotropic("network_spacing_decides", "head", spacing=(4.1, 4.1, 15.5), patch_size=(24, 24, 6)),
    # coarse axis in the middle
    anisotropic("coarse_axis_1", "head", spacing=(4.1, 15.5, 4.3), patch_size=(24, 6, 24), order_z=1),
    # coarse axis of the file brought to the front
    anisotropic("sagittal_transposed", "aniso_sagittal", transpose_forward=(2, 0, 1)),
    # nearest neighbour everywhere, and an order that is not linear
    anisotropic("order_0", "head", spacing=(3.9, 4.2, 4.3), patch_size=(24, 24, 24), order=0),
    anisotropic("order_3", "head", spacing=(3.9, 4.2, 4.3), patch_size=(24, 24, 24), order=3),
]

ENSEMBLES = [
    Row("two_folds", ModelSpec(folds=(0, 1)), folds=(0, 1)),
    # nnUNetv2_predict's default
    Row("five_folds", ModelSpec(folds=(0, 1, 2, 3, 4), patch_size=(32, 32, 32)), folds=(0, 1, 2, 3, 4), slow=True),
    # order and selection are the caller's, also as the strings that the command line gives
    Row("folds_selected", ModelSpec(folds=(0, 1, 2, 3, 4), patch_size=(32, 32, 32)), folds=("3", "1"), slow=True),
    Row("folds_detected", ModelSpec(folds=(0, 2, "all")), folds=None, slow=True),
    Row("fold_all", ModelSpec(folds=("all",)), folds="all"),
    Row("folds_regions", ModelSpec(**REGIONS, folds=(0, 1, 2)), folds=(0, 1, 2), slow=True),
    # every mirroring, some, one, and none although the model allows all
    Row("mirror_012", ModelSpec(mirror_axes=(0, 1, 2), spacing=(6.0, 6.1, 6.2))),
    Row("mirror_12", ModelSpec(mirror_axes=(1, 2)), slow=True),
    Row("mirror_02", ModelSpec(mirror_axes=(0, 2)), slow=True),
    Row("mirror_0", ModelSpec(mirror_axes=(0,)), slow=True),
    Row("mirror_off", ModelSpec(mirror_axes=(0, 1, 2)), options={"use_mirroring": False}),
    Row("mirror_folds", ModelSpec(mirror_axes=(1,), folds=(0, 1)), folds=(0, 1), slow=True),
    # overlap from three quarters to none; none leaves n_predictions at a single Gaussian
    Row("step_025", ModelSpec(patch_size=(32, 32, 32)), options={"tile_step_size": 0.25}, slow=True),
    Row("step_03", ModelSpec(patch_size=(36, 36, 36)), options={"tile_step_size": 0.3}),
    Row("step_07", options={"tile_step_size": 0.7}, slow=True),
    Row("step_1", options={"tile_step_size": 1.0}),
    Row("no_gaussian", options={"use_gaussian": False}, slow=True),
    Row(
        "no_gaussian_step_1_folds",
        ModelSpec(folds=(0, 1)),
        folds=(0, 1),
        options={"use_gaussian": False, "tile_step_size": 1},
    ),
]

FLAT: dict[str, Any] = {"patch_size": (32, 28), "spacing": (3.9, 4.4)}
PICTURE: dict[str, Any] = {"patch_size": (64, 48), "spacing": (1.0, 1.0), "reader": "NaturalImage2DIO"}


def colours(names: str) -> dict[str, Any]:
    count = len(names)
    return {
        "channels": tuple(names),
        "normalisation": ("RGBTo01Normalization",) * count,
        "use_mask_for_norm": (False,) * count,
    }


TWO_D = [
    # slices of a volume: axis 0 keeps the image's spacing and is the outermost loop
    Row("2d_of_3d", ModelSpec(**FLAT)),
    Row("2d_mirror", ModelSpec(**FLAT, mirror_axes=(0, 1)), "aniso"),
    # slices along another axis of the file
    Row("2d_transposed", ModelSpec(**FLAT, transpose_forward=(2, 0, 1)), "head_margin", slow=True),
    Row("2d_folds_regions", ModelSpec(**FLAT, **REGIONS, folds=(0, 1)), folds=(0, 1)),
    # the slices are 999 times as far apart: in-plane resampling only, never along axis 0
    Row("png", ModelSpec(**PICTURE, file_ending=".png"), "picture"),
    # colours are channels within one file
    Row("png_rgb", ModelSpec(**PICTURE, **colours("RGB"), file_ending=".png", mirror_axes=(0, 1)), "picture_rgb"),
    Row("png_rgba", ModelSpec(**PICTURE, **colours("RGBA"), file_ending=".png"), "picture_rgba", slow=True),
    Row("tif_2d", ModelSpec(**PICTURE, file_ending=".tif"), "picture"),
    Row("bmp", ModelSpec(**PICTURE, file_ending=".bmp", labels=30), "picture", classes=20),
    # a picture that is resampled
    Row("png_resampled", ModelSpec(**{**PICTURE, "spacing": (1.7, 1.3)}, file_ending=".png"), "picture"),
    # more classes than a png of 8 bits holds
    Row("png_300_classes", ModelSpec(**PICTURE, file_ending=".png", labels=300), "picture", classes=200),
    # a two-dimensional NIfTI through SimpleITK
    Row("nifti_2d", ModelSpec(patch_size=(40, 40), spacing=(1.1, 0.9)), "slice"),
]

ARCHITECTURES = [
    Row("residual_encoder", ModelSpec(architecture="ResidualEncoderUNet")),
    # nnUNetPlannerResEncL_torchres: float32 from trilinear torch, not rounded to half
    Row(
        "torch_resampling",
        ModelSpec(
            architecture="ResidualEncoderUNet", resampling="torch", probabilities_kwargs={"force_separate_z": False}
        ),
    ),
    # more classes than one group holds, and a last group that is not full
    Row(
        "torch_resampling_37_classes",
        ModelSpec(resampling="torch", labels=37, patch_size=(32, 32, 32)),
        classes=20,
        slow=True,
    ),
    Row("torch_regions", ModelSpec(resampling="torch", **REGIONS), "head_margin", slow=True),
    # nnUNetPlannerResEncL_torchres_sepz: nearest-exact along z
    Row("torch_separate_z", ModelSpec(resampling="torch", patch_size=(6, 32, 32), spacing=(5.0, 2.0, 2.2)), "aniso"),
    Row("torch_2d", ModelSpec(**FLAT, resampling="torch")),
    # the network's grid is the image's, whatever the spacings say
    Row("no_resampling", ModelSpec(resampling="none"), "head_margin"),
    # plans of nnU-Net 2.0 to 2.3: no architecture entry, modality instead of channel_names
    Row("legacy_plans", ModelSpec(legacy_plans=True)),
    # a trainer from nnU-Net's own variants
    Row("trainer_variant", ModelSpec(trainer="nnUNetTrainerNoMirroring"), slow=True),
    # three stages
    Row("three_stages", ModelSpec(features=(6, 8, 10), patch_size=(32, 32, 32)), slow=True),
]

READERS = [
    Row("nrrd", ModelSpec(file_ending=".nrrd"), "head_oblique"),
    Row("mha", ModelSpec(file_ending=".mha"), "head_oblique", slow=True),
    Row("simpleitk_oblique", ModelSpec(), "head_oblique"),
    # the array is reoriented before the network sees it and back before it is written
    Row("simpleitk_reorient", ModelSpec(reader="SimpleITKIOWithReorient"), "head_oblique"),
    # this writer always writes uint8: values from 256 on wrap
    Row(
        "simpleitk_reorient_300_classes",
        ModelSpec(reader="SimpleITKIOWithReorient", labels=300, patch_size=(32, 32, 32), spacing=(6.0, 6.0, 6.0)),
        "head_oblique",
        classes=150,
        slow=True,
    ),
    Row("nibabel", ModelSpec(reader="NibabelIO"), "head_oblique"),
    Row("nibabel_nii", ModelSpec(reader="NibabelIO", file_ending=".nii"), "head_oblique", slow=True),
    Row("nibabel_reorient", ModelSpec(reader="NibabelIOWithReorient"), "head_oblique"),
    # spacing comes from a json beside the image, and goes to one beside the segmentation
    Row("tiff_3d", ModelSpec(reader="Tiff3DIO", file_ending=".tif"), "head_voxels"),
]

PROBABILITIES = [
    # outside the crop: background 1, all others 0
    Row("probabilities", ModelSpec(), "head_margin", probabilities=True),
    # outside the crop: 0 everywhere
    Row("probabilities_regions", ModelSpec(**REGIONS), "head_margin", probabilities=True),
    # the transpose makes a Fortran-ordered array
    Row(
        "probabilities_transposed", ModelSpec(transpose_forward=(2, 1, 0)), "head_margin", probabilities=True, slow=True
    ),
    Row("probabilities_same_grid", ModelSpec(spacing=(5.0, 5.0, 5.0)), probabilities=True),
    Row("probabilities_separate_z", anisotropic("").spec, "aniso", probabilities=True, slow=True),
    Row("probabilities_torch", ModelSpec(resampling="torch"), "head_margin", probabilities=True, slow=True),
    Row("probabilities_no_resampling", ModelSpec(resampling="none"), "head_margin", probabilities=True),
    Row("probabilities_2d", ModelSpec(**FLAT, mirror_axes=(0, 1)), probabilities=True, slow=True),
    Row("probabilities_png", ModelSpec(**PICTURE, file_ending=".png"), "picture", probabilities=True),
    Row("probabilities_folds", ModelSpec(folds=(0, 1), mirror_axes=(1,)), folds=(0, 1), probabilities=True, slow=True),
    Row("probabilities_zeros", ModelSpec(), "zeros", "head", classes=1, probabilities=True),
    # neighbouring classes are close: the softmax rounds their difference away and its argmax decides otherwise
    Row(
        "probabilities_300_classes",
        ModelSpec(labels=300, patch_size=(16, 16, 16), spacing=(6.0, 6.0, 6.0)),
        "small",
        "head",
        classes=20,
        probabilities=True,
    ),
]

IN_MEMORY = [
    # without an output folder arrays are returned, or pairs of segmentation and probabilities
    Row("returned", ModelSpec(transpose_forward=(1, 2, 0)), "head_margin", in_memory=True),
    Row("returned_uint16", ModelSpec(labels=300, patch_size=(32, 32, 32)), classes=240, in_memory=True, slow=True),
    Row("returned_regions", ModelSpec(**REGIONS), "head_margin", probabilities=True, in_memory=True),
    Row("returned_probabilities", ModelSpec(), "head_margin", probabilities=True, in_memory=True),
    Row(
        "returned_2d",
        ModelSpec(**PICTURE, file_ending=".png"),
        "picture",
        probabilities=True,
        in_memory=True,
        slow=True,
    ),
]

ROWS = [
    *LABELS,
    *INPUT,
    *SHAPES,
    *ANISOTROPY,
    *ENSEMBLES,
    *TWO_D,
    *ARCHITECTURES,
    *READERS,
    *PROBABILITIES,
    *IN_MEMORY,
]
