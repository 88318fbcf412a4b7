"""Volumes in TIFF and BigTIFF files, with the metadata of OME and ImageJ, and folders of planes.

A page is a chunk. Where a file holds its planes one after the other as they are, no page is decoded.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.volumes import ome
from nnunet_lowmem.volumes.arrays import Axes, Place, array_header
from nnunet_lowmem.volumes.headers import Header
from nnunet_lowmem.volumes.label_images import LabelImage, block_of, stored_type
from nnunet_lowmem.volumes.selection import Selection, ending_of, planes_in
from nnunet_lowmem.volumes.stored_parts import Box4, Part, Shape4
from nnunet_lowmem.volumes.tiff_pages import silence, verify_chain, verify_series

# by tifffile's letters: depth, other, images of a sequence; samples of a colour
_LETTERS = {**dict.fromkeys("ZIQ", "z"), **dict.fromkeys("CS", "c"), "T": "t", "Y": "y", "X": "x"}
#: Of lengths in OME-XML that say none.
_OME_UNIT = "µm"
_SYMBOLS = {"micrometer": "µm", "millimeter": "mm", "nanometer": "nm", "centimeter": "cm", "meter": "m"}
# of which a TIFF with offsets of four bytes is certain to hold the pages and all that is around them
_CLASSIC_BYTES = 2**31


class _Page(NamedTuple):
    """Where the pieces of a page lie, and what decodes them; of a file with one page nothing is kept."""

    path: Path
    keyframe: Any = None
    offsets: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


class TiffArray:
    """Pages as channels, z, y, x: each is one plane of a channel, or of all of its colours.

    Parameters
    ----------
    pages : sequence of _Page
        In the order of the axes.
    order : str
        Axes of the file, some of ``tczyx`` in any order.
    axes : Axes
        The same in the order of a volume.
    dtype : numpy dtype
    colours : int
        Values of a pixel.
    """

    def __init__(self, pages: Sequence[_Page], order: str, axes: Axes, dtype: np.dtype[Any], colours: int) -> None:
        self._pages, self._colours, self.dtype = pages, colours, dtype
        self.shape = axes.shape
        self.chunks = (colours, 1, *axes.shape[2:])
        self._channels_last = "c" in order and "z" in order and order.index("c") > order.index("z")

    def read(self, box: Box4) -> NDArray[Any]:
        """Decode pages."""
        found = np.empty([part.stop - part.start for part in box], self.dtype)
        for number, c in enumerate(range(box[0].start, box[0].stop, self._colours)):
            for depth, z in enumerate(range(box[1].start, box[1].stop)):
                first = number * self._colours
                found[first : first + self._colours, depth] = _decoded(self._pages[self._number(c, z)])
        return found

    def name_of(self, chunk: Shape4) -> str:
        """Return file and number of a page."""
        number = self._number(chunk[0] * self._colours, chunk[1])
        path = self._pages[number].path
        return f"{path}: page {sum(page.path == path for page in self._pages[:number])}"

    def _number(self, channel: int, plane: int) -> int:
        groups, group = self.shape[0] // self._colours, channel // self._colours
        return plane * groups + group if self._channels_last else group * self.shape[1] + plane


def _decoded(page: _Page) -> NDArray[Any]:
    """Return a page, colours first; pieces that the file says to be empty are 0, as in tifffile."""
    if page.keyframe is None:
        import tifffile

        with silence():
            return np.asarray(tifffile.imread(page.path))[None]
    frame = page.keyframe
    found = np.zeros(frame.shaped, frame.dtype)
    with page.path.open("rb") as file:
        for number, (offset, count) in enumerate(zip(page.offsets, page.counts, strict=True)):
            file.seek(offset)
            data = file.read(count)
            if len(data) < count:
                raise DamagedFileError(f"{page.path.name} ends {count - len(data):,} bytes too early")
            tables = {"jpegtables": frame.jpegtables} if frame.jpegtables is not None else {}
            piece, (s, d, h, w, _), shape = frame.decode(data if count else None, number, **tables)
            if piece is None:
                continue
            target = found[s, d : d + shape[0], h : h + shape[1], w : w + shape[2]]
            target[...] = piece[: target.shape[0], : target.shape[1], : target.shape[2]]
    return np.moveaxis(found, -1, 1).reshape(-1, *found.shape[2:4])


def header(path: Path, selection: Selection) -> Header:
    """Return the header of a TIFF file, or of a folder of planes.

    Raises
    ------
    UsageError
        If it is no volume, or has several points in time.
    DamagedFileError
        If something is missing.
    """
    return _of_planes(path, selection) if selection.planes and path.is_dir() else _of_file(path, selection)


def _of_file(path: Path, selection: Selection) -> Header:
    import tifffile

    with silence():
        try:
            tiff = tifffile.TiffFile(path)
        except OSError:
            raise
        except Exception as error:
            raise DamagedFileError(f"{path.name}: {error}") from error
        with tiff:
            verify_chain(tiff, path.name)
            series = tiff.series[0]
            verify_series(series, path.name)
            letters = "".join(_LETTERS.get(letter, "?") for letter in series.axes)
            colours = series.keyframe.samplesperpixel
            order, axes, in_order = _axes(path, letters, series.shape)
            place = _place(path, tiff, selection)
            dtype = np.dtype(series.dtype).newbyteorder(tiff.byteorder)
            parts: tuple[Part, ...] = ()
            if series.dataoffset is not None and in_order and colours == 1:
                size_bytes = math.prod(series.shape) * dtype.itemsize
                parts = (Part(path, int(series.dataoffset), size_bytes),)
                chunked = None
            else:
                pages = [_page(path, page) for page in series.pages]
                chunked = TiffArray(pages, order, axes, np.dtype(series.dtype), colours)
                dtype = chunked.dtype
            sidecar = _sidecar(path)
            beside = (sidecar,) if sidecar.is_file() else ()
            return array_header(
                path, axes, dtype, place, spacing=selection.spacing, chunked=chunked, parts=parts, beside=beside
            )


def _axes(path: Path, letters: str, shape: Sequence[int]) -> tuple[str, Axes, bool]:
    """Return the axes of the file, those of the volume, and whether they are in the same order."""
    known = [(letter, size) for letter, size in zip(letters, shape, strict=True) if letter != "?" or size > 1]
    names = "".join(letter for letter, _ in known)
    try:
        if "?" in names or len(set(names)) < len(names):
            raise UsageError(f"its axes are {', '.join(names)}: they must be of t, c, z, y, x, each once")
        in_order = sorted(known, key=lambda entry: "tczyx".index(entry[0]))
        axes = Axes("".join(letter for letter, _ in in_order), [size for _, size in in_order])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return names, axes, known == in_order


def _page(path: Path, page: Any) -> _Page:
    return _Page(path, page.keyframe, tuple(page.dataoffsets), tuple(page.databytecounts))


def _of_planes(folder: Path, selection: Selection) -> Header:
    import tifffile

    files, pages, first, place = planes_in(folder), [], None, Place(None)
    with silence():
        for file in files:
            try:
                with tifffile.TiffFile(file) as tiff:
                    verify_chain(tiff, file.name)
                    page = tiff.pages.first
                    held = len(tiff.pages), page.shape, page.dtype, page.samplesperpixel
                    if held[0] != 1 or held[3] != 1:
                        raise UsageError(
                            f"{file} holds {held[0]} pages of {held[3]} values per pixel: a plane is one page of one"
                        )
                    first = first or held
                    if held != first:
                        raise UsageError(
                            f"{file} is {held[1]} of {held[2]}, and {files[0].name} is {first[1]} of {first[2]}: the "
                            "planes of a volume are alike"
                        )
                    pages.append(_Page(file))
                    place = _place(file, tiff, selection) if len(pages) == 1 else place
            except (UsageError, DamagedFileError, OSError):
                raise
            except Exception as error:
                raise DamagedFileError(f"{file.name}: {error}") from error
    assert first is not None, "there is a file"
    axes = Axes("zyx", (len(files), *first[1]))
    array = TiffArray(pages, "zyx", axes, np.dtype(first[2]), 1)
    return array_header(folder, axes, array.dtype, place, spacing=selection.spacing, chunked=array)


# -- how large voxels are ----------------------------------------------------------------------------------------------


def _place(path: Path, tiff: Any, selection: Selection) -> Place:
    """Return what says where the voxels lie: nnU-Net's file beside it, OME's metadata, or ImageJ's."""
    if selection.spacing is not None:
        return Place(None)
    with suppress(OSError, ValueError, KeyError, TypeError):
        steps = json.loads(_sidecar(path).read_text(encoding="utf-8"))["spacing"]
        return Place(tuple(map(float, steps)), unit=ome.MILLIMETRE)
    try:
        if tiff.is_ome and tiff.ome_metadata:
            return _by_ome(tiff.ome_metadata)
        if tiff.is_imagej:
            return _by_imagej(tiff)
    except (UsageError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        raise DamagedFileError(f"its metadata says no spacing that can be: {error}; give --spacing Z Y X") from error
    return Place(None)


def _sidecar(path: Path) -> Path:
    """As nnU-Net's Tiff3DIO looks for it."""
    return path.with_name(path.name[: len(path.name) - len(ending_of(path))] + ".json")


def _by_ome(text: str) -> Place:
    pixels = next((node for node in ElementTree.fromstring(text).iter() if node.tag.endswith("Pixels")), None)
    if pixels is None or not pixels.get("PhysicalSizeX"):
        return Place(None)
    unit = pixels.get("PhysicalSizeXUnit", _OME_UNIT)
    steps = []
    for axis in "ZYX":
        size = pixels.get(f"PhysicalSize{axis}") or pixels.get("PhysicalSizeX") or math.nan
        steps.append(float(size) * ome.millimetres(pixels.get(f"PhysicalSize{axis}Unit", unit)))
    return Place(tuple(steps), unit=ome.canonical(unit))


def _by_imagej(tiff: Any) -> Place:
    """Pixels per unit along y and x, and the unit and the step along z in words."""
    told = tiff.imagej_metadata or {}
    unit = str(told.get("unit", "")).encode().decode("unicode_escape")
    tags = tiff.pages.first.tags
    if unit.lower() not in ome.MILLIMETRES or "XResolution" not in tags:
        return Place(None)
    length = ome.millimetres(unit)
    x, y = (
        tags[name].value[1] / tags[name].value[0] * length if tags.get(name) and tags[name].value[0] else length
        for name in ("XResolution", "YResolution")
    )
    return Place((float(told.get("spacing", 0)) * length or x, y, x), unit=ome.canonical(unit))


# -- label maps --------------------------------------------------------------------------------------------------------


def write(labels: NDArray[Any], path: Path, image: LabelImage) -> None:
    """Write a map of shape (z, y, x), which may be mapped, page by page, with OME's metadata.

    Raises
    ------
    OSError
        If the disk is full, or there can be no such file.
    """
    import tifffile

    dtype = stored_type(labels)
    unit = image.unit or ome.MILLIMETRE
    length, sizes = ome.millimetres(unit), dict[str, Any]()
    for axis, step in zip("ZYX", image.spacing, strict=True):
        sizes |= {f"PhysicalSize{axis}": step / length, f"PhysicalSize{axis}Unit": _SYMBOLS.get(unit, unit)}
    about = json.dumps({"labels": dict(image.classes), **image.made})
    planes = (block_of(labels, (slice(z, z + 1), slice(None), slice(None)), dtype)[0] for z in range(len(labels)))
    tifffile.imwrite(
        path,
        planes,
        shape=labels.shape,
        dtype=dtype,
        ome=True,
        bigtiff=labels.size * dtype.itemsize > _CLASSIC_BYTES,
        photometric="minisblack",
        compression="zlib",
        maxworkers=1,  # in threads it would compress half a GiB at a time
        metadata={"axes": "ZYX", **sizes, "Description": about},
    )
