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
from dataclasses import replace
from typing import Any

import numpy as np
import SimpleITK
from nibabel.volumeutils import apply_read_scaling
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError, because, of_kinds, twin
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.preprocessing.finite_voxels import check_values
from nnunet_lowmem.preprocessing.sources import Volume
from nnunet_lowmem.types import Allocate
from nnunet_lowmem.volumes.chunked_volume import Passes, channels_of
from nnunet_lowmem.volumes.file_volume import StoredVolume, channels_in, is_readable_by_parts
from nnunet_lowmem.volumes.formats import Rules, is_volume, read_header, read_voxels, verify_voxels
from nnunet_lowmem.volumes.headers import Header, Library, last_line
from nnunet_lowmem.volumes.selection import Selection

_logger = logging.getLogger(__name__)


def read_channels(
    reader: type[BaseReaderWriter],
    files: Sequence[str],
    accept_nan: bool = False,
    spill: Allocate | None = None,
    passes: Passes = (),
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
    spill : callable or None
        Where voxels go that should not be in RAM; of files that can be read part by part none are kept, of those in
        chunks as many as `passes` need. The model's own reader does not ask.
    passes : Passes
        In which the voxels will be asked for.

    Returns
    -------
    channels : list of ndarray or StoredVolume, each of shape (x, y, z) in nnU-Net's order of axes
        Cast to float32 they equal the channels that `reader` returns.
    properties : dict
        Equal to those that `reader` returns.

    Raises
    ------
    UsageError
        If a file cannot be read as one scalar image, or the files do not lie on one grid.
    """
    is_replaced = bool(lookup.found(Step.READING, reader))
    with read_by(reader):
        read = _read_with_nibabel if reader is NibabelIO else _read_with_simpleitk if is_read_here(reader) else None
        if not is_replaced and read is not None and all(is_volume(file, library_of(reader)) for file in files):
            return read(reader, files, accept_nan, spill, passes)
        if selection_of(reader) is not None:
            raise UsageError(f"{' and '.join(files)}: is no volume of a kind that is known here")
        for file in files:
            check_stored(file, reader, accept_nan)
        if is_replaced:
            image, properties = reader().read_images(list(files))
        else:
            image, properties = _guarded(reader().read_images, list(files), " and ".join(files))
        for number, channel in enumerate(image):
            name = files[number] if len(files) == len(image) else f"{files[0]}, channel {number}"
            check_values(channel, name, accept_nan)
        return list(image), properties


def selection_of(reader: type) -> Selection | None:
    """Return what our own reader of volumes selects; None for any other."""
    selection = getattr(reader, "selection", None)
    return selection if isinstance(selection, Selection) else None


def is_read_here(reader: type) -> bool:
    """Whether what a reader class does is done here, if nobody has replaced it."""
    return reader in (SimpleITKIO, NibabelIO) or selection_of(reader) is not None


def library_of(reader: type) -> Rules | None:
    """Return by whose rules a reader class reads volumes; None where it is not nnU-Net's, nor made of one of those."""
    if (selection := selection_of(reader)) is not None:
        return selection
    if issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        return Library.NIBABEL
    return Library.ITK if issubclass(reader, SimpleITKIO) else None


def counted_by(reader: type) -> Rules:
    """Return by whose rules voxels are counted before anything is read: SimpleITK's where a reader has its own."""
    return library_of(reader) or Library.ITK


def check_stored(file: str, reader: type, accept_nan: bool) -> None:
    """Check what a reader is about to read by itself: all is there, and every stored value is a number."""
    if lookup.found(Step.READING, reader):  # what a program's own function makes of names is its business
        return
    library = library_of(reader)
    if library is Library.ITK and is_volume(file):
        header = read_header(file)
        is_float = _stored_kind(header) in ("f", "c") and header.components == 1
        if is_float and header.layout is not None and header.layout.loses_nan:  # the library would make numbers of them
            check_values(read_voxels(header), file, accept_nan)
            return
    verify_voxels(file, library)


def _stored_kind(header: Header) -> str:
    """Return numpy's letter for the kind of the stored values; empty where that is not known."""
    return header.layout.dtype.kind if header.layout is not None and header.layout.dtype is not None else ""


def count_channels(file: str, header: Header, reader: type) -> int:
    """Return how many channels a file holds for one of nnU-Net's readers of volumes.

    Raises
    ------
    UsageError
        If its voxels are no single numbers, or it has axes that the reader does not take.
    """
    if header.components != 1:
        raise UsageError(
            f"{file} has {header.components} values per voxel, 1 is needed. Store every channel in a file of its own."
        )
    if reader in (NibabelIO, NibabelIOWithReorient) and len(header.shape) != 3:
        raise UsageError(
            f"{file} has {len(header.shape)} dimensions, 3 are needed by the model's reader, {reader.__name__}."
        )
    if len(header.shape) not in (2, 3, 4):
        raise UsageError(f"{file} has {len(header.shape)} dimensions; nnU-Net takes 2 to 4.")
    return header.shape[0] if len(header.shape) == 4 else 1


def _read_with_simpleitk(
    reader: type, files: Sequence[str], accept_nan: bool, spill: Allocate | None, passes: Passes
) -> tuple[list[Volume], dict[str, Any]]:
    headers, channels = _read_volumes(files, reader, accept_nan, spill, passes)
    check_grid(files, [_array_shape(header) for header in headers], [header.place["spacing"] for header in headers])
    for name in ("origin", "direction"):
        _warn_if_different(files, name, [header.place[name] for header in headers])
    _, spacing = headers[0].grid()
    about = {"volume": dict(headers[0].about)} if headers[0].about else {}
    return channels, {"sitk_stuff": dict(headers[0].place), "spacing": list(np.abs(spacing)), **about}


def _read_with_nibabel(
    reader: type, files: Sequence[str], accept_nan: bool, spill: Allocate | None, passes: Passes
) -> tuple[list[Volume], dict[str, Any]]:
    headers, channels = _read_volumes(files, reader, accept_nan, spill, passes)
    check_grid(files, [_array_shape(header) for header in headers], [header.spacing for header in headers])
    _warn_if_different(files, "affine", [header.place["affine"] for header in headers])
    affine = headers[0].place["affine"].copy()
    return channels, {"nibabel_stuff": {"original_affine": affine}, "spacing": list(headers[0].spacing)}


def _read_volumes(
    files: Sequence[str], reader: type, accept_nan: bool, spill: Allocate | None, passes: Passes
) -> tuple[list[Header], list[Volume]]:
    """Read the channels of files, of which the headers are checked first."""
    headers = [read_header(file, counted_by(reader)) for file in files]
    for file, header in zip(files, headers, strict=True):
        count_channels(file, header, reader)
    channels: list[Volume] = []
    for header, file in zip(headers, files, strict=True):
        if spill is not None and is_readable_by_parts(header):
            assert header.layout is not None, "it is read by parts"
            chunked = header.layout.chunked
            volumes: Sequence[StoredVolume] = (
                _guarded(channels_in, header, file) if chunked is None else channels_of(chunked, passes, spill)
            )
            channels.extend(_checked(volume, file, accept_nan) for volume in volumes)
        else:
            voxels = _read_volume(header, file, accept_nan, spill or np.empty)
            channels.extend(voxels.reshape(-1, *_array_shape(header)[-3:]))
    return headers, channels


def _array_shape(header: Header) -> tuple[int, ...]:
    """Return the shape of what a file holds, a picture's with a first axis of one plane."""
    return (1, *header.shape) if len(header.shape) == 2 else header.shape


def _checked(volume: StoredVolume, file: str, accept_nan: bool) -> StoredVolume:
    is_finite = check_values(volume, file, accept_nan)
    return volume if is_finite else replace(volume, zeroes=True)


def _read_volume(header: Header, file: str, accept_nan: bool, allocate: Allocate) -> NDArray[Any]:
    """Read one file: as it is stored where the library's values follow from that alone, else as the library does."""
    if _stored_kind(header) == "c":
        _logger.warning("%s holds complex numbers; as in nnU-Net, their real parts are taken", file)
    if header.is_read_in_place:
        voxels = read_voxels(header, allocate)
        check_values(voxels, file, accept_nan)
        native = voxels.dtype.newbyteorder("=")
        voxels = voxels if voxels.dtype == native else voxels.byteswap(inplace=True).view(native)
    elif header.read_with is Library.NIBABEL:
        voxels = _scaled(read_voxels(header), header, file, accept_nan)
    else:
        check_stored(file, SimpleITKIO, accept_nan)
        voxels = SimpleITK.GetArrayFromImage(_guarded(SimpleITK.ReadImage, file))
        check_values(voxels, file, accept_nan)
    return np.ascontiguousarray(voxels.real) if voxels.dtype.kind == "c" else voxels


def _scaled(stored: NDArray[Any], header: Header, file: str, accept_nan: bool) -> NDArray[np.float32]:
    """Values by way of float64, as ``get_fdata`` gives them."""
    check_values(stored, file, accept_nan)
    assert header.layout is not None, "what is scaled has a layout"
    slope, intercept = map(np.float64, header.layout.scale)
    voxels = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore"):  # what comes to infinity is told below
        for plane, values in zip(voxels, stored, strict=True):
            plane[...] = apply_read_scaling(values.real, slope, intercept).astype(np.float64)
    check_values(voxels, file, accept_nan)
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
        raise because(UsageError, f"{name or source} cannot be read: {last_line(error)}", error) from error


def check_grid(files: Sequence[str], shapes: Sequence[tuple[int, ...]], spacings: Sequence[Sequence[float]]) -> None:
    """Refuse channels of different shape, or of different spacing by nnU-Net's tolerance."""
    for name, values in (("shape", shapes), ("spacing", spacings)):
        for file, value in zip(files[1:], values[1:], strict=True):
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
