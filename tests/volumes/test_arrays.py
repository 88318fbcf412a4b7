"""Volumes that are arrays, in files of the real libraries: OME-Zarr, zarr, TIFF, HDF5."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from volume_files import SPACING, VOLUMES, VOXELS, ome_zarr

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.volumes import chunked_volume, file_volume
from nnunet_lowmem.volumes.formats import read_header, read_voxels, verify_voxels
from nnunet_lowmem.volumes.headers import Library
from nnunet_lowmem.volumes.selection import Selection

PLAIN = Selection()


class Counting:
    """An array that counts how often each chunk is decoded."""

    def __init__(self, array: Any) -> None:
        self._array, self.decoded = array, Counter[tuple[int, ...]]()
        self.shape, self.chunks, self.dtype = array.shape, array.chunks, array.dtype

    def name_of(self, chunk: Any) -> str:
        return self._array.name_of(chunk)

    def read(self, box: Any) -> Any:
        ranges = (range(b.start // size, -(-b.stop // size)) for b, size in zip(box, self.chunks, strict=True))
        self.decoded.update(product(*ranges))
        return self._array.read(box)


def channels(path: Path, selection: Selection = PLAIN, depth: int = 8) -> list[Any]:
    header = read_header(str(path), selection)
    assert header.layout is not None
    if header.layout.chunked is None:
        return list(file_volume.channels_in(header))
    return list(chunked_volume.channels_of(header.layout.chunked, [(0, depth)], np.empty))


@pytest.mark.parametrize("name", VOLUMES)
def test_volume(name: str, tmp_path: Path) -> None:
    made = VOLUMES[name](tmp_path)
    header = read_header(str(made.path), made.selection)
    assert header.read_with is Library.OWN
    voxels = made.voxels
    assert (header.shape, header.dtype) == (voxels.shape, voxels.dtype.newbyteorder("="))
    assert header.grid()[1] == pytest.approx(made.spacing)
    assert header.place["origin"][::-1] == pytest.approx(made.origin)
    assert np.array_equal(read_voxels(header), voxels)
    if not made.selection.planes:
        verify_voxels(str(made.path), made.selection)
    by_channel = voxels.reshape(-1, *voxels.shape[-3:])
    found = channels(made.path, made.selection)
    assert len(found) == len(by_channel)
    rng = random.Random(0)
    for volume, expected in zip(found, by_channel, strict=True):
        for _ in range(40):
            ends = [sorted(rng.sample(range(size + 1), 2)) for size in expected.shape]
            box = tuple(slice(*pair) for pair in ends)
            assert np.array_equal(volume[box], expected[box])
        turned = volume.transpose((2, 0, 1)).within((slice(1, 9), slice(0, None), slice(2, 7)))
        assert np.array_equal(turned[:], expected.transpose(2, 0, 1)[1:9, :, 2:7])


@pytest.mark.parametrize("name", [name for name in VOLUMES if "raw" not in name])
def test_each_chunk_is_decoded_once_in_a_pass_of_overlapping_tiles(name: str, tmp_path: Path) -> None:
    made = VOLUMES[name](tmp_path)
    header = read_header(str(made.path), made.selection)
    assert header.layout is not None
    assert header.layout.chunked is not None
    counting, tile, step = Counting(header.layout.chunked), 8, 4
    found = chunked_volume.channels_of(counting, [], np.empty)
    sizes = found[0].shape
    for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        counting.decoded.clear()
        volumes = chunked_volume.channels_of(counting, [(axes[0], tile)], np.empty)
        starts = [range(0, max(1, sizes[axis] - tile + step), step) for axis in axes]
        for corner in product(*starts):
            box = [slice(0)] * 3
            for axis, first in zip(axes, corner, strict=True):
                box[axis] = slice(first, min(first + tile, sizes[axis]))
            for volume in volumes:
                volume[tuple(box)]
        assert set(counting.decoded.values()) == {1}
    kept = chunked_volume.kept_bytes(header.layout.chunked, [(0, tile)])
    assert kept < 3 * made.voxels.nbytes


def test_levels_axes_and_units_of_ome_zarr(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.ome.zarr", VOXELS, "0.5", levels=2, axes="tczyx")
    first, second = (read_header(str(path), Selection(level=level)) for level in (0, 1))
    assert first.shape == (1, *VOXELS.shape)
    assert second.shape == (1, *VOXELS[::2, ::2, ::2].shape)
    assert second.grid()[1] == pytest.approx([2 * step for step in SPACING])
    given = read_header(str(path), Selection(spacing=(1.0, 2.0, 3.0)))
    assert (given.grid()[1], given.place["spacing"]) == ([1.0, 2.0, 3.0], (3.0, 2.0, 1.0))


def edit_metadata(path: Path, edit: Callable[[Any], None]) -> None:
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    edit(content["attributes"]["ome"]["multiscales"][0])
    file.write_text(json.dumps(content))


def rename_axes(*names: str) -> Callable[[Any], None]:
    return lambda image: [axis.update(name=name) for axis, name in zip(image["axes"], names, strict=True)] and None


def unit(name: str) -> Callable[[Any], None]:
    return lambda image: [axis.update(unit=name) for axis in image["axes"]] and None


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename_axes("x", "y", "z"), "a.ome.zarr: its axes are x, y, z, in an order that a volume cannot have"),
        (rename_axes("z", "angle", "x"), "its axes are z, angle, x; 'angle' of type 'space' is none of t, c, z, y, x"),
        (unit("second"), "the unit 'second' is no length; give the spacing in mm with --spacing"),
        (lambda image: image.pop("axes"), "its metadata is not that of an OME-Zarr 0.4 or 0.5: KeyError: 'axes'"),
        (lambda image: image["datasets"][0].update(path="9"), "its level 0, 9, cannot be opened"),
        (
            lambda image: image["datasets"][0]["coordinateTransformations"][0].update(scale=[1, 0, 1]),
            "its voxels are .*0.* mm large; mend it, or give --spacing",
        ),
        (
            lambda image: image["datasets"][0]["coordinateTransformations"][0].update(type="affine"),
            "a transformation of type 'affine'",
        ),
    ],
    ids=["order", "angle", "unit", "no_axes", "no_array", "flat", "affine"],
)
def test_metadata_that_cannot_be(edit: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.ome.zarr", VOXELS, "0.5")
    edit_metadata(path, edit)
    with pytest.raises(UsageError, match=words) as caught:
        read_header(str(path), PLAIN)
    assert "a.ome.zarr" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_volume(tmp_path: Path) -> None:
    levels = ome_zarr(tmp_path / "a.ome.zarr", VOXELS, "0.4")
    group = tmp_path / "group.zarr"
    zarr.create_group(store=str(group)).create_group("inside")
    array = tmp_path / "array.zarr"
    zarr.create_array(store=str(array), shape=(2, 3), dtype="c8")
    time = tmp_path / "time.zarr"
    zarr.create_array(store=str(time), shape=(3, 1, 4, 5, 6), dtype="u1")
    two, none, text, cut = (tmp_path / name for name in ("two.h5", "none.h5", "text.h5", "cut.h5"))
    with h5py.File(two, "w") as file:
        file["a"], file["b/c"] = VOXELS, VOXELS
    with h5py.File(none, "w") as file:
        file["a"] = [1, 2]
    text.write_bytes(b"nothing of the kind")
    cut.write_bytes(two.read_bytes()[:-100])
    for path, selection, words in (
        (levels, Selection(level=3), r"a.ome.zarr: it has the levels 0 to 0, and --level 3 is asked for"),
        (levels / "0", Selection(level=1), "is an array and has no scales; --level 1"),
        (group, PLAIN, "group.zarr is a group and no image; give what is in it: inside"),
        (array, PLAIN, "holds values of type complex64; real numbers are needed"),
        (time, PLAIN, "it has 3 points in time"),
        (two, PLAIN, "two.h5 holds 2 data sets that may be volumes; say which with --key: a, b/c"),
        (two, Selection(key="d"), "two.h5 holds no data set 'd', but a, b/c"),
        (none, PLAIN, "holds 0 data sets"),
        (text, PLAIN, "text.h5 .*it is no whole HDF5 file"),
        (cut, Selection(key="a"), "cut.h5 .*it is no whole HDF5 file"),
    ):
        with pytest.raises(UsageError, match=words):
            read_header(str(path), selection)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_a_chunk_that_is_missing_is_the_fill_value_and_a_damaged_one_is_named(
    codec: str, version: str, tmp_path: Path
) -> None:
    path = ome_zarr(tmp_path / "a.ome.zarr", VOXELS, version, codec=codec)
    chunk = path / "0" / ("c/1/0/1" if version == "0.5" else "1/0/1")
    whole = chunk.read_bytes()
    chunk.unlink()
    expected = VOXELS.copy()
    expected[8:16, :8, 8:16] = 0
    assert np.array_equal(channels(path)[0][:], expected)
    for damaged in (whole[: len(whole) // 2], b"", bytes(len(whole))):
        chunk.write_bytes(damaged)
        for read in (lambda: channels(path)[0][:], lambda: read_voxels(read_header(str(path), PLAIN))):
            with pytest.raises(UsageError, match=r"a.ome.zarr/0: chunk 1/0/1 cannot be decoded") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_damaged_pages_and_chunks_are_named(tmp_path: Path) -> None:
    tiff = VOLUMES["tiff_deflate"](tmp_path).path
    with tifffile.TiffFile(tiff) as file:
        page = file.pages[5]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    found = channels(tiff)[0]
    content = bytearray(tiff.read_bytes())
    content[offset : offset + count] = bytes(count)
    tiff.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"a.ome.tif: page 0 cannot be decoded: it was changed while it was being read"
    ):
        found[:]
    found = channels(tiff)[0]
    with pytest.raises(UsageError, match=r"a.ome.tif: page 5 cannot be decoded"):
        found[:]
    assert np.array_equal(found[:5], VOXELS[:5])


def test_what_lies_in_several_files_or_in_odd_axes(tmp_path: Path) -> None:
    """Of pages in other files, and of one page for all, the voxels; else a refusal."""
    names = [tmp_path / f"m{number}.ome.tif" for number in (0, 1)]
    uuids = ["urn:uuid:00000000-0000-0000-0000-00000000000" + digit for digit in "12"]
    data = "".join(
        f'<TiffData IFD="{z % 2}" FirstZ="{z}" PlaneCount="1"><UUID FileName="{names[z // 2].name}">{uuids[z // 2]}'
        "</UUID></TiffData>"
        for z in range(4)
    )
    sizes = 'SizeX="23" SizeY="19" SizeZ="4" SizeC="1" SizeT="1" PhysicalSizeX="2" PhysicalSizeY="3" PhysicalSizeZ="4"'
    for name, uuid, planes in zip(names, uuids, (VOXELS[:2], VOXELS[2:4]), strict=True):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0"><Pixels '
            f'ID="Pixels:0" DimensionOrder="XYZCT" Type="int16" {sizes}>{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(name, planes, description=xml, metadata=None, compression="zlib")
    assert np.array_equal(channels(names[0])[0][:], VOXELS[:4])
    assert read_header(str(names[0]), PLAIN).grid()[1] == pytest.approx([0.004, 0.003, 0.002])
    stack, turned = tmp_path / "stack.tif", tmp_path / "turned.tif"
    both = np.stack([VOXELS, VOXELS[::-1]], 1)
    tifffile.imwrite(stack, both, imagej=True, metadata={"axes": "ZCYX"}, truncate=True)
    found = channels(stack)
    assert all(np.array_equal(volume[:], both[:, number]) for number, volume in enumerate(found))
    tifffile.imwrite(turned, VOXELS, metadata={"axes": "XYZ"})
    with pytest.raises(UsageError, match="its axes are X, Y, Z: the last two, which are a page, must be Y and X"):
        read_header(str(turned), PLAIN)


def test_data_sets_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    other, path = tmp_path / "other.h5", tmp_path / "links.h5"
    with h5py.File(other, "w") as file:
        file["raw"] = VOXELS
    layout = h5py.VirtualLayout(VOXELS.shape, VOXELS.dtype)
    layout[:] = h5py.VirtualSource(str(tmp_path / "missing.h5"), "raw", VOXELS.shape)
    with h5py.File(path, "w") as file:
        file["raw"] = VOXELS[::-1]
        file["link"] = h5py.ExternalLink("other.h5", "/raw")
        file.create_virtual_dataset("virtual", layout)
        file["nothing"] = h5py.Empty("f4")
    for key in ("link", "virtual"):
        with pytest.raises(UsageError, match=r"links.h5: .* lies in other files; give these, or copy it into one"):
            read_header(str(path), Selection(key=key))
    with pytest.raises(UsageError, match=r"links.h5: nothing has the shape None, and is no volume"):
        read_header(str(path), Selection(key="nothing"))


def test_lengths_that_are_said_in_part(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.ome.zarr", VOXELS, "0.5")
    edit_metadata(path, lambda image: image["axes"][0].pop("unit"))
    assert read_header(str(path), PLAIN).grid()[1] == pytest.approx(SPACING)
    edit_metadata(path, lambda image: image["datasets"][0].pop("coordinateTransformations"))
    header = read_header(str(path), PLAIN)
    assert (header.grid()[1], header.about["is_said"]) == ([1.0, 1.0, 1.0], False)
    tiff = tmp_path / "case_0000.tif"
    tifffile.imwrite(tiff, VOXELS)
    (tmp_path / "case.json").write_text('{"spacing": [3, 2, 1]}')  # as nnU-Net's Tiff3DIO has it
    assert read_header(str(tiff), PLAIN).grid()[1] == [3.0, 2.0, 1.0]
    (tmp_path / "case.json").write_text('{"spacing": [3, 2]}')
    with pytest.raises(UsageError, match=r"its voxels are \(3.0, 2.0\) mm large"):
        read_header(str(tiff), PLAIN)


@pytest.mark.parametrize(
    ("name", "selection", "flag"),
    [
        ("tiff_deflate", Selection(level=1), "level"),
        ("hdf5_gzip", Selection(level=1), "level"),
        ("ome_0.5", Selection(key="raw"), "key"),
    ],
)
def test_what_cannot_be_selected(name: str, selection: Selection, flag: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"for which there is no --{flag}: "):
        read_header(str(VOLUMES[name](tmp_path).path), selection)


def test_planes_that_are_not_alike(tmp_path: Path) -> None:
    made = VOLUMES["planes"](tmp_path)
    tifffile.imwrite(made.path / "p3.tif", np.zeros((4, 5), np.uint8))
    with pytest.raises(UsageError, match=r"p3.tif is \(4, 5\) of uint8, and .* the planes of a volume are alike"):
        read_header(str(made.path), made.selection)
    shutil.rmtree(made.path)
    made.path.mkdir()
    with pytest.raises(UsageError, match="holds no TIFF file"):
        read_header(str(made.path), made.selection)
