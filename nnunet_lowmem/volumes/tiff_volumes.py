"""Volumes in TIFF and BigTIFF files, with the metadata of OME and ImageJ, and folders of planes.

A page is a chunk. Where a file holds its planes one after the other as they are, no page is decoded.
"""

from __future__ import annotations

import json
import logging
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.volumes import ome
from nnunet_lowmem.volumes.arrays import Axes, Place, array_header, refuse_selection
from nnunet_lowmem.volumes.file_volume import check_state, state_at
from nnunet_lowmem.volumes.headers import Header
from nnunet_lowmem.volumes.label_images import LabelImage, block_of, stored_type
from nnunet_lowmem.volumes.selection import Selection, ending_of, planes_in
from nnunet_lowmem.volumes.stored_parts import Box4, Part, Shape4
from nnunet_lowmem.volumes.tiff_pages import silence, verify_chain, verify_series

# by tifffile's letters: depth, other, images of a sequence; samples of a colour
_LETTERS = {**dict.fromkeys("ZIQ", "z"), **dict.fromkeys("CS", "c"), "T": "t", "Y": "y", "X": "x"}
_logger = logging.getLogger(__name__)
#: Of lengths in OME-XML that say none.
_OME_UNIT = "µm"
_SYMBOLS = {
    "angstrom": "Å",
    "picometer": "pm",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "decimeter": "dm",
    "meter": "m",
    "kilometer": "km",
    "inch": "in",
    "foot": "ft",
    "yard": "yd",
}
_NOTHING = np.zeros(0, np.int64)
# of which a TIFF with offsets of four bytes is certain to hold the pages and all that is around them
_CLASSIC_BYTES = 2**31


class _Page(NamedTuple):
    """Where the pieces of a page lie, and what decodes them; of a file with one page nothing is kept."""

    path: Path
    state: tuple[int, ...]
    keyframe: Any = None
    offsets: NDArray[np.int64] = _NOTHING
    counts: NDArray[np.int64] = _NOTHING


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

        with silence(), page.path.open("rb") as file:
            check_state(page.state, file)
            with tifffile.TiffFile(file) as tiff:  # its metadata may name the files of all planes
                return np.asarray(tiff.pages.first.asarray())[None]
    frame = page.keyframe
    found = np.zeros(frame.shaped, frame.dtype)
    with page.path.open("rb") as file:
        check_state(page.state, file)
        for number, (offset, count) in enumerate(zip(page.offsets.tolist(), page.counts.tolist(), strict=True)):
            if offset + count > page.state[0]:
                raise DamagedFileError(
                    f"{page.path.name} has {page.state[0]:,} bytes, and data up to {offset + count:,}"
                )
            file.seek(offset)
            data = file.read(count)
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
    refuse_selection(path, "in TIFF", selection, "level", "key")
    return _of_planes(path, selection) if selection.planes and path.is_dir() else _of_file(path, selection)


def _of_file(path: Path, selection: Selection) -> Header:
    with _opened(path) as tiff:
        verify_chain(tiff, path.name)
        series = tiff.series[0]
        verify_series(series, path.name)
        if len(tiff.series) > 1:
            _logger.warning("%s holds %d images; the first is read, %s", path, len(tiff.series), series.shape)
        colours = series.keyframe.samplesperpixel
        order, axes = _axes(path, series)
        place = _place(path, tiff, selection)
        files = sorted({Path(page.parent.filehandle.path) for page in series.pages})
        beside = tuple(file for file in (*files, *_sidecars(path)) if file != path and file.is_file())
        dtype = np.dtype(series.dtype)
        how: dict[str, Any]
        if series.dataoffset is not None and order == axes.letters and colours == 1:
            size_bytes = math.prod(series.shape) * dtype.itemsize
            how = {"parts": (Part(path, int(series.dataoffset), size_bytes),)}
            dtype = dtype.newbyteorder(tiff.byteorder)
        else:
            how = {"chunked": TiffArray(_pages(path, series, axes), order, axes, dtype, colours)}
        return array_header(path, axes, dtype, place, spacing=selection.spacing, beside=beside, **how)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Give tifffile's view of a file; what is wrong with it is told as damage."""
    import tifffile

    try:
        with silence(), tifffile.TiffFile(path) as tiff:
            yield tiff
    except (UsageError, DamagedFileError, OSError, MemoryError):
        raise
    except Exception as error:  # each of its parts has its own
        raise DamagedFileError(f"{path.name}: {error}") from error


def _axes(path: Path, series: Any) -> tuple[str, Axes]:
    """Return the axes of the file, and those of the volume, which are in an order of their own."""
    letters = "".join(_LETTERS.get(letter, "?") for letter in series.axes)
    known = [(letter, size) for letter, size in zip(letters, series.shape, strict=True) if letter != "?" or size > 1]
    names = "".join(letter for letter, _ in known)
    told = f"{path}: its axes are {', '.join(series.axes)}"
    if "?" in names or len(set(names)) < len(names):
        raise UsageError(f"{told}: they must be of T, C, Z, Y, X, each once")
    if not names.replace("c", "").endswith("yx"):
        raise UsageError(f"{told}: the last two, which are a page, must be Y and X")
    in_order = sorted(known, key=lambda entry: "tczyx".index(entry[0]))
    try:
        return names, Axes("".join(letter for letter, _ in in_order), [size for _, size in in_order])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _pages(path: Path, series: Any, axes: Axes) -> list[_Page]:
    """Return where pages lie; a series in one piece may have one that tells of all."""
    colours, (channels, planes, rows, columns) = series.keyframe.samplesperpixel, axes.shape
    count = channels // colours * planes
    states = {path: state_at(path)}
    if series.dataoffset is not None and len(series.pages) != count:
        size = rows * columns * colours * series.dtype.itemsize
        frame = series.keyframe
        if frame.shaped[1] * frame.shaped[2] != rows or len(frame.dataoffsets) != 1:
            raise UsageError(f"{path}: its pages are not planes")
        starts = [series.dataoffset + number * size for number in range(count)]
        return [_Page(path, states[path], frame, np.array([start]), np.array([size])) for start in starts]
    if len(series.pages) != count or series.keyframe.imagedepth != 1:
        raise UsageError(f"{path}: has {len(series.pages)} pages for {count} planes: it holds others than planes")
    pages = []
    for page in series.pages:
        file = Path(page.parent.filehandle.path)
        states.setdefault(file, state_at(file))
        offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
        pages.append(_Page(file, states[file], page.keyframe, offsets, counts))
    return pages


def _of_planes(folder: Path, selection: Selection) -> Header:
    files, pages, first, place = planes_in(folder), [], None, Place(None)
    for file in files:
        try:
            with _opened(file) as tiff:
                verify_chain(tiff, file.name)
                page = tiff.pages.first
                held = page.shape, page.dtype
                if len(tiff.pages) != 1 or page.samplesperpixel != 1:
                    values = f"{len(tiff.pages)} pages of {page.samplesperpixel} values per pixel"
                    raise UsageError(f"{file} holds {values}: a plane is one page of one")
                if first is None:
                    first, place = held, _place(file, tiff, selection)
                if held != first:
                    both = f"{file} is {held[0]} of {held[1]}, and {files[0].name} is {first[0]} of {first[1]}"
                    raise UsageError(f"{both}: the planes of a volume are alike")
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
        pages.append(_Page(file, state_at(file)))
    assert first is not None, "there is a file"
    axes = Axes("zyx", (len(files), *first[0]))
    array = TiffArray(pages, "zyx", axes, np.dtype(first[1]), 1)
    return array_header(folder, axes, array.dtype, place, spacing=selection.spacing, chunked=array, beside=tuple(files))


# -- how large voxels are ----------------------------------------------------------------------------------------------


def _place(path: Path, tiff: Any, selection: Selection) -> Place:
    """Return what says where the voxels lie: nnU-Net's file beside it, OME's metadata, or ImageJ's."""
    if selection.spacing is not None:
        return Place(None)
    for sidecar in filter(Path.is_file, _sidecars(path)):
        try:
            steps = json.loads(sidecar.read_text(encoding="utf-8"))["spacing"]
            return Place(tuple(map(float, steps)), unit=ome.MILLIMETRE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{sidecar.name} beside it does not say a spacing: {error}") from error
    try:
        if tiff.is_ome and tiff.ome_metadata:
            return _by_ome(tiff.ome_metadata)
        if tiff.is_imagej:
            return _by_imagej(tiff)
    except (UsageError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        raise DamagedFileError(f"its metadata says no spacing that can be: {error}; give --spacing Z Y X") from error
    return Place(None)


def _sidecars(path: Path) -> list[Path]:
    """Return where nnU-Net's Tiff3DIO looks for the spacing: beside an image, by its case, and beside labels."""
    name = path.name[: len(path.name) - len(ending_of(path))]
    cases = [name[:-5]] if re.fullmatch(r".*_\d{4}", name, re.DOTALL) else []
    return [path.with_name(each + ".json") for each in (*cases, name)]


def _by_ome(text: str) -> Place:
    pixels = next((node for node in ElementTree.fromstring(text).iter() if node.tag.endswith("Pixels")), None)
    if pixels is None or not pixels.get("PhysicalSizeX"):
        return Place(None)
    sizes = {
        axis: (pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", _OME_UNIT)) for axis in "XYZ"
    }
    told = [sizes[axis] if sizes[axis][0] else sizes["X"] for axis in "ZYX"]
    steps = [float(size or math.nan) * ome.millimetres(unit) for size, unit in told]
    return Place(tuple(steps), unit=ome.canonical(sizes["X"][1]))


def _by_imagej(tiff: Any) -> Place:
    """Pixels per unit along y and x, and the unit and the step along z in words."""
    told = tiff.imagej_metadata or {}
    unit = str(told.get("unit", ""))
    unit = unit.encode("latin-1", "replace").decode("unicode_escape") if "\\" in unit else unit
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
        sizes |= {f"PhysicalSize{axis}": step / length, f"PhysicalSize{axis}Unit": _SYMBOLS[unit]}
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
