"""Voxels that are read part by part: those of the array, and an error that names the file where there are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.preprocessing.reading import read_channels
from nnunet_lowmem.volumes.file_volume import FileVolume

SHAPE = (7, 8, 9)


def written(folder: Path, array: np.ndarray, name: str = "case_0000.nii") -> str:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / name))
    return str(folder / name)


def never(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    raise AssertionError("there is a file to read from")


def opened(file: str, accept_nan: bool = False) -> list[FileVolume]:
    channels, _ = read_channels(SimpleITKIO, [file], accept_nan, never)
    assert all(isinstance(channel, FileVolume) for channel in channels)
    return channels  # type: ignore[return-value]  # it has been asserted


def voxels(dtype: type = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)


boxes = st.tuples(*[st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in SHAPE])


@settings(max_examples=150, deadline=None)
@given(order=st.permutations([0, 1, 2]), outer=boxes, inner=boxes, depth=st.integers(1, 3), plane=st.integers(0, 6))
def test_views_of_views_are_those_of_an_array(tmp_path_factory, order, outer, inner, depth, plane):
    array = voxels()
    (volume,) = opened(written(tmp_path_factory.mktemp("volume"), array))
    turned, expected = volume.transpose(order), array.transpose(order)
    box = tuple(slice(*outer[axis]) for axis in order)
    turned, expected = turned.within(box), expected[box]
    key = tuple(slice(*inner[axis]) for axis in order)[:depth]
    assert turned.shape == expected.shape
    assert np.array_equal(turned[key], expected[key])
    if plane < len(expected):
        assert np.array_equal(turned[plane], expected[plane])


@pytest.mark.parametrize("name", ["case_0000.nii", "case_0000.nrrd", "case_0000.mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_every_kind_of_file_that_holds_voxels_as_they_are(name, dtype, tmp_path):
    array = voxels(dtype)
    (volume,) = opened(written(tmp_path, array, name))
    assert volume.dtype == dtype
    assert np.array_equal(volume[1:5, 2:], array[1:5, 2:])


def test_another_byte_order_four_axes_and_a_picture(tmp_path):
    header = b"NRRD0004\ntype: int16\ndimension: 3\nsizes: 9 8 7\nendian: big\nencoding: raw\n\n"
    (tmp_path / "big_0000.nrrd").write_bytes(header + voxels().astype(">i2").tobytes())
    (volume,) = opened(str(tmp_path / "big_0000.nrrd"))
    assert volume.dtype.isnative
    assert volume[:].dtype.isnative
    assert np.array_equal(volume[:], voxels())
    four = voxels(np.float32, (3, *SHAPE))
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(channel) for channel in four])
    SimpleITK.WriteImage(image, str(tmp_path / "four_0000.nii"))
    assert np.array_equal(np.stack([channel[:] for channel in opened(str(tmp_path / "four_0000.nii"))]), four)
    flat = voxels(np.uint8, SHAPE[1:])
    (volume,) = opened(written(tmp_path, flat))
    assert volume.shape == (1, *flat.shape)
    assert np.array_equal(volume[0], flat)


def test_what_is_no_number_is_refused_or_read_as_0(tmp_path):
    array = voxels(np.float64)
    array[3, 2, 1], array[6, 0, 0] = np.nan, 1e300
    file = written(tmp_path, array)
    with pytest.raises(UsageError, match=r"case_0000.nii: 2 of 504 voxels are NaN or infinite, .* \(1, 2, 3\)"):
        opened(file)
    (volume,) = opened(file, accept_nan=True)
    array[3, 2, 1] = array[6, 0, 0] = 0
    assert np.array_equal(volume[2:, :, 1:], array[2:, :, 1:])
    assert np.array_equal(volume[:, 0], array[:, 0])


@pytest.mark.parametrize("change", ["cut", "changed", "gone"])
def test_a_file_that_changes_meanwhile_is_an_error_with_its_name(change, tmp_path):
    file = Path(written(tmp_path, voxels()))
    (volume,) = opened(str(file))
    data = file.read_bytes()
    told = {"cut": "it was changed", "changed": "it was changed", "gone": "No such file"}[change]
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if change == "cut" else data)
        os.utime(file, ns=(1, 1))
    with pytest.raises(UsageError, match=rf"case_0000.nii cannot be read: {told}") as raised:
        volume[3:]
    assert isinstance(raised.value, OSError)


def test_a_copy_in_its_place_is_the_same_file(tmp_path):
    file = Path(written(tmp_path, voxels()))
    (volume,) = opened(str(file))
    status = file.stat()
    (tmp_path / "copy").write_bytes(file.read_bytes())
    os.utime(tmp_path / "copy", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "copy").replace(file)
    assert np.array_equal(volume[:], voxels())
