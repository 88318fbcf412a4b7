"""Reads the input images of a case in the type that their files store.

nnU-Net's readers return float32 copies of everything. For the two plain readers and the formats that most people use,
the functions below keep the file's own type (a CT takes half the bytes) and give values that become nnU-Net's when they
are cast to float32, and nnU-Net's properties. Every other reader class, and every other format, is left to the model's
own reader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from nibabel.volumeutils import apply_read_scaling
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

from nnunet_lowmem import overrides
from nnunet_lowmem.bypassed import Step
from nnunet_lowmem.errors import UsageError, because, of_kinds, twin
from nnunet_lowmem.finite_voxels import check_values
from nnunet_lowmem.stored_voxels import (
    KNOWN_ENDINGS,
    is_nifti,
    itk_dtype,
    itk_information,
    read_nifti,
    reason,
    verify_voxels,
)

Volume = NDArray[Any]
"""One channel, shape (x, y, z) in nnU-Net's order of axes, of any real type."""

_logger = logging.getLogger(__name__)


def read_channels(
    reader: type[BaseReaderWriter], files: Sequence[str], accept_nan: bool = False
) -> tuple[list[Volume], dict[str, Any]]:
    """Read the channels of one case.

    Parameters
    ----------
    reader : type
        The model's reader class.
    files : sequence of str
        One file per channel, as a rule.
    accept_nan : bool
        Set NaN and infinity to 0 instead of refusing them.

    Returns
    -------
    channels : list of ndarray, each of shape (x, y, z)
        Cast to float32 they equal the channels that `reader` returns.
    properties : dict
        Equal to those that `reader` returns.

    Raises
    ------
    UsageError
        If a file cannot be read as one scalar image, or the files do not lie on one grid.
    """
    is_replaced = bool(overrides.found(Step.READING, reader))
    with read_by(reader):
        return _read_channels(reader, files, accept_nan, is_replaced)


def _read_channels(
    reader: type[BaseReaderWriter], files: Sequence[str], accept_nan: bool, is_replaced: bool
) -> tuple[list[Volume], dict[str, Any]]:
    if not is_replaced and all(str(file).lower().endswith(KNOWN_ENDINGS) for file in files):
        if reader is SimpleITKIO:
            return _read_with_simpleitk(files, accept_nan)
        if reader is NibabelIO:
            return _read_with_nibabel(files, accept_nan)
    for file in files if not is_replaced else ():  # what a program's own function makes of names is its business
        check_stored(file, accept_nan)
    if is_replaced:
        image, properties = reader().read_images(list(files))
    else:
        image, properties = _guarded(reader().read_images, list(files), " and ".join(files))
    for number, channel in enumerate(image):
        name = files[number] if len(files) == len(image) else f"{files[0]}, channel {number}"
        check_values(channel, name, accept_nan)
    return list(image), properties


def check_stored(file: str, accept_nan: bool) -> None:
    """Check what another reader is about to read: SimpleITK makes 0 of NaN in a NIfTI file without a word."""
    if not is_nifti(file):
        verify_voxels(file)
    else:
        check_values(_guarded(read_nifti, file)[0], file, accept_nan)


def _read_with_simpleitk(files: Sequence[str], accept_nan: bool) -> tuple[list[Volume], dict[str, Any]]:
    arrays: list[Volume] = []
    geometries: list[dict[str, tuple[float, ...]]] = []
    for file in files:
        image, array = _guarded(partial(_itk_voxels, accept_nan=accept_nan), file)
        components = image.GetNumberOfComponents()
        if components != 1:
            raise UsageError(
                f"{file} has {components} values per voxel, 1 is needed. Store every channel in a file of its own."
            )
        geometries.append(
            {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
        )
        arrays.append(array[None] if array.ndim == 2 else array)
    check_grid(files, [array.shape for array in arrays], [geometry["spacing"] for geometry in geometries])
    for name in ("origin", "direction"):
        _warn_if_different(files, name, [geometry[name] for geometry in geometries])
    channels = [channel for array in arrays for channel in (array if array.ndim == 4 else [array])]
    return channels, {"sitk_stuff": geometries[0], "spacing": _spacing(geometries[0]["spacing"])}


def _itk_voxels(file: str, accept_nan: bool) -> tuple[Any, Volume]:
    """Return SimpleITK's reader of the header, and the voxels that it would read, every one of them from the file."""
    information = itk_information(file)
    if not is_nifti(file):
        verify_voxels(file)
        array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file))
        check_values(array, file, accept_nan)
        return information, array
    voxels, (slope, intercept) = read_nifti(file)
    check_values(voxels, file, accept_nan)
    native = voxels.dtype.newbyteorder("=")
    scaled = not (slope in (0, 1) and intercept == 0) and np.isfinite(slope)
    if scaled or native != itk_dtype(information) or voxels.shape != information.GetSize()[::-1]:
        del voxels
        return information, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file))
    return information, voxels if voxels.dtype == native else voxels.byteswap(inplace=True).view(native)


def _spacing(spacing: tuple[float, ...]) -> list[float]:
    """Spacing in the order of the array's axes; a 2D image counts as one very thick slice, as in nnU-Net's reader."""
    last_three = list(spacing)[::-1][-3:]
    if len(spacing) == 2:
        last_three = [max(spacing) * 999, *last_three]
    return list(np.abs(last_three))


def _read_with_nibabel(files: Sequence[str], accept_nan: bool) -> tuple[list[Volume], dict[str, Any]]:
    channels, affines, spacings = [], [], []
    for file in files:
        image = _guarded(nibabel.load, file)
        if image.ndim != 3:
            raise UsageError(f"{file} has {image.ndim} dimensions, 3 are needed by the model's reader, NibabelIO.")
        affines.append(image.affine)
        spacings.append([float(step) for step in image.header.get_zooms()[::-1]])
        channel = _guarded(partial(_nibabel_voxels, image), file)
        check_values(channel, file, accept_nan)
        channels.append(channel)
    check_grid(files, [channel.shape for channel in channels], spacings)
    _warn_if_different(files, "affine", affines)
    return channels, {"nibabel_stuff": {"original_affine": affines[0]}, "spacing": spacings[0]}


def _nibabel_voxels(image: Any, file: str) -> Volume:
    """Voxels as stored where float32 follows from them alone; else float32, by way of float64 as in ``get_fdata``."""
    stored, _ = read_nifti(file)
    slope, intercept = np.float64(image.dataobj.slope), np.float64(image.dataobj.inter)
    if (slope, intercept) == (1.0, 0.0) and (stored.dtype.kind == "f" or stored.dtype.itemsize <= 4):
        return stored
    voxels = np.empty(stored.shape, np.float32)
    for plane, values in zip(voxels, stored, strict=True):
        plane[...] = apply_read_scaling(values, slope, intercept).astype(np.float64)
    return voxels


@contextmanager
def read_by(reader: type[BaseReaderWriter]) -> Iterator[None]:
    """Let what is wrong with a file be of the kind that stock raises, whose reader meets it: ITK knows one kind."""
    try:
        yield
    except UsageError as error:
        cause = error.__cause__
        if cause is None:
            raise
        raise of_kinds(error, RuntimeError if issubclass(reader, SimpleITKIO) else type(cause)) from cause


def _guarded(read: Callable[[Any], Any], source: Any, name: str | None = None) -> Any:
    """Call ``read(source)`` and name the file if it fails; readers raise whatever they like."""
    try:
        return read(source)
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise because(UsageError, f"{name or source} cannot be read: {reason(error)}", error) from error


def check_grid(files: Sequence[str], shapes: Sequence[tuple[int, ...]], spacings: Sequence[Sequence[float]]) -> None:
    """Refuse channels of different shape, or of different spacing by nnU-Net's tolerance."""
    for name, values in (("shape", shapes), ("spacing", spacings)):
        for file, value in zip(files, values, strict=True):
            if len(value) != len(values[0]) or not BaseReaderWriter._check_all_same([values[0], value]):
                raise twin(UsageError, RuntimeError)(
                    f"The channels of a case must lie on one grid: {files[0]} has {name} {tuple(values[0])}, "
                    f"{file} has {tuple(value)}. Resample one onto the other."
                )


def _warn_if_different(files: Sequence[str], name: str, values: Sequence[Any]) -> None:
    """Log what nnU-Net only warns about, too: the channels' grids lie in different places."""
    for file, value in zip(files, values, strict=True):
        if np.shape(value) != np.shape(values[0]) or not np.allclose(value, values[0]):
            _logger.warning("%s and %s have a different %s: %s and %s", files[0], file, name, values[0], value)
