"""Reading images in their own type against the model's own readers."""

from __future__ import annotations

import gzip
import locale
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from oracle import INSTALLED
from preprocessing_oracle import LABELS, ZSCORE, Model, as_type, assert_same_object, changed, ct, edges, write
from skimage import io

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.preprocessing.case import preprocess_case
from nnunet_lowmem.preprocessing.reading import read_channels

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
if INSTALLED < (2, 6):
    READERS.remove(("SimpleITKIOWithReorient", ".nii.gz"))


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
    if slope in (None, 1.0) and (reader == "SimpleITKIO" or dtype != "<i8"):
        assert channels[0].dtype == np.dtype(dtype).newbyteorder("=")


def scaled_nifti(image: nibabel.Nifti1Image, slope: float | None, intercept: float | None) -> bytes:
    """Raw voxels as they are, with a slope and an intercept in the header (nibabel would divide by them)."""
    header = image.header.copy()
    header["scl_slope"] = np.nan if slope is None else slope
    header["scl_inter"] = np.nan if intercept is None else intercept
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    voxels = np.asarray(image.dataobj).astype(header.get_data_dtype())
    return gzip.compress(header.binaryblock + bytes(4) + voxels.tobytes(order="F"), 1)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")  # stock's, which casts
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_of_complex_voxels_the_real_parts_are_taken(reader: str, dtype: Any, caplog, tmp_path) -> None:
    file = str(tmp_path / "case_0000.nii.gz")
    values = np.random.default_rng(5).normal(size=(2, 7, 6, 5)) * 1e3
    nibabel.save(nibabel.Nifti1Image((values[0] + 1j * values[1]).astype(dtype), np.eye(4)), file)
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    expected, properties = cls().read_images([file])
    channels, ours = read_channels(cls, [file])
    assert channels[0].dtype.kind == "f"
    assert np.array_equal(channels[0].astype(np.float32), expected[0])
    assert_same_object(ours, properties)
    assert f"{file} holds complex numbers" in caplog.text


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


# -- what is read is what was verified: rows of (name, files by name, what is said of it; None where the file is sound)

VOXELS = np.random.default_rng(3).integers(-500, 1000, (6, 7, 8)).astype("<i2")
RAW = VOXELS.tobytes()
PACKED, GZIPPED = zlib.compress(RAW), gzip.compress(RAW, mtime=0)
SLICES = {f"s{i}.raw": plane.tobytes() for i, plane in enumerate(VOXELS)}
PACKED_SLICES = {f"z{i}": zlib.compress(plane.tobytes()) for i, plane in enumerate(VOXELS)}
COMPRESSED = "CompressedData = True\n"
Row = tuple[str, dict[str, bytes], str | None]


def meta(name: str, where: str, told: str | None, *, data: bytes = b"", fields: str = "", **files: bytes) -> Row:
    head = (
        f"NDims = 3\nBinaryData = True\n{fields}ElementSpacing = 1 1 1\nDimSize = 8 7 6\nElementType = MET_SHORT\n"
        f"ElementDataFile = {where}\n"
    )
    return name, {name: head.encode() + data, **files}, told


def sized(size: int) -> str:
    return f"{COMPRESSED}CompressedDataSize = {size}\n"


def listed(count: int) -> bytes:
    return b"".join(b"%s\n" % name.encode() for name in list(SLICES)[:count])


def nrrd(name: str, encoding: str, told: str | None, *, data: bytes = b"", fields: str = "", **files: bytes) -> Row:
    head = (
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 8 7 6\nspacings: 1 1 1\nendian: little\nencoding: {encoding}\n"
        f"{fields}"
    )
    return name, {name: head.encode() + (b"\n" + data if data else b""), **files}, told


def gipl(name: str, told: str | None, edit: Callable[[bytes], bytes]) -> Row:
    head = bytearray(256)
    struct.pack_into(">4H", head, 0, 8, 7, 6, 1)
    struct.pack_into(">H", head, 8, 15)  # signed short
    struct.pack_into(">4f", head, 10, 1, 1, 1, 1)
    struct.pack_into(">I", head, 252, 719555000)
    return name, {name: edit(bytes(head) + VOXELS.astype(">i2").tobytes())}, told


META = [
    meta("raw.mha", "LOCAL", None, data=RAW),
    meta("longer.mha", "LOCAL", None, data=RAW + b"more"),
    meta("cut.mha", "LOCAL", "ends after 671 of 672 bytes", data=RAW[:-1]),
    meta("last_bytes.mha", "LOCAL", None, fields="HeaderSize = -1\n", data=b"junk" + RAW),
    meta("header_in_header.mha", "LOCAL", "its HeaderSize is 20, within the", fields="HeaderSize = 20\n", data=RAW),
    meta("packed.mha", "LOCAL", None, fields=sized(len(PACKED)), data=PACKED),
    meta("true_by_a_letter.mha", "LOCAL", None, fields=sized(len(PACKED)).replace("True", "t"), data=PACKED),
    meta("packed_by_gzip.mha", "LOCAL", None, fields=sized(len(GZIPPED)), data=GZIPPED),
    meta("size_and_more.mha", "LOCAL", None, fields=sized(len(PACKED) + 9), data=PACKED + bytes(9)),
    meta("size_missing.mha", "LOCAL", "lacks CompressedDataSize", fields=COMPRESSED, data=PACKED),
    meta("size_zero.mha", "LOCAL", "lacks CompressedDataSize", fields=sized(0), data=PACKED),
    meta("size_small.mha", "LOCAL", "ends within its compressed data", fields=sized(len(PACKED) // 2), data=PACKED),
    meta("size_less_1.mha", "LOCAL", "ends within its compressed data", fields=sized(len(PACKED) - 1), data=PACKED),
    meta("size_large.mha", "LOCAL", "compressed bytes", fields=sized(len(PACKED) + 9), data=PACKED),
    meta(
        "size_eaten.mha",
        "LOCAL",
        "ElementMin has 0 of 1 numbers",
        fields=f"ElementMin = \n{sized(9)}",
        data=PACKED,
    ),
    meta("more_numbers.mha", "LOCAL", None, fields=f"Color = 1 1 1 1 1\n{sized(len(PACKED))}", data=PACKED),
    meta("order_eaten.mha", "LOCAL", None, fields="Color = 1\nBinaryDataByteOrderMSB = True\n", data=RAW),
    meta("last_bytes_cut.mha", "LOCAL", "ends after 572 of 672", fields="HeaderSize = -1\n", data=RAW[:-100]),
    meta("size_left.mha", "LOCAL", None, fields=f"ElementMin = 0\n{sized(len(PACKED))}", data=PACKED),
    meta("name_alone.mha", "LOCAL", "CompressedData without a value", fields="CompressedData\0 False\n", data=RAW),
    meta(
        "stream_short.mha",
        "LOCAL",
        "after 100 of 672",
        fields=sized(len(zlib.compress(RAW[:100]))),
        data=zlib.compress(RAW[:100]),
    ),
    meta("changed.mha", "LOCAL", "incorrect data check", fields=sized(len(PACKED)), data=PACKED[:-4] + b"abcd"),
    meta(
        "two_streams.mha",
        "LOCAL",
        "after 100 of 672",
        fields=sized(9999),
        data=zlib.compress(RAW[:100]) + zlib.compress(RAW[100:]) + bytes(9999),
    ),
    meta("outside.mhd", "v.raw", None, **{"v.raw": RAW}),
    meta("outside.mha", "sub/v.raw", None, **{"sub/v.raw": RAW}),
    meta("outside_cut.mhd", "v.raw", "v.raw ends after 600 of 672 bytes", **{"v.raw": RAW[:600]}),
    meta("outside_gone.mhd", "v.raw", "should be in v.raw, which is not there"),
    meta("outside_skip.mhd", "v.raw", None, fields="HeaderSize = 5\n", **{"v.raw": b"12345" + RAW}),
    meta("outside_packed.mhd", "v.zraw", None, fields=COMPRESSED, **{"v.zraw": PACKED}),
    meta(
        "outside_packed_cut.mhd", "v.zraw", "ends within its compressed", fields=COMPRESSED, **{"v.zraw": PACKED[:-99]}
    ),
    meta(
        "outside_packed_changed.mhd",
        "v.zraw",
        "v.zraw: Error",
        fields=COMPRESSED,
        **{"v.zraw": PACKED[:99] + b"@@" + PACKED[101:]},
    ),
    meta(
        "outside_packed_skip.mhd",
        "v.zraw",
        "lacks CompressedDataSize",
        fields=COMPRESSED + "HeaderSize = 5\n",
        **{"v.zraw": b"12345" + PACKED},
    ),
    meta("list.mha", "LIST", None, data=listed(6), **SLICES),
    meta("list.mhd", "LIST 2", None, data=listed(6), **SLICES),
    meta("list_short.mha", "LIST", "names 4 of 6 files", data=listed(4), **SLICES),
    meta("list_unended.mha", "LIST", "names 5 of 6 files", data=listed(6)[:-1], **SLICES),
    meta("list_of_short.mha", "LIST", "s3.raw ends after 5 of 112", data=listed(6), **{**SLICES, "s3.raw": b"short"}),
    meta(
        "list_of_one.mha", "LIST 3", "LIST 3, a list of files that ITK does not read", data=b"v.raw\n", **{"v.raw": RAW}
    ),
    meta("list_packed.mhd", "z%d 0 5 1", None, fields=COMPRESSED, **PACKED_SLICES),
    meta(
        "list_packed_cut.mhd",
        "z%d 0 5 1",
        "z2 ends within",
        fields=COMPRESSED,
        **{**PACKED_SLICES, "z2": PACKED_SLICES["z2"][:-9]},
    ),
    meta("numbers.mhd", "s%d.raw 0", None, **SLICES),
    meta("numbers_few.mhd", "s%d.raw 0 3 1", "names 4 of 6 files", **SLICES),
    meta("numbers_fall.mhd", "s%d.raw 5 0 -1", "ITK cannot read", **SLICES),
    meta("numbers_still.mhd", "s%d.raw 0 5", "ITK cannot read", **SLICES),
    meta(
        "digits.mha",
        "LOCAL",
        None,
        fields="BinaryData = False\n",
        data=(" ".join(map(str, VOXELS.flat)) + "\n").encode(),
    ),
    meta("digits_few.mha", "LOCAL", "cannot be read", fields="BinaryData = False\n", data=b"1 2 3\n"),
]
NRRD = [
    nrrd("raw.nrrd", "raw", None, data=RAW),
    nrrd("skipped.nrrd", "raw", None, fields="line skip: 1\nbyte skip: 3\n", data=b"line\nabc" + RAW),
    nrrd(
        "skipped_cut.nrrd",
        "raw",
        "ends after 671 of 672",
        fields="line skip: 1\nbyteskip: 3\n",
        data=b"line\nabc" + RAW[:-1],
    ),
    nrrd("notes.nrrd", "raw", None, fields="encoding:=gzip\n# data file: none\n", data=RAW),
    nrrd("packed.nrrd", "GZIP", None, data=GZIPPED + b"tail"),
    nrrd("packed_skip.nrrd", "gz", None, fields="byte skip: -1\n", data=gzip.compress(b"abc" + RAW)),
    nrrd("members.nrrd", "gzip", None, data=gzip.compress(RAW[:99]) + gzip.compress(RAW[99:])),
    nrrd("not_packed.nrrd", "gzip", None, data=RAW),
    nrrd("packed_cut.nrrd", "gzip", "ends within its compressed data", data=GZIPPED[:-20]),
    nrrd("checksum.nrrd", "gzip", "incorrect data check", data=GZIPPED[:-8] + b"abcd" + GZIPPED[-4:]),
    nrrd("length.nrrd", "gzip", "incorrect length check", data=GZIPPED[:-4] + b"abcd"),
    nrrd("skip_in_words.nrrd", "raw", "cannot be read", fields="byte skip: some\n", data=RAW),
    nrrd("hex.nrrd", "hex", None, data=RAW.hex().encode()),
    nrrd("hex_cut.nrrd", "hex", "cannot be read", data=RAW.hex().encode()[:-9]),
    nrrd("outside.nhdr", "raw", None, fields="data file: v.raw\n", **{"v.raw": RAW}),
    nrrd("outside.nrrd", "gzip", None, fields="datafile: v.gz\n", **{"v.gz": GZIPPED}),
    nrrd("outside_cut.nhdr", "raw", "v.raw ends after 99 of 672", fields="data file: v.raw\n", **{"v.raw": RAW[:99]}),
    nrrd(
        "outside_changed.nhdr",
        "gzip",
        "v.gz: Error",
        fields="data file: v.gz\n",
        **{"v.gz": GZIPPED[:99] + b"@@" + GZIPPED[101:]},
    ),
    nrrd("outside_gone.nhdr", "raw", "v.raw", fields="data file: v.raw\n"),
    nrrd("list.nhdr", "raw", None, fields="data file: LIST\n" + listed(6).decode(), **SLICES),
    nrrd("list_short.nhdr", "raw", "expected 6 filenames", fields="data file: LIST\n" + listed(5).decode(), **SLICES),
    nrrd("numbers.nhdr", "raw", None, fields="data file: s%d.raw 0 5 1 2\n", **SLICES),
    nrrd(
        "numbers_short.nhdr",
        "raw",
        "s2.raw ends after 5 of 112",
        fields="data file: s%d.raw 0 5 1\n",
        **{**SLICES, "s2.raw": b"short"},
    ),
]
GIPL = [
    gipl("whole.gipl", None, bytes),
    gipl("half.gipl", "ends after 336 of 672", lambda whole: whole[:592]),
    gipl("none.gipl", "ends after 0 of 672", lambda whole: whole[:256]),
    gipl("last.gipl", "ends after 671 of 672", lambda whole: whole[:-1]),
    gipl("whole.gipl.gz", None, gzip.compress),
    gipl("half.gipl.gz", "ends within its compressed data", lambda whole: gzip.compress(whole)[:-300]),
]


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("reader", ["SimpleITKIO", pytest.param("SimpleITKIOWithReorient", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "files", "told"), [pytest.param(*row, id=row[0]) for row in META + NRRD + GIPL])
def test_what_is_read_is_what_was_verified(reader, name, files, told, tmp_path) -> None:
    lay_out(tmp_path, files)
    file = str(tmp_path / name)
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    if told is None:
        expected, properties = cls().read_images([file])
        channels, ours = read_channels(cls, [file])
        assert np.array_equal(np.sort(channels[0].ravel()), np.sort(VOXELS.ravel()))
        assert np.array_equal(channels[0].astype(np.float32), expected[0])
        assert_same_object(ours, properties)
        return
    with pytest.raises(UsageError) as caught:
        read_channels(cls, [file])
    assert str(caught.value).startswith(f"{file} cannot be read: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".img", ".img.gz"])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_pair_of_files(reader, ending, tmp_path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(VOXELS.shape[::-1])
    header["magic"] = b"ni1"
    voxels = gzip.compress(RAW, mtime=0) if ending == ".img.gz" else RAW
    head = gzip.compress(header.binaryblock) if ending == ".img.gz" else header.binaryblock
    name = f"a{ending.replace('img', 'hdr')}"
    lay_out(tmp_path, {name: head, f"a{ending}": voxels})
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    channels, _ = read_channels(cls, [str(tmp_path / name)])
    assert np.array_equal(channels[0], VOXELS)
    lay_out(tmp_path, {f"a{ending}": voxels[:-20]})
    with pytest.raises(UsageError, match=rf"a\{ending} ends (after|within)"):
        read_channels(cls, [str(tmp_path / name)])


def stack(path: Path, **options: Any) -> bytes:
    """A file of six pages, each after the other."""
    with tifffile.TiffWriter(path, **options) as tiff:
        for plane in VOXELS:
            tiff.write(plane, contiguous=False, metadata=None, photometric="minisblack")
    return path.read_bytes()


TIFFS: dict[str, Callable[[Path], Any]] = {
    "pages": stack,
    "bigtiff": lambda path: stack(path, bigtiff=True),
    "one_piece": lambda path: tifffile.imwrite(path, VOXELS, photometric="minisblack"),
    "packed": lambda path: tifffile.imwrite(path, VOXELS, photometric="minisblack", compression="zlib"),
    "tiles": lambda path: tifffile.imwrite(path, VOXELS, photometric="minisblack", tile=(16, 16)),
    "imagej": lambda path: tifffile.imwrite(path, VOXELS, imagej=True),
    "ome": lambda path: tifffile.imwrite(path, VOXELS, ome=True, photometric="minisblack"),
    "itk": lambda path: SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOXELS), str(path), True),
}


@pytest.mark.parametrize("reader", ["Tiff3DIO", "SimpleITKIO"])
@pytest.mark.parametrize("kind", TIFFS)
def test_stack_of_pages_cut_anywhere(reader, kind, tmp_path) -> None:
    """Whatever is cut off: refused, or every voxel is there."""
    file = tmp_path / "case_0000.tif"
    TIFFS[kind](file)
    content = file.read_bytes()
    with tifffile.TiffFile(file) as tiff:
        between = tiff.pages[3].offset
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    expected = cls().read_images([str(file)])[0]
    assert np.array_equal(read_channels(cls, [str(file)])[0], expected)
    for end in (between, between + 1, *range(9, len(content), 97), len(content) - 1):
        file.write_bytes(content[:end])
        try:
            channels, _ = read_channels(cls, [str(file)])
        except UsageError as error:
            assert str(file) in str(error)  # noqa: PT017
            continue
        assert np.array_equal(channels, expected)


def test_stack_says_how_many_pages_are_there(tmp_path) -> None:
    file = tmp_path / "case_0000.tif"
    content = stack(file)
    with tifffile.TiffFile(file) as tiff:
        between = tiff.pages[3].offset
    file.write_bytes(content[:between])
    cls = Model(reader="Tiff3DIO").managers()[0].image_reader_writer_class
    with pytest.raises(UsageError, match=rf"3 are there, the next should be at byte {between:,}, and the file has"):
        read_channels(cls, [str(file)])


def test_planes_that_a_stack_only_promises(tmp_path) -> None:
    """The library makes zeros of them."""
    file = tmp_path / "case_0000.tif"
    tifffile.imwrite(file, VOXELS, ome=True, photometric="minisblack", metadata={"axes": "ZYX"})
    promise = tifffile.tiffcomment(file).replace('SizeZ="6"', 'SizeZ="9"')
    tifffile.imwrite(file, VOXELS, description=promise, metadata=None, photometric="minisblack")
    cls = Model(reader="Tiff3DIO").managers()[0].image_reader_writer_class
    with pytest.raises(UsageError, match="3 of the 9 pages that its header promises are missing"):
        read_channels(cls, [str(file)])


@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        ("NaturalImage2DIO", ".png"),
        ("NaturalImage2DIO", ".bmp"),
        ("NaturalImage2DIO", ".tif"),
        ("SimpleITKIO", ".bmp"),
        ("SimpleITKIO", ".png"),
        ("SimpleITKIO", ".jpg"),
    ],
)
def test_pictures_cut_anywhere(reader, ending, tmp_path) -> None:
    file = tmp_path / f"case_0000{ending}"
    picture = np.random.default_rng(0).integers(0, 255, (24, 20), np.uint8)
    io.imsave(file, picture, check_contrast=False)
    content = file.read_bytes()
    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    expected = cls().read_images([str(file)])[0]
    assert np.array_equal(np.stack(read_channels(cls, [str(file)])[0]), expected)
    for end in (0, 60, len(content) // 2, len(content) - 20):
        file.write_bytes(content[:end])
        with pytest.raises(UsageError, match="case_0000"):
            read_channels(cls, [str(file)])


@pytest.mark.parametrize("ending", [".tif", ".gipl", ".mhd"])
def test_previous_stage_is_verified_too(ending, tmp_path) -> None:
    stage = tmp_path / f"stage{ending}"
    image = SimpleITK.Cast(ct() > 0, SimpleITK.sitkUInt8)
    SimpleITK.WriteImage(image, str(stage))
    data = stage.with_suffix(".raw") if ending == ".mhd" else stage
    data.write_bytes(data.read_bytes()[:-2000])
    with pytest.raises(UsageError, match=f"stage{ending} cannot be read"):
        preprocess_case(write(tmp_path, [ct()]), str(stage), *Model().managers(), LABELS)


@pytest.fixture
def same_locale() -> Iterator[None]:
    """ITK's writer of .vtk files leaves the process in another."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.usefixtures("same_locale")
def test_format_that_is_not_known_is_told_of_once(tmp_path, caplog) -> None:
    file = str(tmp_path / "case_0000.vtk")
    SimpleITK.WriteImage(ct()[:8, :8, :8], file)
    cls = Model().managers()[0].image_reader_writer_class
    for _ in range(2):
        assert read_channels(cls, [file])[0][0].shape == (8, 8, 8)
    assert caplog.text.count("of .vtk files it is not known here how they end") == 1
