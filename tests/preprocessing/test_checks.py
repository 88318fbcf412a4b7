"""Damaged and unfitting inputs: refused by their headers, or found while they are read; never predicted."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import nibabel
import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from model_table import TWO_CHANNELS
from nnunetv2.imageio import simpleitk_reader_writer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_file, make_predictor, predict_ours, predict_stock
from PIL import Image
from preprocessing_oracle import LABELS, ZSCORE, Model, as_type, changed, ct, write

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import LowMemError, UsageError
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.preprocessing.case import preprocess_array, preprocess_case
from nnunet_lowmem.preprocessing.checks import check_case
from nnunet_lowmem.preprocessing.finite_voxels import check_values
from nnunet_lowmem.volumes.formats import read_header

READER_AND_ENDING = [
    ("SimpleITKIO", ".nii"),
    ("SimpleITKIO", ".nii.gz"),
    ("SimpleITKIO", ".nrrd"),
    ("SimpleITKIO", ".mha"),
    ("NibabelIO", ".nii"),
    ("NibabelIO", ".nii.gz"),
    ("SimpleITKIOWithReorient", ".nii.gz"),
    ("NibabelIOWithReorient", ".nii.gz"),
]
if not hasattr(simpleitk_reader_writer, "SimpleITKIOWithReorient"):  # new in nnU-Net 2.6
    READER_AND_ENDING.remove(("SimpleITKIOWithReorient", ".nii.gz"))
ENDINGS = [".nii", ".nii.gz", ".nrrd", ".mha"]
every_reader = pytest.mark.parametrize("reader, ending", READER_AND_ENDING)
every_ending = pytest.mark.parametrize("ending", ENDINGS)


def one_file(folder: Path, ending: str, image: SimpleITK.Image | None = None) -> Path:
    """A CT of noise below its voxels, so that compression leaves bytes to damage; .nrrd and .mha compressed."""
    image = ct()[:40, :40, :40] if image is None else image
    file = folder / f"case_0000{ending}"
    SimpleITK.WriteImage(image, str(file), ending in (".nrrd", ".mha"))
    return file


def prepare(file: Path, reader: str = "SimpleITKIO", previous: str | None = None, **options: Any) -> Any:
    return preprocess_case([str(file)], previous, *Model(reader=reader).managers(), LABELS, **options)


def refusal(file: Path, reader: str = "SimpleITKIO") -> str:
    with pytest.raises(UsageError) as caught:
        prepare(file, reader)
    text = str(caught.value)
    assert str(file) in text
    assert "RAM" not in text
    assert "\n" not in text
    return text


# -- damaged files


@every_reader
@pytest.mark.parametrize("percent", [10, 50, 99])
def test_cut_file(reader, ending, percent, tmp_path):
    file = one_file(tmp_path, ending)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * percent // 100])
    assert "cannot be read" in refusal(file, reader)


@every_reader
def test_file_that_lacks_its_last_byte(reader, ending, tmp_path):
    file = one_file(tmp_path, ending)
    file.write_bytes(file.read_bytes()[:-1])
    assert "cannot be read" in refusal(file, reader)


@pytest.mark.parametrize("reader, ending", [pair for pair in READER_AND_ENDING if pair[1] != ".nii"])
@pytest.mark.parametrize("place", [0.4, 0.9, -2])
def test_flipped_bit(reader, ending, place, tmp_path):
    """Uncompressed files have no checksum: there, a bit is a bit. Place −2 is in the length or the checksum."""
    file = one_file(tmp_path, ending)
    content = bytearray(file.read_bytes())
    content[place if place < 0 else int(len(content) * place)] ^= 1
    file.write_bytes(content)
    assert "cannot be read" in refusal(file, reader)


@every_reader
@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"x" * 5000, b"\x1f\x8b", gzip.compress(b"not an image" * 99, mtime=0)]
)
def test_no_image_at_all(reader, ending, content, tmp_path):
    file = tmp_path / f"case_0000{ending}"
    file.write_bytes(content)
    assert "cannot be read" in refusal(file, reader)


@every_ending
def test_cut_previous_stage(ending, tmp_path):
    """SimpleITK would fill it up with background."""
    file = one_file(tmp_path, ".nii.gz")
    stage = tmp_path / f"stage{ending}"
    SimpleITK.WriteImage(changed(ct()[:40, :40, :40], lambda a: (a > 0).astype(np.uint8)), str(stage))
    assert prepare(file, previous=str(stage)).previous_stage is not None
    stage.write_bytes(stage.read_bytes()[:-200])
    with pytest.raises(UsageError, match=f"stage{ending} cannot be read"):
        prepare(file, previous=str(stage))


def huge_header(ending: str) -> bytes:
    """3000 voxels along each axis."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((3000, 3000, 3000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    nrrd = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 3000 3000 3000\nspacings: 1 1 1\nendian: little\nencoding: raw\n\n"
    )
    mha = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = 3000 3000 3000\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return {".nrrd": nrrd.encode(), ".mha": mha.encode()}.get(ending, header.binaryblock + bytes(4))


@every_reader
def test_header_that_promises_54_gb(reader, ending, tmp_path):
    file = tmp_path / f"case_0000{ending}"
    content = huge_header(ending) + np.random.default_rng(0).bytes(300_000)
    file.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    begin = time.monotonic()
    text = refusal(file, reader)
    assert time.monotonic() - begin < 2
    assert "54,000,000,000 bytes of voxels in shape (3000, 3000, 3000)" in text


# -- headers that make no sense


def with_spacing(folder: Path, ending: str, spacing: float) -> Path:
    file = one_file(folder, ".nii" if ending == ".nii.gz" else ending)
    content = file.read_bytes()
    if ending in (".nii", ".nii.gz"):
        content = content[:84] + struct.pack("<f", spacing) + content[88:]
        file = folder / f"case_0000{ending}"
    elif ending == ".nrrd":
        content = content.replace(b"(0,-3,0)", f"(0,{spacing},0)".encode())
        assert f"(0,{spacing},0)".encode() in content
    else:
        content = content.replace(b"ElementSpacing = 3 3 3", f"ElementSpacing = 3 {spacing} 3".encode())
        assert f" {spacing} ".encode() in content
    file.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    return file


@every_ending
@pytest.mark.parametrize("spacing", [0.0, float("nan"), float("inf")])
def test_spacing_that_is_none(ending, spacing, tmp_path):
    """SimpleITK makes 1 of it, or refuses it in words of its own."""
    text = refusal(with_spacing(tmp_path, ending, spacing))
    assert "spacing" in text.lower() or "direction" in text.lower()


@pytest.mark.parametrize("reader, ending", [("NibabelIO", ".nii"), ("NibabelIO", ".nii.gz")])
@pytest.mark.parametrize("spacing", [0.0, float("nan")])
def test_spacing_that_is_none_with_nibabel(reader, ending, spacing, tmp_path):
    assert f"{spacing}" in refusal(with_spacing(tmp_path, ending, spacing), reader)


def test_spacing_that_makes_a_mountain_of_voxels(tmp_path):
    """512 × 512 × 250 voxels of 100 mm at 0.8 mm are 10^14."""
    image = SimpleITK.Image((512, 512, 250), SimpleITK.sitkUInt8)
    image.SetSpacing((100.0, 100.0, 100.0))
    file = one_file(tmp_path, ".nii.gz", image)
    with pytest.raises(UsageError, match=r"case_0000.*\(250, 512, 512\) voxels.*1\.28e\+14"):
        preprocess_case([str(file)], None, *Model(spacing=(0.8, 0.8, 0.8)).managers(), LABELS)


def test_thick_slices_of_a_flat_model_are_not_counted(tmp_path):
    """A two-dimensional configuration keeps the slices apart, however thick they are."""
    image = ct()[:40, :40, :40]
    image.SetSpacing((3.0, 3.0, 1e9))
    managers = Model(spacing=(3.0, 3.0)).managers()
    assert preprocess_case([str(one_file(tmp_path, ".nii.gz", image))], None, *managers, LABELS).image.size == 64_000


# -- channels


def test_fewer_channels_than_the_model_takes(tmp_path):
    with pytest.raises(UsageError, match=r"has 1 channels, the model takes 2.*_0000 to _0001.*case_0000"):
        preprocess_case([str(one_file(tmp_path, ".nii.gz"))], None, *Model(schemes=ZSCORE * 2).managers(), LABELS)


def test_more_channels_than_the_model_takes(tmp_path):
    files = write(tmp_path, [ct(), ct()])
    with pytest.raises(UsageError, match=r"has 2 channels, the model takes 1.*case_0001"):
        preprocess_case(files, None, *Model().managers(), LABELS)


@every_ending
def test_vector_pixels(ending, tmp_path):
    image = SimpleITK.Compose([ct(), ct(), ct()])
    assert "3 values per voxel, 1 is needed" in refusal(one_file(tmp_path, ending, image))


def test_colours_in_a_nifti(tmp_path):
    voxels = np.zeros((8, 9, 10), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    file = tmp_path / "case_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), file)
    for reader in ("SimpleITKIO", "NibabelIO"):
        assert "3 values per voxel, 1 is needed" in refusal(file, reader)


def test_four_dimensions_are_channels_where_the_reader_takes_them(tmp_path):
    file = str(one_file(tmp_path, ".nii.gz", SimpleITK.JoinSeries([ct(), ct()])))
    assert "has 2 channels, the model takes 1" in refusal(Path(file))
    assert "4 dimensions, 3 are needed" in refusal(Path(file), "NibabelIO")
    assert len(preprocess_case([file], None, *Model(schemes=ZSCORE * 2).managers(), LABELS).image) == 2


def test_check_of_headers_alone_finds_channels_on_different_grids(tmp_path):
    files = write(tmp_path, [ct(), ct()[:-1]])
    reader = Model().managers()[0].image_reader_writer_class
    with pytest.raises(UsageError, match=r"case_0000.* shape \(60, 60, 70\), .*case_0001.* \(60, 60, 69\)"):
        check_case(files, reader, 2, (1.0, 1.0, 1.0))


@every_ending
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_headers_agree_with_simpleitk(ending, dtype, tmp_path):
    image = as_type(ct()[:11, :12, :13], dtype)
    image.SetSpacing((0.5, 1.25, 2.0))
    header = read_header(str(one_file(tmp_path, ending, image)))
    assert header.shape == (13, 12, 11)
    assert header.spacing == header.layout.spacing[::-1] == (2.0, 1.25, 0.5)
    assert (header.components, header.needed_bytes) == (1, 11 * 12 * 13 * np.dtype(dtype).itemsize)
    assert header.is_read_in_place


# -- pictures

GREY = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50)
PICTURES = {
    "alpha": (
        np.dstack([GREY] * 4),
        3,
        r"has 4 channels: .*blue and alpha \(.*takes 3.*: save it as RGB, with",
    ),
    "gray": (GREY, 3, r"has 1 channel: gray; the model takes 3, .*: save it as RGB, where"),
    "16 bits": (GREY.astype(np.uint16) * 257, 3, r"has 1 channel: gray; the model takes 3, .*: save it as RGB, where"),
    "gray and alpha": (np.dstack([GREY] * 2), 3, r"has 2 channels: gray and alpha .*: save it as RGB, without alpha"),
    "colours": (np.dstack([GREY] * 3), 1, r"has 3 channels: .*; the model takes 1, gray: save it as gray"),
    "two": (GREY, 2, r"has 1 channel: gray; the model takes 2: give one file per channel, _0000 to _0001"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_other_colours(name, tmp_path):
    voxels, channels, words = PICTURES[name]
    file = tmp_path / "case_0000.png"
    imageio.imwrite(file, voxels)
    managers = Model(schemes=ZSCORE * channels, reader="NaturalImage2DIO", spacing=(1.0, 1.0)).managers()
    with pytest.raises(UsageError, match=words) as caught:
        preprocess_case([str(file)], None, *managers, LABELS)
    assert str(caught.value).startswith(f"{file}: the picture has")
    kinds = {"colours": IndexError, "gray and alpha": AssertionError, "alpha": IndexError}
    assert isinstance(caught.value, kinds.get(name, RuntimeError))


def test_picture_with_a_palette_is_one_of_colours(tmp_path):
    Image.fromarray(np.dstack([GREY, GREY.T.reshape(40, 50), 255 - GREY])).quantize(64).save(tmp_path / "case_0000.png")
    managers = Model(schemes=ZSCORE * 3, reader="NaturalImage2DIO", spacing=(1.0, 1.0)).managers()
    assert len(preprocess_case([str(tmp_path / "case_0000.png")], None, *managers, LABELS).image) == 3


# -- files that stock reads although they are unusual


@pytest.mark.parametrize(
    "unusual",
    [
        lambda raw: raw,  # not compressed, whatever the name says
        lambda raw: gzip.compress(raw) + bytes(512),  # padded by a tape or a block device
        lambda raw: gzip.compress(raw[:9000]) + gzip.compress(raw[9000:]),  # two members
        lambda raw: gzip.compress(raw + b"more"),  # bytes after the voxels
    ],
)
def test_unusual_but_whole_files_are_read_as_stock_reads_them(unusual: Callable[[bytes], bytes], tmp_path):
    file = tmp_path / "case_0000.nii.gz"
    file.write_bytes(unusual(one_file(tmp_path, ".nii").read_bytes()))
    reader = Model().managers()[0].image_reader_writer_class
    expected, _ = reader().read_images([str(file)])
    from nnunet_lowmem.preprocessing.reading import read_channels

    channels, _ = read_channels(reader, [str(file)])
    assert np.array_equal(channels[0].astype(np.float32), expected[0])


# -- values


def spoilt(value: float, dtype: Any = np.float32) -> SimpleITK.Image:
    def spoil(a: np.ndarray) -> np.ndarray:
        a = a.astype(dtype)
        a[7, 8, 9] = a[30, 1, 2] = value
        return a

    return changed(ct()[:40, :40, :40], spoil)


@every_reader
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_voxels_that_are_no_numbers(reader, ending, value, tmp_path):
    assert "2 of 64000 voxels are NaN or infinite" in refusal(one_file(tmp_path, ending, spoilt(value)), reader)


def test_first_such_voxel_is_named_as_viewers_name_it(tmp_path):
    file = one_file(tmp_path, ".nii.gz", spoilt(float("nan")))
    assert "the first at index (9, 8, 7), x first" in refusal(file)
    assert np.isnan(nibabel.load(file).get_fdata()[9, 8, 7])


def test_doubles_beyond_float32_are_infinite_for_the_network(tmp_path):
    assert "2 of 64000" in refusal(one_file(tmp_path, ".nii.gz", spoilt(1e300, np.float64)))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_no_numbers_in_a_scaled_file(reader, tmp_path):
    """SimpleITK would make 0 of the NaN, and then scale it."""
    file = one_file(tmp_path, ".nii", spoilt(float("nan")))
    content = file.read_bytes()
    file.write_bytes(content[:112] + struct.pack("<ff", 2.0, 5.0) + content[120:])
    assert "2 of 64000" in refusal(file, reader)


def test_accepted_nan_counts_as_zero(tmp_path, caplog):
    file = one_file(tmp_path, ".nii.gz", spoilt(float("nan")))
    actual = prepare(file, accept_nan=True)
    assert "2 of 64000 voxels" in caplog.text
    assert "set to 0" in caplog.text
    expected = prepare(one_file(tmp_path, ".nii.gz", spoilt(0.0)))
    assert np.array_equal(actual.image, expected.image)


@pytest.mark.parametrize("value", [float("nan"), 1e39])
@pytest.mark.parametrize("accept", [False, True])
def test_arrays_in_memory(accept, value):
    """Of 64-bit numbers, too, of which float32 makes infinity."""
    image = SimpleITK.GetArrayFromImage(spoilt(float("nan")))[None].astype(np.float64)
    image[np.isnan(image)] = value
    before = image.copy()
    arguments = (image, None, {"spacing": [3.0, 3.0, 3.0]}, *Model().managers(), LABELS)
    if accept:
        assert np.isfinite(preprocess_array(*arguments, accept_nan=True).image).all()
    else:
        with pytest.raises(UsageError, match=r"channel 0: 2 of 64000 voxels .*\(9, 8, 7\)"):
            preprocess_array(*arguments)
    assert np.array_equal(image, before, equal_nan=True)


def test_whole_numbers_are_not_searched():
    class Loud(np.ndarray):
        def __getitem__(self, key):
            raise AssertionError("read")

    check_values(np.zeros((3, 3, 3), np.int16).view(Loud), "name", False)


def test_search_goes_through_large_arrays_in_parts():
    volume = np.zeros((300, 256, 256), np.float32)
    volume[299, 255, 254] = np.inf
    with pytest.raises(UsageError, match=r"1 of 19660800 .*\(254, 255, 299\)"):
        check_values(volume, "name", False)


# -- folders


@pytest.fixture
def good(images, models) -> tuple[str, Path]:
    files = images("head")
    return models(ModelSpec(), files), Path(files[0])


def run(model: str, source: Path, out: Path, *flags: str) -> int:
    folders = ["-i", str(source), "-o", str(out), "-m", model, "-f", "0"]
    return cli.predict_entry_point([*folders, "-device", "cpu", "--disable_progress_bar", *flags])


def test_bad_cases_cost_no_good_case(good, tmp_path, capsys):
    model, image = good
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    content = image.read_bytes()
    for name in ("a_0000", "cut_0000", "extra_0000", "extra_0001", "late_0001", "z_0000"):
        (source / f"{name}.nii.gz").write_bytes(content[: len(content) // 2] if name == "cut_0000" else content)
    raw = gzip.decompress(content)
    (source / "odd_0000.nii.gz").write_bytes(gzip.compress(raw[:70] + struct.pack("<h", 4321) + raw[72:], 1))
    assert run(model, source, out) == 1
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["a.nii.gz", "z.nii.gz"]
    text = "".join(capsys.readouterr())
    for words in (
        "cut_0000.nii.gz cannot be read",
        "2 channels, the model takes 1",
        "late_0000.nii.gz is not a file",
        "datatype 4321",
    ):
        assert words in " ".join(text.split())


def test_header_that_promises_54_gb_costs_no_good_case(images, models, tmp_path, capsys):
    """Nor does the disk space that its label map would take."""
    files = images("head", ".nii")
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(files[0], source / "a_0000.nii")
    (source / "b_0000.nii").write_bytes(huge_header(".nii") + bytes(300_000))
    assert run(models(ModelSpec(file_ending=".nii"), files), source, tmp_path / "out") == 1
    assert (tmp_path / "out" / "a.nii").exists()
    assert "54,000,000,000" in "".join(capsys.readouterr())


def test_names_that_are_skipped_are_told_once(good, tmp_path, caplog):
    model, image = good
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(image, source / "a_0000.nii.gz")
    (source / "b_0000.nii.gz").symlink_to(tmp_path / "nowhere")
    (source / "notes.txt").write_text("")
    (source / ".hidden").write_text("")
    (source / "d_0000.nii.gz").mkdir()
    os.mkfifo(source / "c_0000.nii.gz")
    predict_ours(make_predictor(LowMemPredictor, model), str(source), None)
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert [text.partition("skipped, ")[2] for text in told] == [
        "broken links: b_0000.nii.gz",
        "neither files nor links to files: c_0000.nii.gz",
        "folders: d_0000.nii.gz",
        "without the ending .nii.gz: notes.txt",
    ]


def copies(image: Path, folder: Path, names: list[str], ending: str = ".nii.gz") -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(image, folder / f"{name}{ending}")
    return folder


ODD_NAMES = ["two\nlines", "\x1b[31m[red] %s", "-v ", "'a' \"b\"\ttab"]


@pytest.fixture
def odd(images, models, tmp_path) -> tuple[str, Path]:
    """Cases of odd names, one's segmentation of an earlier run, a stray file, and one that stock passes over."""
    files = images("small")
    numbered = [f"{name}_0000" for name in ODD_NAMES]
    source = copies(Path(files[0]), tmp_path / "in", [*numbered, ODD_NAMES[0], "stray\x07", "-v _mask"])
    return models(ModelSpec(), files), source


def test_names_that_stock_predicts_are_predicted_and_break_no_line(odd, tmp_path, capsys):
    """Each part of a run sees the same list; a file without a channel number costs the part that it falls to."""
    model, source = odd
    cases = [[str(source / f"{name}_0000.nii.gz")] for name in ODD_NAMES]
    (tmp_path / "stock").mkdir()
    predict_stock(make_predictor(nnUNetPredictor, model), cases, str(tmp_path / "stock"))
    out = tmp_path / "out"
    codes = [run(model, source, out, "-num_parts", "2", "-part_id", part) for part in "01"]
    assert sorted(codes) == [0, 1]
    assert sorted(p.name for p in out.glob("*.nii.gz")) == sorted(p.name for p in (tmp_path / "stock").glob("*.nii.gz"))
    stdout, stderr = capsys.readouterr()
    assert "\x1b" not in stderr + stdout
    assert "case two\\nlines: done in " in stdout
    assert "case \\x1b[31m[red] %s: done in " in stdout
    lines = stderr.splitlines()
    assert len([line for line in lines if "earlier run, by their names: two\\nlines.nii.gz" in line]) == 2
    assert len([line for line in lines if line.endswith("without a channel number: -v _mask.nii.gz")]) == 2
    (failed,) = [line for line in lines if line.startswith("error: ")]
    assert "case stray\\x07, preprocessing: " in failed
    assert "stray\\x07.nii.gz has no channel number" in failed
    assert all(line.startswith(("error: ", "warning: ")) for line in lines)


def test_stray_file_in_a_run_that_goes_on_and_in_an_estimate(odd, tmp_path, capsys):
    """It has no output that could be there; where the images are is where the segmentations go."""
    model, source = odd
    (source / "stray_0000x.nii.gz").write_bytes(b"no image")
    for name in ODD_NAMES[1:]:
        (source / f"{name}_0000.nii.gz").unlink()
    assert run(model, source, source, "--continue_prediction") == 1
    assert ", 3 failed: " in "".join(capsys.readouterr())
    assert run(model, source, source, "--estimate") == 2
    stdout, _ = capsys.readouterr()
    assert stdout.count("has no channel number") == 3
    assert "plan for two\\nlines: " in stdout


def test_folder_without_channel_numbers_and_one_that_stock_cannot_predict(odd, images, tmp_path, capsys):
    model, source = odd
    only = copies(Path(images("small")[0]), tmp_path / "only", ["a", "b_000", "c_00000"])
    assert run(model, only, tmp_path / "out") == 2
    assert "a.nii.gz has no channel number" in capsys.readouterr().err
    assert cli.main(["compare", "-i", str(source), "-m", model, "-f", "0", "-device", "cpu"]) == 2
    assert "stray\\x07.nii.gz has no channel number, and stock's command" in capsys.readouterr().err


def test_files_are_sorted_as_stock_sorts_them(odd):
    from nnunetv2.utilities import utils

    _, source = odd
    found = model_files.listing(str(source), ".nii.gz")
    if hasattr(utils, "create_paths_fn"):  # new in nnU-Net 2.7; a pool of processes calls it
        names = utils.subfiles(str(source), suffix=".nii.gz", join=False, sort=True)
        identifiers = utils.get_identifiers_from_splitted_dataset_folder(str(source), ".nii.gz")
        stocks = [utils.create_paths_fn(str(source), names, ".nii.gz", name) for name in identifiers]
        assert found.cases == [files for files in stocks if files]
        assert [] in stocks  # of which stock takes the first
    assert [os.path.basename(file) for file in found.strays] == ["stray\x07.nii.gz"]
    assert (found.earlier, found.passed_over) == (["two\nlines.nii.gz"], ["-v _mask.nii.gz"])


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_name_that_is_no_text(images, models, tmp_path, capsys):
    """It ends the process in SimpleITK; nibabel takes it, and so does its writer."""
    files = images("small")
    source = copies(Path(files[0]), tmp_path / "in", ["x\udcff_0000", "y_0000"])
    for reader, code in (("SimpleITKIO", 1), ("NibabelIO", 0)):
        model = models(ModelSpec(reader=reader), files)
        assert run(model, source, tmp_path / reader) == code
        made = sorted(path.name for path in (tmp_path / reader).glob("*.nii.gz"))
        assert made == ["x\udcff.nii.gz", "y.nii.gz"][code == 1 :]
    stdout, stderr = capsys.readouterr()
    assert "x\\udcff_0000.nii.gz: the name is not UTF-8" in stderr
    assert "case x\\udcff: done in " in stdout
    predictor = make_predictor(nnUNetPredictor, model)
    (tmp_path / "stock").mkdir()
    predict_stock(predictor, [[str(source / "x\udcff_0000.nii.gz")]], str(tmp_path / "stock"))
    assert_same_file(tmp_path / "stock" / "x\udcff.nii.gz", tmp_path / "NibabelIO" / "x\udcff.nii.gz")


def test_missing_channel_that_is_a_broken_link(images, models, tmp_path, capsys):
    files = images("head_two_channels")
    model = models(ModelSpec(**TWO_CHANNELS), files)
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(files[1], source / "b_0001.nii.gz")
    (source / "b_0000.nii.gz").symlink_to(tmp_path / "nowhere")
    assert run(model, source, tmp_path / "out") == 1
    assert "b_0000.nii.gz is a broken link" in " ".join("".join(capsys.readouterr()).split())


def test_nan_is_accepted_by_a_flag(good, tmp_path, capsys):
    model, image = good
    source = tmp_path / "in"
    source.mkdir()
    voxels = SimpleITK.Cast(SimpleITK.ReadImage(str(image)), SimpleITK.sitkFloat32)
    voxels[5, 6, 7] = float("nan")
    SimpleITK.WriteImage(voxels, str(source / "a_0000.nii.gz"))
    assert run(model, source, tmp_path / "refused") == 1
    assert "(5, 6, 7)" in "".join(capsys.readouterr())
    assert run(model, source, tmp_path / "out", "--accept_nan") == 0
    voxels[5, 6, 7] = 0
    SimpleITK.WriteImage(voxels, str(source / "a_0000.nii.gz"))
    (tmp_path / "stock").mkdir()
    predict_stock(make_predictor(nnUNetPredictor, model), [[str(source / "a_0000.nii.gz")]], str(tmp_path / "stock"))
    assert_same_file(tmp_path / "stock" / "a.nii.gz", tmp_path / "out" / "a.nii.gz")


def test_infinite_logits_name_fold_and_tile(good):
    model, image = good
    predictor = make_predictor(LowMemPredictor, model)
    head = predictor.network.decoder.seg_layers[-1]
    head.register_forward_hook(lambda module, inputs, output: output * 1e30)
    words = r"fold_0/checkpoint_final\.pth: .*first at \(\d+, \d+, \d+\) in the tiles that start at \("
    with pytest.raises(LowMemError, match=words):
        predict_ours(predictor, [[str(image)]], None)


def test_file_among_the_images_is_only_replaced_if_it_is_an_output(good, tmp_path, capsys):
    """With one folder for images and outputs, a segmentation there may be somebody's own."""
    model, image = good
    for name in ("a_0000", "b_0000", "b"):
        shutil.copy(image, tmp_path / f"{name}.nii.gz")
    own = (tmp_path / "b.nii.gz").read_bytes()
    assert run(model, tmp_path, tmp_path) == 1
    assert "b.nii.gz is among the images, and no record says that it is an output" in " ".join(capsys.readouterr())
    assert (tmp_path / "b.nii.gz").read_bytes() == own
    (tmp_path / "b_0000.nii.gz").unlink()
    (tmp_path / "b.nii.gz").unlink()
    before = (tmp_path / "a.nii.gz").stat().st_mtime_ns
    assert run(model, tmp_path, tmp_path) == 0
    assert (tmp_path / "a.nii.gz").stat().st_mtime_ns > before
