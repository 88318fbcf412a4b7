"""Reading images in their own type against the model's own readers."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from preprocessing_oracle import LABELS, ZSCORE, Model, as_type, assert_same_object, changed, ct, edges, write

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.image_reading import read_channels
from nnunet_lowmem.preprocessing import preprocess_case

READERS = [
    ("SimpleITKIO", ".nii.gz"),
    ("SimpleITKIO", ".nrrd"),
    ("SimpleITKIO", ".mha"),
    ("SimpleITKIO", ".gipl"),
    ("NibabelIO", ".nii"),
    ("NibabelIO", ".nii.gz"),
    ("NibabelIOWithReorient", ".nii.gz"),
    ("SimpleITKIOWithReorient", ".nii.gz"),
]


@pytest.mark.parametrize("reader, ending", READERS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_readers(reader: str, ending: str, dtype: Any, tmp_path) -> None:
    image = SimpleITK.DICOMOrient(as_type(ct()[:20, :22, :24], dtype), "PIR")
    files = write(tmp_path, [image, edges(image)], ending)
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    expected, properties = cls().read_images(files)
    channels, ours = read_channels(cls, files)
    assert np.array_equal(np.stack([c.astype(np.float32) for c in channels]), expected)
    assert_same_object(ours, properties)
    if reader in ("SimpleITKIO", "NibabelIO") and ending != ".gipl":
        assert channels[0].dtype == dtype


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<f4", ">f4", "<f8", "<i4", "<i8"])
@pytest.mark.parametrize("slope, intercept", [(None, None), (1.0, 0.0), (0.37, -12.5), (3.0, 1.0)])
def test_nifti_types_and_scaling(reader, dtype, slope, intercept, tmp_path) -> None:
    file = tmp_path / "case_0000.nii.gz"
    values = np.random.default_rng(5).integers(0, 30_000, (7, 6, 5))
    if dtype == "<i8":  # rounded by way of float64 these are other float32 than rounded once
        values = ((2**24 + 1 + 2 * values) << 38) + 1
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = nibabel.Nifti1Image(values.astype(dtype), np.diag([1.5, -2.0, 3.0, 1.0]), header)
    image.header.set_slope_inter(slope, intercept)
    file.write_bytes(scaled_nifti(image, slope, intercept))
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    expected, properties = cls().read_images([str(file)])
    channels, ours = read_channels(cls, [str(file)])
    assert np.array_equal(channels[0].astype(np.float32), expected[0])
    assert_same_object(ours, properties)
    if slope in (None, 1.0) and reader == "NibabelIO" and dtype != "<i8":
        assert channels[0].dtype == dtype


def scaled_nifti(image: nibabel.Nifti1Image, slope: float | None, intercept: float | None) -> bytes:
    """Raw voxels as they are, with a slope and an intercept in the header (nibabel would divide by them)."""
    header = image.header.copy()
    header["scl_slope"] = np.nan if slope is None else slope
    header["scl_inter"] = np.nan if intercept is None else intercept
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    voxels = np.asarray(image.dataobj).astype(header.get_data_dtype())
    return gzip.compress(header.binaryblock + bytes(4) + voxels.tobytes(order="F"), 1)


def test_channels_of_different_shape_are_refused_with_both_shapes(tmp_path) -> None:
    files = write(tmp_path, [ct(), ct()[:-1]])
    with pytest.raises(UsageError, match=r"case_0000.* shape \(60, 60, 70\), .*case_0001.* \(60, 60, 69\)"):
        preprocess_case(files, None, *Model(schemes=ZSCORE * 2).managers(), LABELS)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_channels_of_different_spacing_are_refused_with_both_spacings(reader: str, tmp_path) -> None:
    other = changed(ct(), lambda a: a)
    other.SetSpacing((3.0, 3.0, 3.1))
    files = write(tmp_path, [ct(), other])
    with pytest.raises(UsageError, match=r"case_0000.* spacing .*3\.0\), .*case_0001.*3\.[01]"):
        preprocess_case(files, None, *Model(schemes=ZSCORE * 2, reader=reader).managers(), LABELS)


@pytest.mark.parametrize("reader, name", [("SimpleITKIO", "origin"), ("NibabelIO", "affine")])
def test_channels_in_different_places_are_logged(reader: str, name: str, caplog, tmp_path) -> None:
    other = changed(ct(), lambda a: a)
    other.SetOrigin((1.0, 2.0, 3.0))
    files = write(tmp_path, [ct(), other])
    preprocess_case(files, None, *Model(schemes=ZSCORE * 2, reader=reader).managers(), LABELS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert name in caplog.text
    assert "case_0001" in caplog.text


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_unreadable_file_is_named(reader: str, content: bytes, tmp_path) -> None:
    file = tmp_path / "case_0000.nii.gz"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"case_0000\.nii\.gz cannot be read: \S"):
        preprocess_case([str(file)], None, *Model(reader=reader).managers(), LABELS)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_missing_file_is_named(reader: str, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"nowhere_0000\.nii cannot be read"):
        preprocess_case([str(tmp_path / "nowhere_0000.nii")], None, *Model(reader=reader).managers(), LABELS)


def test_nibabel_finds_a_truncated_file(tmp_path) -> None:
    (file,) = write(tmp_path, [ct()], ".nii.gz")
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="cannot be read"):
        preprocess_case([file], None, *Model(reader="NibabelIO").managers(), LABELS)


def test_colour_image_is_refused(tmp_path) -> None:
    files = write(tmp_path, [SimpleITK.Compose([ct(), ct(), ct()])], ".nrrd")
    with pytest.raises(UsageError, match="3 values per voxel, 1 is needed"):
        preprocess_case(files, None, *Model().managers(), LABELS)


def test_nibabel_refuses_four_dimensions(tmp_path) -> None:
    files = write(tmp_path, [SimpleITK.JoinSeries([ct(), ct()])])
    with pytest.raises(UsageError, match="has 4 dimensions, 3 are needed"):
        preprocess_case(files, None, *Model(reader="NibabelIO").managers(), LABELS)
