"""Label maps of nibabel's writers, compressed faster: decompressed they are byte for byte what stock writes."""

from __future__ import annotations

import gzip
import os
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lowmem import gzip_writing, nnunet_adapter


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("writer", [NibabelIO, NibabelIOWithReorient, SimpleITKIO])
@pytest.mark.parametrize("how", ["zlib-ng", "without zlib-ng", "disk almost full"])
def test_same_bytes_for_every_reader(images, tmp_path, monkeypatch, writer, dtype, how):
    if how == "zlib-ng":
        pytest.importorskip("zlib_ng")
    elif how == "without zlib-ng":
        monkeypatch.setattr(gzip_writing, "_zlib_ng", None)
    else:
        monkeypatch.setattr(nnunet_adapter, "free_disk_bytes", lambda folder: 1000)
    image, properties = writer().read_images(images("head_oblique"))
    labels = np.digitize(image[0], np.quantile(image, [0.5, 0.8, 0.95])).astype(dtype)
    labels[0, 0, 0] = 300 if dtype == np.uint16 else 250
    ours, stock = tmp_path / "ours.nii.gz", tmp_path / "stock.nii.gz"
    nnunet_adapter.write_segmentation(
        labels, properties, str(ours), SimpleNamespace(image_reader_writer_class=lambda: writer())
    )
    writer().write_seg(labels, str(stock), properties)
    assert gzip.decompress(ours.read_bytes()) == gzip.decompress(stock.read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["ours.nii.gz", "stock.nii.gz"]
    assert np.array_equal(np.asanyarray(nibabel.load(ours).dataobj), np.asanyarray(nibabel.load(stock).dataobj))
    read = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in (ours, stock)]
    assert np.array_equal(*read)
    # Python's gzip tells the name of its file in the header, zlib-ng no name
    named = ours.read_bytes()[3] & 8 != 0
    assert named == (writer is not SimpleITKIO and how != "zlib-ng")
