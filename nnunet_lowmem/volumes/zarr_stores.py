"""Arrays of zarr, versions 2 and 3, sharded or not, and the images of OME-Zarr."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.volumes import ome
from nnunet_lowmem.volumes.arrays import Axes, Place, array_header, refuse_selection, some
from nnunet_lowmem.volumes.headers import Header
from nnunet_lowmem.volumes.selection import SIGNS, Selection, is_remote
from nnunet_lowmem.volumes.stored_parts import Box4, Shape4

_NEEDED = "zarr 3 or newer is needed: pip install 'nnunet_lowmem[zarr]'"
# its last four say how many there are of a chunk
_BLOSC_HEADER_BYTES = 16


class ZarrArray:
    """An array of zarr as channels, z, y, x.

    Parameters
    ----------
    array : zarr.Array
    axes : Axes
    name : str
        As messages show it.
    """

    def __init__(self, array: Any, axes: Axes, name: str) -> None:
        self._array, self._axes, self._name = array, axes, name
        self.shape = axes.shape
        # what is around shards is decoded with them
        inner = array.shards if array.shards and len(getattr(array.metadata, "codecs", ())) > 1 else array.chunks
        self.chunks = axes.of_four([min(size, max(1, most)) for size, most in zip(inner, array.shape, strict=True)])
        self.dtype = np.dtype(array.dtype)
        root = getattr(array.store, "root", None)
        is_blosc = any("blosc" in type(codec).__name__.lower() for codec in array.compressors[-1:])
        self._files = Path(root, array.path) if isinstance(root, Path) and is_blosc and not array.shards else None

    def read(self, box: Box4) -> NDArray[Any]:
        """Decode a box of whole chunks; a chunk that is not there is the fill value."""
        if self._files is not None:
            ranges = (range(p.start // size, -(-p.stop // size)) for p, size in zip(box, self.chunks, strict=True))
            for c, z, y, x in product(*ranges):
                _check_blosc(self._files / self._array.metadata.encode_chunk_key(self._axes.chunk((c, z, y, x))))
        values = np.asarray(self._array[self._axes.selection(box)])
        return values.reshape([part.stop - part.start for part in box])

    def name_of(self, chunk: Shape4) -> str:
        """Return path and place of a chunk."""
        return f"{self._name}: chunk {'/'.join(map(str, self._axes.chunk(chunk)))}"


def _check_blosc(file: Path) -> None:
    """Refuse a chunk that is cut: blosc goes by the size in its header, and reads on behind what there is."""
    try:
        with file.open("rb") as stream:
            head, held_bytes = stream.read(_BLOSC_HEADER_BYTES), os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        return
    needed_bytes = int.from_bytes(head[-4:], "little") if len(head) == _BLOSC_HEADER_BYTES else _BLOSC_HEADER_BYTES
    if held_bytes < needed_bytes:
        raise DamagedFileError(f"{file} holds {held_bytes:,} of {needed_bytes:,} bytes")


def library() -> Any:
    """Return zarr.

    Raises
    ------
    UsageError
        If it is not there, or too old.
    """
    try:
        import zarr
    except ImportError as error:
        raise UsageError(_NEEDED) from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise UsageError(f"zarr {zarr.__version__} is installed; {_NEEDED}")
    return zarr


def address_of(volume: Any) -> str | None:
    """Return where an array or a group of zarr lies; None for anything else.

    Raises
    ------
    UsageError
        If it lies nowhere but in memory.
    """
    if not type(volume).__module__.startswith("zarr."):
        return None
    path = str(getattr(volume, "store_path", ""))
    if path.startswith("memory:") or "://" not in path:
        raise UsageError(f"{volume!r} lies in no store that has a path: give its voxels as an array")
    return path.removeprefix("file://")


def header(path: Path | str, selection: Selection) -> Header:
    """Return the header of an array, or of a scale of an image.

    Raises
    ------
    UsageError
        If there is none, zarr is missing, or it is none of a volume.
    DamagedFileError
        If the metadata cannot be read.
    """
    refuse_selection(path, "a zarr store", selection, "key", "planes")
    found = _opened(str(path))
    name = str(path)
    place, letters = Place(None), ""
    if hasattr(found, "keys"):
        found, scale = _image(found, name, selection)
        name = f"{name}/{scale.path}"
        letters = scale.axes
        spacing = None if selection.spacing is not None else scale.spacing
        place = Place(spacing, scale.origin, scale.unit, scale.version)
    elif selection.level:
        raise UsageError(f"{name}: is an array and has no scales; --level {selection.level} is asked for")
    try:
        axes = Axes(letters or _named_axes(found), found.shape)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    array = ZarrArray(found, axes, name)
    beside = () if is_remote(path) else tuple(_signs(Path(path), Path(name)))
    return array_header(Path(path), axes, array.dtype, place, spacing=selection.spacing, chunked=array, beside=beside)


def _opened(path: str) -> Any:
    zarr = library()
    try:
        return zarr.open(path, mode="r")
    except ImportError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # of stores, codecs and json, each its own
        told = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(f"its metadata cannot be read: {told}") from error


def _image(group: Any, name: str, selection: Selection) -> tuple[Any, ome.Scale]:
    """Return the array of a scale, and what is said of it."""
    attributes = group.attrs.asdict()
    if not ome.is_image(attributes):
        inside = some(sorted(_children(group)))
        raise UsageError(f"{name} is a group and no image; give what is in it: {inside or 'nothing'}")
    try:
        scale = ome.scale_of(attributes, selection.level, selection.spacing is not None)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    try:
        array = group[scale.path]
    except Exception as error:  # a KeyError, or what is wrong with its metadata
        raise DamagedFileError(f"its level {selection.level}, {scale.path}, cannot be opened: {error}") from error
    if hasattr(array, "keys"):
        raise DamagedFileError(f"its level {selection.level}, {scale.path}, is no array")
    if len(array.shape) != len(scale.axes):
        raise DamagedFileError(f"its metadata says the axes {scale.axes}, and {scale.path} has shape {array.shape}")
    return array, scale


def _children(group: Any) -> list[str]:
    with suppress(Exception):  # a store that cannot be listed
        return [str(key) for key in group.keys()]  # noqa: SIM118  # no mapping
    return []


def _named_axes(array: Any) -> str:
    """Return the axes of a plain array, if it names all of them by a letter of ours."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.asdict().get("_ARRAY_DIMENSIONS") or ()
    letters = [str(name).lower() for name in names]
    return "".join(letters) if letters and all(letter in [*"tczyx"] for letter in letters) else ""


def _signs(*folders: Path) -> list[Path]:
    """Return the files of metadata, as far as they are there."""
    return [folder / sign for folder in dict.fromkeys(folders) for sign in SIGNS if (folder / sign).is_file()]
