"""Slices with labels: the right ones, the right way up, from a few planes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from images import CT, DATA

from nnunet_lowmem.report.slices import Volume, blend, labelled_volume, overlays
from nnunet_lowmem.types import PreprocessedCase


def volume_of(image, labels, reader: str, tmp_path: Path) -> Volume:
    for name, content in (("image", image), ("labels", labels)):
        SimpleITK.WriteImage(content, str(tmp_path / f"{name}.nii.gz"))
    if reader == "SimpleITK":
        geometry = {"sitk_stuff": {"direction": image.GetDirection()}}
    else:
        geometry = {"nibabel_stuff": {"original_affine": nibabel.load(tmp_path / "image.nii.gz").affine}}
    voxels = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    properties = {
        **geometry,
        "spacing": list(image.GetSpacing())[::-1],
        "bbox_used_for_cropping": [[0, size] for size in voxels.shape],
        "shape_after_cropping_and_before_resampling": voxels.shape,
        "shape_before_cropping": voxels.shape,
    }
    case = PreprocessedCase(voxels[None], None, properties)
    return labelled_volume(case, SimpleITK.GetArrayFromImage(labels), (0, 1, 2))


@pytest.fixture(scope="module")
def ct_and_labels():
    labels = SimpleITK.ReadImage(str(DATA / "ct_abdomen_3mm_labels.nii.gz"))
    return SimpleITK.ReadImage(str(CT)), labels


@pytest.mark.parametrize("reader", ["SimpleITK", "nibabel"])
@pytest.mark.parametrize("orientation", ["RAS", "PIR", "SLA"])
def test_slices_look_the_same_however_the_file_lies(ct_and_labels, orientation, reader, tmp_path):
    expected = overlays(volume_of(*(SimpleITK.DICOMOrient(i, "LPS") for i in ct_and_labels), "SimpleITK", tmp_path))
    turned = overlays(volume_of(*(SimpleITK.DICOMOrient(i, orientation) for i in ct_and_labels), reader, tmp_path))
    for one, two in zip(expected, turned, strict=True):
        assert one.title.split(",")[0] == two.title.split(",")[0]
        assert one.counts == two.counts
        # resizing runs along rows first, so the last bit may differ
        assert np.abs(one.rgb.astype(int) - two.rgb).mean() < 0.5


def test_head_is_up_and_the_patients_left_is_right(ct_and_labels, tmp_path):
    image, _ = (SimpleITK.DICOMOrient(i, "LPS") for i in ct_and_labels)
    marks = SimpleITK.Image(image.GetSize(), SimpleITK.sitkUInt8)
    marks.CopyInformation(image)
    x, y, z = image.GetSize()
    marks[x - 20 : x - 2, y - 20 : y - 2, z - 20 : z - 2] = 1  # left, back, head in LPS
    for overlay in overlays(volume_of(image, marks, "SimpleITK", tmp_path)):
        tinted = np.ptp(overlay.rgb.astype(int), axis=-1) > 40
        rows, columns = (
            positions.mean() / size for positions, size in zip(np.nonzero(tinted), tinted.shape, strict=True)
        )
        assert bool(rows > 0.5) is overlay.title.startswith("axial"), "back is down, head is up"
        assert columns > 0.5


def test_labels_cover_what_they_label(ct_and_labels):
    grey = np.full((4, 5), 10.0)
    labels = np.zeros((4, 5), np.uint8)
    labels[1:3, 1:4] = 7
    picture = blend(grey, labels, (0.0, 20.0))
    assert picture.shape == (4, 5, 3)
    assert (picture[labels == 0] == 128).all()
    assert (np.ptp(picture[labels == 7].astype(int), axis=-1) > 50).all()


def test_few_planes_are_read(tmp_path):
    image = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.float32, (160, 512, 512))
    labels = np.zeros((160, 512, 512), np.uint8)
    labels[80:90, 100:300, 200:220] = 3
    tracemalloc.start()
    drawn = overlays(Volume(image[None], labels, (2.0, 0.7, 0.7), None, (0, 0, 0), labels.shape))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn) == 3
    assert all(overlay.counts.keys() == {3} for overlay in drawn)
    assert peak < 16 * 2**20 < labels.nbytes
