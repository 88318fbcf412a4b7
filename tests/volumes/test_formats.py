"""The table of formats: what a row says of a file is so. A new format is a row there and one here."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from oracle import make_predictor, predict_ours

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.preprocessing.checks import check_case
from nnunet_lowmem.preprocessing.reading import read_channels
from nnunet_lowmem.report.label_differences import read_labels
from nnunet_lowmem.volumes import headers
from nnunet_lowmem.volumes.formats import FORMATS, format_of, is_volume, read_header, read_voxels, verify_voxels
from nnunet_lowmem.volumes.headers import Library
from nnunet_lowmem.volumes.verifying import verify_label_file

VOXELS = np.random.default_rng(2).integers(-500, 1000, (6, 7, 8)).astype(np.int16)
SPACING = (1.25, 2.0, 3.0)


class Row(NamedTuple):
    """What holds of a file of int16 with an ending."""

    ending: str
    compresses: bool = False
    is_raw: bool = True
    data: str = ""  # ending of the file beside it that holds the voxels


VOLUMES = [
    Row(".nii"),
    Row(".nii.gz", is_raw=False),
    Row(".hdr", data=".img"),
    Row(".img"),
    Row(".img.gz", is_raw=False),
    Row(".hdr.gz", is_raw=False, data=".img.gz"),
    Row(".nrrd"),
    Row(".nrrd", compresses=True, is_raw=False),
    Row(".nhdr", data=".raw"),
    Row(".nhdr", compresses=True, is_raw=False, data=".raw.gz"),
    Row(".mha"),
    Row(".mha", compresses=True, is_raw=False),
    Row(".mhd", data=".raw"),
    Row(".mhd", compresses=True, is_raw=False, data=".zraw"),
    Row(".gipl"),
    Row(".gipl.gz", is_raw=False),
]
PICTURES = [".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg"]


def write(folder: Path, row: Row) -> Path:
    """A file as ITK writes it; of a pair, the name of either may be given to it."""
    image = SimpleITK.GetImageFromArray(VOXELS)
    image.SetSpacing(SPACING)
    path = folder / f"case_0000{row.ending}"
    written = path.with_name(path.name.replace(".hdr", ".img"))
    if row.ending == ".gipl.gz":  # ITK's writer cannot
        SimpleITK.WriteImage(image, str(path.with_suffix("")))
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    else:
        SimpleITK.WriteImage(image, str(written), row.compresses)
    return path


def name_of(row: Row) -> str:
    return row.ending + " compressed" * row.compresses


def test_every_row_is_tested() -> None:
    assert {row.ending for row in VOLUMES} == {ending for ending, row in FORMATS.items() if row.is_volume}
    others = {ending for ending, row in FORMATS.items() if not row.is_volume and row.own_header is None}
    assert {ending for ending in PICTURES if "tif" not in ending} == others  # arrays are read by tests of their own


@pytest.mark.parametrize("row", VOLUMES, ids=name_of)
def test_volume(row: Row, tmp_path) -> None:
    path = write(tmp_path, row)
    header = read_header(str(path))
    layout = header.layout
    assert layout is not None
    assert is_volume(path)
    assert (header.shape, header.dtype, header.components) == (VOXELS.shape, VOXELS.dtype, 1)
    assert header.spacing == layout.spacing[::-1] == SPACING[::-1]
    assert header.needed_bytes == VOXELS.nbytes
    assert layout.dtype is not None
    assert all(part.is_raw for part in layout.parts) == row.is_raw
    assert header.is_read_in_place
    assert np.array_equal(read_voxels(header), VOXELS)
    verify_voxels(str(path))


@pytest.mark.parametrize("row", VOLUMES, ids=name_of)
def test_volume_that_lacks_its_last_byte(row: Row, tmp_path) -> None:
    path = write(tmp_path, row)
    header = read_header(str(path))
    assert header.layout is not None
    data = header.layout.parts[-1].path
    assert data.name.endswith(row.data)
    data.write_bytes(data.read_bytes()[:-1])
    for read in (lambda: read_voxels(header), lambda: verify_voxels(str(path))):
        with pytest.raises(UsageError, match=r"case_0000.* (ends after|ends within|holds) "):
            read()


@pytest.mark.parametrize("ending", PICTURES)
def test_picture(ending: str, tmp_path) -> None:
    path = tmp_path / f"case_0000{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.full((7, 8), 200, np.uint8)), str(path))
    header = read_header(str(path))
    assert not is_volume(path)
    assert (header.shape, header.layout, header.is_read_in_place) == ((7, 8), None, False)
    verify_voxels(str(path))


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f8", "<c8"])
def test_nibabels_view_of_a_header(dtype: str, tmp_path) -> None:
    path = tmp_path / "case_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VOXELS.T.astype(dtype), np.diag([1.25, 2, 3, 1]), dtype=dtype), path)
    header = read_header(str(path), Library.NIBABEL)
    assert (header.shape, header.spacing, header.read_with) == (VOXELS.shape, SPACING[::-1], Library.NIBABEL)
    assert np.array_equal(read_voxels(header), VOXELS.astype(dtype))
    assert header.is_read_in_place == ("c" not in dtype)


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.nii.gz", ".nii.gz"), ("A.NII.GZ", ".nii.gz"), ("a.gipl.gz", ".gipl.gz"), ("a.b.nrrd", ".nrrd"), ("nii", None)],
)
def test_row_by_the_longest_ending(name: str, ending: str | None) -> None:
    assert format_of(Path("folder.nii") / name) is (FORMATS[ending] if ending else None)


def test_header_is_read_once_per_case(images, models, tmp_path, monkeypatch) -> None:
    """Checking, planning, asking for disk space and reading: all by what was read first."""
    files = images("head")
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a_0000", "b_0000"):
        (source / f"{name}.nii.gz").write_bytes(Path(files[0]).read_bytes())
    counted: list[str] = []
    information = headers.itk_information
    monkeypatch.setattr(headers, "itk_information", lambda path: counted.append(path.name) or information(path))
    predict_ours(make_predictor(LowMemPredictor, models(ModelSpec(), files)), str(source), str(tmp_path / "out"))
    assert sorted(counted) == ["a_0000.nii.gz", "b_0000.nii.gz"]


def test_file_that_changes_is_read_anew(tmp_path) -> None:
    path = write(tmp_path, Row(".nii"))
    assert read_header(str(path)).shape == VOXELS.shape
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOXELS[:4]), str(path))
    assert read_header(str(path)).shape == (4, 7, 8)


@pytest.mark.parametrize("read", [read_header, verify_voxels])
@pytest.mark.parametrize("error", [KeyError("4321"), OverflowError("inf"), RecursionError("deep"), MemoryError()])
def test_whatever_a_parser_raises_is_one_error(
    read: Callable[[str], Any], error: Exception, tmp_path, monkeypatch
) -> None:
    path = write(tmp_path, Row(".mha"))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("nnunet_lowmem.volumes.headers.itk_information", fail)
    with pytest.raises(MemoryError if isinstance(error, MemoryError) else UsageError) as caught:
        read(str(path))
    if not isinstance(error, MemoryError):
        assert str(path) in str(caught.value)


# -- what lies beside the file that was asked for


def meta_with_raw(folder: Path, before: bytes) -> str:
    (folder / "v.raw").write_bytes(before + VOXELS.tobytes())
    path = folder / "case_0000.mhd"
    if not path.exists():
        path.write_text(
            "NDims = 3\nBinaryData = True\nHeaderSize = -1\nElementSpacing = 1 1 1\nDimSize = 8 7 6\n"
            "ElementType = MET_SHORT\nElementDataFile = v.raw\n"
        )
    return str(path)


def test_voxels_that_move_in_another_file_are_found_anew(tmp_path) -> None:
    for before in (b"", b"more"):
        assert np.array_equal(read_voxels(read_header(meta_with_raw(tmp_path, before))), VOXELS)


@pytest.mark.parametrize("library", Library)
def test_header_of_a_pair_that_changes_is_read_anew(library: Library, tmp_path) -> None:
    for step in (1.0, 2.5):
        nibabel.save(nibabel.Nifti1Pair(np.zeros((8, 7, 6), np.int16), np.diag([1, 1, step, 1])), tmp_path / "a.img")
        assert read_header(str(tmp_path / "a.img"), library).spacing == (step, 1.0, 1.0)


def nrrd(fields: str, data: str = "") -> str:
    return f"NRRD0004\ntype: short\ndimension: 3\nsizes: 8 7 6\nendian: little\nencoding: raw\n{fields}{data}\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.nrrd", nrrd("DICOM:0010:=" + "x" * 600 + "\n")),
        ("a.nrrd", nrrd("key:=" + "x" * 2**21 + "\n")),
        ("a.nrrd", nrrd("content: " + "x" * 3000 + "\n")),
        (
            "a.nrrd",
            nrrd("kinds: vector domain domain domain\nspacings: nan 1 1 2\n")
            .replace("n: 3", "n: 4")
            .replace("8 7 6", "1 8 7 6"),
        ),
    ],
    ids=["key with a colon", "long notes", "long content", "vector of one"],
)
def test_headers_that_itk_reads(name: str, header: str, tmp_path) -> None:
    path = tmp_path / name
    path.write_bytes(header.encode() + VOXELS.tobytes())
    read = read_header(str(path))
    assert np.array_equal(read_voxels(read).ravel(), VOXELS.ravel())
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).ravel(), VOXELS.ravel())
    check_case([str(path)], SimpleITKIO, 1, (1.0, 1.0, 1.0))


SHEARED = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("ending", [".nii.gz", ".img"])
def test_labels_in_a_grid_that_itk_refuses(ending: str, tmp_path) -> None:
    labels = (VOXELS > 0).astype(np.uint8)
    path = tmp_path / f"a{ending}"
    NibabelIO().write_seg(labels, str(path), {"nibabel_stuff": {"original_affine": SHEARED}})
    verify_label_file(path, labels.shape, np.uint8)
    assert np.array_equal(read_labels(path), labels)


class StrangersReader(BaseReaderWriter):
    """Somebody's, who reads with nibabel and takes the first value of a voxel."""

    def read_images(self, image_fnames: Any) -> Any:
        images = [nibabel.load(name) for name in image_fnames]
        data = [np.asarray(image.dataobj, np.float32).reshape(*image.shape[:3], -1)[..., 0].T for image in images]
        return np.stack(data), {"spacing": [1.0, 1.0, 1.0]}

    def read_seg(self, seg_fname: str) -> Any:
        return self.read_images([seg_fname])

    def write_seg(self, seg: Any, output_fname: str, properties: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    "image",
    [
        nibabel.Nifti2Image(VOXELS.T, np.eye(4)),
        nibabel.Nifti1Image(VOXELS.T, SHEARED),
        nibabel.Nifti1Image(np.stack([VOXELS.T] * 3, -1)[..., None, :].astype(np.float32), np.eye(4)),
    ],
    ids=["NIfTI-2", "sheared", "vectors"],
)
def test_what_somebody_elses_reader_takes_is_its_own_business(image: Any, tmp_path) -> None:
    path = str(tmp_path / "case_0000.nii.gz")
    nibabel.save(image, path)
    check_case([path], StrangersReader, 1, (1.0, 1.0, 1.0))
    channels, _ = read_channels(StrangersReader, [path])
    assert np.array_equal(channels[0], VOXELS)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:-9])
    with pytest.raises(UsageError, match="case_0000"):
        read_channels(StrangersReader, [path])


@pytest.mark.parametrize("behind", [bytes(600), b" more text"])
def test_what_follows_digits_is_nobodys(behind: bytes, tmp_path) -> None:
    path = tmp_path / "a.nrrd"
    digits = " ".join(map(str, VOXELS.flat)).encode()
    path.write_bytes(nrrd("").replace("raw", "ascii").encode() + digits + b"\n" + behind)
    assert np.array_equal(read_channels(SimpleITKIO, [str(path)])[0][0], VOXELS)


@pytest.mark.parametrize("word", [bytes(2000), b"9" * 5000, b"x" * 5000])
def test_words_among_digits_that_end_the_process(word: bytes, tmp_path) -> None:
    path = tmp_path / "a.nrrd"
    digits = " ".join(map(str, VOXELS.flat[:-1])).encode()
    path.write_bytes(nrrd("").replace("raw", "ascii").encode() + digits + b"\n" + word)
    with pytest.raises(UsageError, match=rf"a\.nrrd has a word of {len(word)} letters among its numbers"):
        read_channels(SimpleITKIO, [str(path)])
