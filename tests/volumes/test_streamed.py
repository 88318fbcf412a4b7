"""Label maps that leave in a stream: the files are those of nnU-Net's writer, which is the oracle, without its copy."""

from __future__ import annotations

import gzip
import itertools
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK
from children import names, python
from nnunetv2.imageio import simpleitk_reader_writer
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.nnunet.label_writing import write_segmentation, writer_bytes
from nnunet_lowmem.volumes import streamed, tiff_pages, voxel_files

TURN = (0.36, 0.48, -0.8, -0.8, 0.6, 0.0, 0.48, 0.64, 0.6)
GEOMETRIES = {
    "upright": ((1.0, 2.0, 3.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1)),
    "oblique, negative origin": ((0.7, 0.7, 2.5), (-123.456, 77.1, -900.0), TURN),
    "mirrored": ((0.5, 1 / 3, 1.0), (-1e-7, 3.0, 1 / 3), (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)),
    "permuted": ((1.1, 1.2, 1.3), (5.0, 6.0, 7.0), (0.0, 1, 0, 0, 0, -1, 1, 0, 0)),
}
SHAPES = [(5, 6, 7), (1, 6, 7), (5, 1, 7), (5, 6, 1), (9, 1, 1), (1, 1, 9), (1, 1, 1), (2, 2, 2)]
# those at which the writer chooses another type
LARGEST_LABELS = [0, 254, 255, 300]
BUFFER_BYTES = 2**24


def properties(geometry: str = "upright") -> dict[str, Any]:
    return {"sitk_stuff": dict(zip(("spacing", "origin", "direction"), GEOMETRIES[geometry], strict=True))}


def labels(shape: tuple[int, ...], largest: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, largest + 1, shape).astype(np.uint16 if largest > 255 else np.uint8)
    values.flat[-1] = largest
    return values


def ours(array: np.ndarray, path: Path, stuff: dict[str, Any], writer: Any = SimpleITKIO) -> None:
    write_segmentation(array, stuff, str(path), SimpleNamespace(image_reader_writer_class=writer))


def decoded(path: Path) -> list[bytes]:
    """Header and voxels; the number of compressed bytes counts only as what it is."""
    stored = path.read_bytes()
    if path.name.endswith(".gz"):
        return [gzip.decompress(stored)]
    if path.suffix == ".nrrd":
        header, _, voxels = stored.partition(b"\n\n")
        return [header, gzip.decompress(voxels)]
    if path.suffix == ".mha":
        header, _, voxels = stored.partition(b"ElementDataFile = LOCAL\n")
        size = re.search(rb"CompressedDataSize =\s+([0-9]+)\n", header)
        assert int(size[1]) == len(voxels)
        return [header.replace(size[0], b""), zlib.decompress(voxels)]
    return [stored]


def assert_same_image(path: Path, other: Path) -> None:
    """As SimpleITK reads them, and nothing else is in the files."""
    image, expected = SimpleITK.ReadImage(str(path)), SimpleITK.ReadImage(str(other))
    for ask in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        assert getattr(image, ask)() == getattr(expected, ask)()
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(expected))
    assert decoded(path) == decoded(other)


@pytest.fixture(autouse=True)
def _streams_small_maps(monkeypatch) -> None:
    monkeypatch.setattr(label_writing, "STREAMED_FROM_BYTES", 0)


@pytest.fixture
def streams(monkeypatch) -> list[Path]:
    """Files that were written in a stream."""
    written: list[Path] = []
    write = streamed.Frame.write
    monkeypatch.setattr(streamed.Frame, "write", lambda *given: (write(*given), written.append(given[-1]))[0])
    return written


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ending", streamed.ENDINGS)
def test_files_are_those_of_stocks_writer(ending, geometry, tmp_path, streams):
    path, expected = tmp_path / f"ours{ending}", tmp_path / f"stocks{ending}"
    pairs = [*itertools.product(SHAPES, [3]), *itertools.product(SHAPES[:1], LARGEST_LABELS)]
    for shape, largest in pairs:
        SimpleITKIO().write_seg(labels(shape, largest), str(expected), properties(geometry))
        ours(labels(shape, largest), path, properties(geometry))
        assert_same_image(path, expected)
    assert len(streams) == len(pairs)
    assert names(tmp_path) == sorted([path.name, expected.name])


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 3, 7), (5, 1, 300), (3, 6, 7), (6, 5, 3), (1, 6, 7)])
def test_tiffs_have_the_bytes_of_stocks_writer(shape, tmp_path, monkeypatch):
    """Page by page, but where an axis could be one of colours; what is written beside them as well."""
    written: list[Path] = []
    write = tiff_pages.Pages.write
    monkeypatch.setattr(tiff_pages.Pages, "write", lambda *given: (write(*given), written.append(given[-1]))[0])
    for number, largest in enumerate(LARGEST_LABELS):
        ours_in, stocks_in = tmp_path / f"ours{number}", tmp_path / f"stocks{number}"
        for folder in (ours_in, stocks_in):
            folder.mkdir()
        array = np.asfortranarray(labels(shape, largest))
        Tiff3DIO().write_seg(array, str(stocks_in / "case.tif"), {"spacing": (1.0, 2.0, 3.0)})
        ours(array, ours_in / "case.tif", {"spacing": (1.0, 2.0, 3.0)}, Tiff3DIO)
        assert names(ours_in) == ["case.json", "case.tif"]
        for name in names(ours_in):
            assert (ours_in / name).read_bytes() == (stocks_in / name).read_bytes()
    assert len(written) == (len(LARGEST_LABELS) if shape[0] > 4 and shape[2] > 4 else 0)


@pytest.mark.parametrize("ending", streamed.ENDINGS)
def test_flat_images(ending, tmp_path, streams):
    stuff = {"sitk_stuff": {"spacing": (0.5, 2.0), "origin": (-3.0, 4.0), "direction": (0.0, 1.0, -1.0, 0.0)}}
    SimpleITKIO().write_seg(labels((1, 33, 44)), str(tmp_path / f"stocks{ending}"), stuff)
    ours(labels((1, 33, 44)), tmp_path / f"ours{ending}", stuff)
    assert_same_image(tmp_path / f"ours{ending}", tmp_path / f"stocks{ending}")
    assert len(streams) == 1


@pytest.mark.parametrize("block_bytes", [1, 10, 100, 1000])
@pytest.mark.parametrize("ending", [".nii", ".gipl"])
def test_blocks_follow_each_other_however_the_map_lies_in_memory(ending, block_bytes, tmp_path, monkeypatch, streams):
    monkeypatch.setattr(voxel_files, "BLOCK_BYTES", block_bytes)
    mapped = np.memmap(tmp_path / "map", np.uint16, "w+", shape=(8, 9, 10))
    mapped[:] = labels((8, 9, 10), 300)
    views = [mapped, mapped.transpose(2, 0, 1), mapped.T, mapped[::-1, :, ::2], np.minimum(mapped, 7).T]
    for view in views:
        SimpleITKIO().write_seg(view, str(tmp_path / f"stocks{ending}"), properties())
        ours(view, tmp_path / f"ours{ending}", properties())
        assert_same_image(tmp_path / f"ours{ending}", tmp_path / f"stocks{ending}")
    assert len(streams) == len(views)


class Derived(SimpleITKIO):
    """Somebody's."""


def patched(monkeypatch) -> type:
    write = SimpleITKIO.write_seg
    monkeypatch.setattr(SimpleITKIO, "write_seg", lambda *given: write(*given))
    return SimpleITKIO


def with_another_library(monkeypatch) -> type:
    write = SimpleITK.WriteImage
    monkeypatch.setattr(simpleitk_reader_writer.sitk, "WriteImage", lambda *given: write(*given))
    return SimpleITKIO


@pytest.mark.parametrize("writer", [lambda _: Derived, patched, with_another_library])
def test_what_is_not_stocks_is_called(writer: Callable[..., type], tmp_path, monkeypatch, streams):
    ours(labels((5, 6, 7)), tmp_path / "case.nii.gz", properties(), made := writer(monkeypatch))
    assert not streams
    assert writer_bytes(made, ".nii.gz", (10, 10, 10), 2) == BUFFER_BYTES + 2000


@pytest.mark.parametrize("stuff, shape", [({}, (5, 6, 7)), (properties(), (1, 1, 2**15)), (properties(), (0, 6, 7))])
def test_what_stock_refuses_stock_refuses(stuff, shape, tmp_path, streams):
    """Properties that are missing, an axis that is too long for NIfTI, and a map without voxels."""
    array = np.zeros(shape, np.uint8)
    with pytest.raises((KeyError, RuntimeError, ValueError)) as stocks:
        SimpleITKIO().write_seg(array, str(tmp_path / "stocks.nii"), stuff)
    (tmp_path / "out").mkdir()
    with pytest.raises(stocks.type):
        ours(array, tmp_path / "out" / "case.nii", stuff)
    assert not streams
    assert names(tmp_path / "out") == []


def test_what_writers_take_beside_the_map():
    reorient = getattr(simpleitk_reader_writer, "SimpleITKIOWithReorient", None)  # new in nnU-Net 2.6
    for writer, ending, one, two in [
        (SimpleITKIO, ".nii.gz", 0, 0),
        (SimpleITKIO, ".mhd", 1, 2),
        (NibabelIO, ".nii.gz", 0, 1),
        (NibabelIOWithReorient, ".nii.gz", 0, 1),
        (NaturalImage2DIO, ".png", 1, 2),
        *([(reorient, ".nii.gz", 3, 3)] if reorient else []),
    ]:
        taken = [writer_bytes(writer, ending, (100, 100, 100), label_bytes) - BUFFER_BYTES for label_bytes in (1, 2)]
        assert taken == [one * 10**6, two * 10**6], (writer, ending)


LIMITED = """
    import resource, sys
    from pathlib import Path
    from types import SimpleNamespace
    import numpy as np
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunet_lowmem.nnunet import label_writing
    from nnunet_lowmem.nnunet.label_writing import write_segmentation, writer_bytes
    from nnunet_lowmem.volumes.verifying import verify_label_file
    folder, plans = Path(sys.argv[1]), SimpleNamespace(image_reader_writer_class=SimpleITKIO)
    stuff = {"sitk_stuff": {"spacing": (1.0, 2.0, 3.0), "origin": (0.0, 0.0, 0.0), "direction": np.eye(3).ravel()}}
    labels = np.memmap(folder / "map", np.uint8, "w+", shape=(100, 1024, 1024))
    labels[60:80, 100:120, 100:120] = 3
    few = np.random.default_rng(0).integers(0, 9, (40, 50, 60)).astype(np.uint8)

    def write(array, name):
        try:
            write_segmentation(array, stuff, str(folder / "out" / name), plans)
        except Exception as error:
            return f"{[kind.__name__ for kind in type(error).__mro__ if kind in (OSError, RuntimeError)]} {error}"
        return "written"

    label_writing.STREAMED_FROM_BYTES = 0
    write(few, "few.nii.gz")
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    held_bytes = 1024 * int(status["VmData"].split()[0])
    room_bytes = writer_bytes(SimpleITKIO, ".nii.gz", labels.shape, 1) + 2**23
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes + room_bytes, resource.RLIM_INFINITY))
    print(room_bytes, write(labels, "large.nii.gz"))
    try:
        SimpleITKIO().write_seg(labels, str(folder / "stocks.nii.gz"), stuff)
    except (MemoryError, RuntimeError):
        print("not by the writer")
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".gipl"):
        for plane in range(40 if ending in (".nii", ".gipl") else 12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (500 + 3000 * plane, resource.RLIM_INFINITY))
            told = write(few, "cut" + ending)
            print(ending, told, sorted(path.name for path in (folder / "out").iterdir() if "few" not in path.name))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_map_and_a_disk_that_fills_at_any_plane_leaves_nothing(tmp_path):
    """A map of 100 MiB, within what is planned and what an allocator keeps; then files that may not be longer."""
    (tmp_path / "out").mkdir()
    done = python(LIMITED, tmp_path)
    large, stocks, *cut = done.stdout.splitlines()
    assert large == f"{BUFFER_BYTES + 2**23} written", done
    assert stocks == "not by the writer"
    assert len(cut) == 2 * 40 + 3 * 12
    for told in cut:
        due = r"\S+ \['OSError', 'RuntimeError'\] .*could not be written whole: File too large.* \['large.nii.gz'\]"
        assert re.fullmatch(due, told), told
    assert names(tmp_path / "out") == ["few.nii.gz", "large.nii.gz"]
    image = SimpleITK.ReadImage(str(tmp_path / "out" / "large.nii.gz"))
    assert image.GetSize() == (1024, 1024, 100)
    assert image[100, 100, 60] == image[119, 119, 79] == 3
    assert image[120, 119, 79] == 0
