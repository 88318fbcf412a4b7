"""Headers as files store them, and voxels of which none is missing.

SimpleITK makes 1 of a spacing of 0 or NaN, fills a truncated file up with zeros, and does not look at the checksum of a
gzip file; nibabel stops reading before the checksum. So headers are read raw here, the voxels of NIfTI files are read
here in one pass that ends with the checksum, and those of other formats are decoded once before a library reads them
(`formats`).
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.formats import FORMATS, format_of, itk_header
from nnunet_lowmem.stored_parts import INFLATION

#: Formats whose headers are looked at before anything is decoded.
KNOWN_ENDINGS = (".nii", ".nii.gz", *(ending for ending, row in FORMATS.items() if row.spacing is not None))
_CHUNK_BYTES = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_logger = logging.getLogger(__name__)
_NIFTI = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}


@dataclass(frozen=True)
class Header:
    """One file, before anything of it is decoded.

    Attributes
    ----------
    shape : tuple of int
        Slowest axis first, as arrays have it; axes of length 1 at the end of the file's list are left out.
    spacing : tuple of float
        As stored, so that 0 and NaN are seen; fastest axis last.
    components : int
        Values per voxel.
    voxel_bytes : int
        Decoded bytes of all voxels.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    components: int
    voxel_bytes: int


def is_nifti(path: str) -> bool:
    """Whether the name says so."""
    return path.lower().endswith((".nii", ".nii.gz"))


def read_raw_header(path: str) -> Header:
    """Read the header of a file with one of `KNOWN_ENDINGS`.

    Raises
    ------
    UsageError
        If the file is none, or too small for the voxels that its header promises.
    """
    with _named(path):
        if os.path.getsize(path) == 0:
            raise DamagedFileError("the file is empty")
        header, largest_bytes = _nifti(path) if is_nifti(path) else _itk(path)
        if header.voxel_bytes > largest_bytes:
            raise DamagedFileError(
                f"its header promises {header.voxel_bytes:,} bytes of voxels in shape {header.shape}, and a file of "
                f"{os.path.getsize(path):,} bytes cannot hold them"
            )
    return header


def _nifti(path: str) -> tuple[Header, int]:
    with _decoded(path) as stream:
        nifti = _nifti_header(stream)
        compressed = isinstance(stream, gzip.GzipFile)
    sizes = _nifti_shape(nifti)
    dtype = nifti.get_data_dtype()
    components = len(dtype.fields or (0,))
    needed_bytes = math.prod(sizes) * dtype.itemsize
    if len(sizes) == 5:  # the fifth axis is that of vectors
        components, sizes = sizes[4], _without_ones(sizes[:4])
    spacing = [abs(float(step)) for step in nifti["pixdim"][1 : 1 + min(len(sizes), 3)]]
    size_bytes = os.path.getsize(path)
    largest_bytes = size_bytes * INFLATION if compressed else size_bytes - int(nifti["vox_offset"])
    return (
        Header(sizes[::-1], tuple(spacing[::-1]), components, needed_bytes),
        largest_bytes,
    )


def _itk(path: str) -> tuple[Header, int]:
    row, header = format_of(Path(path)), itk_header(Path(path))
    assert row is not None
    assert row.spacing is not None
    assert row.parts is not None
    spacing = row.spacing(Path(path))
    parts = row.parts(Path(path), header.sizes, header.voxel_bytes)
    needed_bytes = math.prod(header.sizes) * header.voxel_bytes
    shape = header.sizes[::-1]
    return (
        Header(shape, tuple(spacing[:3][::-1]), header.values, needed_bytes),
        sum(part.largest_bytes() for part in parts),
    )


def itk_information(path: str) -> Any:
    """Return SimpleITK's reader of the file, of which only the header has been read."""
    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader


def itk_dtype(information: Any) -> np.dtype[Any]:
    """Type of the array that SimpleITK makes of the file."""
    make_image: Any = SimpleITK.Image
    sizes, components = [1] * information.GetDimension(), information.GetNumberOfComponents()
    image = make_image(sizes, information.GetPixelIDValue(), components if components > 1 else 0)
    dtype: np.dtype[Any] = SimpleITK.GetArrayViewFromImage(image).dtype
    return dtype


def read_nifti(path: str) -> tuple[NDArray[Any], tuple[float, float]]:
    """Read the voxels as stored, unscaled, slowest axis first, decoding the file to its end; and slope and intercept.

    Raises
    ------
    DamagedFileError, OSError, EOFError, zlib.error
        If voxels are missing, or the checksum or length of a gzip file is wrong.
    """
    with _decoded(path) as stream:
        nifti = _nifti_header(stream)
        _skip(stream, int(nifti["vox_offset"]) - stream.tell())
        voxels = np.empty(_nifti_shape(nifti)[::-1], nifti.get_data_dtype())
        target = voxels.reshape(-1).view(np.uint8).data
        filled = 0
        while filled < len(target) and (count := stream.readinto(target[filled : filled + _CHUNK_BYTES])):
            filled += count
        if filled < len(target):
            raise DamagedFileError(f"it ends after {filled:,} of {len(target):,} bytes of voxels")
        if isinstance(stream, gzip.GzipFile):
            _skip(stream, math.inf)
    return voxels, (float(nifti["scl_slope"]), float(nifti["scl_inter"]))


def verify_voxels(path: str) -> None:
    """Decode a file once, and those that it names, to see that all its voxels are there and unchanged.

    Of a format that has no row in the table of formats nothing is known; a warning says so.

    Raises
    ------
    UsageError
        If not.
    """
    row = format_of(Path(path))
    if row is None:
        _tell_unchecked(Path(path).suffix)
        return
    with _named(path):
        if os.path.getsize(path) == 0:
            raise DamagedFileError("the file is empty")
        row.read_whole(Path(path))


@cache
def _tell_unchecked(ending: str) -> None:
    """Once for an ending."""
    _logger.warning("of %s files it is not known here how they end: missing voxels are the reader's to find", ending)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except (DamagedFileError, RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the last line of an error's text, where SimpleITK says what is the matter; its type if there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)


@contextmanager
def _decoded(path: str) -> Iterator[Any]:
    """Open a file that may be compressed, whatever its name says, as SimpleITK does."""
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream


def _nifti_header(stream: Any) -> Any:
    start = stream.read(4)
    kind = next((k for k in _NIFTI for order in ("little", "big") if int.from_bytes(start, order) == k), None)
    if kind is None:
        raise DamagedFileError("it is not a NIfTI file")
    block = start + stream.read(kind - 4)
    if len(block) < kind:
        raise DamagedFileError("it ends within its header")
    make_header: Any = _NIFTI[kind]
    return make_header(block, check=False)


def _nifti_shape(nifti: Any) -> tuple[int, ...]:
    count = int(nifti["dim"][0])
    sizes = [int(size) for size in nifti["dim"][1 : 1 + count]] if 1 <= count <= 7 else []
    if not sizes or min(sizes) < 1:
        raise DamagedFileError(f"its header says {count} dimensions of sizes {sizes}")
    return _without_ones(sizes)


def _without_ones(sizes: Sequence[int]) -> tuple[int, ...]:
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return tuple(sizes)


def _skip(stream: Any, count: float) -> None:
    """Read and forget `count` bytes, or all that are left."""
    while count > 0 and (chunk := stream.read(int(min(count, _CHUNK_BYTES)))):
        count -= len(chunk)
