"""Data sets of HDF5 files."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.types import shape3
from nnunet_lowmem.volumes import ome
from nnunet_lowmem.volumes.arrays import Axes, Place, array_header, refuse_selection, some
from nnunet_lowmem.volumes.file_volume import state_at
from nnunet_lowmem.volumes.headers import Header
from nnunet_lowmem.volumes.label_images import LabelImage, block_of, blocks, stored_type
from nnunet_lowmem.volumes.selection import Selection
from nnunet_lowmem.volumes.stored_parts import Box4, Part, Shape4

_NEEDED = "HDF5 files need h5py: pip install 'nnunet_lowmem[hdf5]'"
#: By which programs say how large voxels are: micrometres, slowest axis first.
SPACING = "element_size_um"
_MILLIMETRES = 1e-3
#: The data set that labels are written to.
LABELS = "labels"
_CHUNK = 64
# of gzip, fast
_LEVEL = 4


class Hdf5Array:
    """A data set as channels, z, y, x, opened whenever it is read."""

    def __init__(self, path: Path, dataset: Any, axes: Axes) -> None:
        self._path, self._key, self._axes = path, dataset.name, axes
        self._state = state_at(path)
        self.shape, self.dtype = axes.shape, dataset.dtype
        # of one that is not in chunks a plane is read at a time
        whole = [1] * (dataset.ndim - 2) + list(dataset.shape[-2:])
        chunks = zip(dataset.chunks or whole, dataset.shape, strict=True)
        self.chunks = axes.of_four([min(size, max(1, most)) for size, most in chunks])

    def read(self, box: Box4) -> NDArray[Any]:
        """Decode a box of whole chunks; one that is not there is the fill value."""
        with library().File(self._path, "r", rdcc_nbytes=0) as file:
            if state_at(self._path) != self._state:
                raise OSError("the file was changed while it was being read")
            values = file[self._key][self._axes.selection(box)]
        return np.asarray(values).reshape([part.stop - part.start for part in box])

    def name_of(self, chunk: Shape4) -> str:
        """Return file, data set and place of a chunk."""
        return f"{self._path}: {self._key}: chunk {'/'.join(map(str, self._axes.chunk(chunk)))}"


def library() -> Any:
    """Return h5py.

    Raises
    ------
    UsageError
        If it is not there.
    """
    try:
        import h5py
    except ImportError as error:
        raise UsageError(_NEEDED) from error
    return h5py


def header(path: Path, selection: Selection) -> Header:
    """Return the header of a data set.

    Raises
    ------
    UsageError
        If h5py is missing, or there is no such data set, several, or none of a volume.
    DamagedFileError
        If it is no HDF5 file, or one that is cut.
    """
    refuse_selection(path, "an HDF5 file", selection, "level", "planes")
    h5py = library()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DamagedFileError(f"it is no whole HDF5 file: {error}") from error
    with file:
        dataset = _dataset(h5py, file, path, selection.key)
        try:
            axes = Axes("", dataset.shape)
        except UsageError as error:
            raise UsageError(f"{path}: {dataset.name}: {error}") from error
        place = Place(None)
        if SPACING in dataset.attrs and selection.spacing is None:
            steps = np.ravel(dataset.attrs[SPACING]).tolist()
            if len(steps) != 3:
                raise DamagedFileError(f"its attribute {SPACING} of {dataset.name} holds {steps}; three are needed")
            place = Place(tuple(float(step) * _MILLIMETRES for step in steps), unit=ome.canonical("um"))
        parts: tuple[Part, ...] = ()
        if dataset.chunks is None and dataset.id.get_offset() is not None:  # its bytes lie as they are
            parts = (Part(path, int(dataset.id.get_offset()), int(dataset.id.get_storage_size())),)
        chunked = None if parts else Hdf5Array(path, dataset, axes)
        return array_header(path, axes, dataset.dtype, place, spacing=selection.spacing, chunked=chunked, parts=parts)


def _dataset(h5py: Any, file: Any, path: Path, key: str) -> Any:
    """Return the data set that is asked for, or the only one that may be a volume."""
    if key and isinstance(file.get(key), h5py.Dataset):
        dataset = file[key]
        if dataset.shape is None or dataset.ndim < 2:
            raise UsageError(f"{path}: {key} has the shape {dataset.shape}, and is no volume")
    else:
        found: list[Any] = []

        def look(_: str, each: Any) -> None:
            with suppress(TypeError):  # of a type that numpy does not have
                is_volume = isinstance(each, h5py.Dataset) and each.shape is not None and each.ndim >= 2
                found.extend([each] * (is_volume and each.dtype.kind in "buif"))

        file.visititems(look)
        told = some([each.name.lstrip("/") for each in found]) or "none"
        if key:
            raise UsageError(f"{path} holds no data set {key!r}, but {told}")
        if len(found) != 1:
            raise UsageError(f"{path} holds {len(found)} data sets that may be volumes; say which with --key: {told}")
        dataset = found[0]
    # of these h5py gives what there is, and where a file is missing the fill value
    if dataset.is_virtual or dataset.external or dataset.file.filename != file.filename:
        raise UsageError(f"{path}: {dataset.name} lies in other files; give these, or copy it into one")
    return dataset


# -- label maps --------------------------------------------------------------------------------------------------------


def write(labels: NDArray[Any], path: Path, image: LabelImage) -> None:
    """Write a map of shape (z, y, x), which may be mapped.

    Raises
    ------
    OSError
        If the disk is full, or there can be no such file.
    """
    dtype, shape = stored_type(labels), shape3(labels.shape)
    chunk = shape3(min(_CHUNK, max(1, extent)) for extent in shape)
    with library().File(path, "w") as file:
        stored = file.create_dataset(LABELS, shape, dtype, chunks=chunk, compression="gzip", compression_opts=_LEVEL)
        for box in blocks(shape, chunk):
            stored[box] = block_of(labels, box, dtype)
        stored.attrs[SPACING] = [step / _MILLIMETRES for step in image.spacing]
        stored.attrs["origin_um"] = [shift / _MILLIMETRES for shift in image.origin]
        stored.attrs["labels"] = json.dumps(dict(image.classes))
        for name, told in image.made.items():
            stored.attrs[name] = json.dumps(told)
