"""Whether a file on the disk is whole, found by reading it to its end in bounded memory.

SimpleITK writes a truncated file on a full disk and reads it back, filled up with zeros, without a word; nor does it
look at the checksum of a gzip file. So its output is never judged by its success.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from nnunet_lowmem.errors import LowMemError

_CHUNK_BYTES = 2**20
_HEADER_LIMIT_BYTES = 2**20
_GIPL_HEADER_BYTES = 256


class DamagedFileError(LowMemError):
    """A file ends too early, contradicts its own checksum, or is not what it should be."""


def verify_gzip(path: Path) -> int:
    """Decode a gzip file to its end, which checks the checksum and the length of every member.

    Returns
    -------
    int
        Decoded bytes, at least 1.

    Raises
    ------
    DamagedFileError
        If it is cut, changed, or empty.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        return _gzip_bytes(file, path)


def verify_label_file(path: Path, shape: Sequence[int], dtype: DTypeLike) -> None:
    """Check that a label file holds all of its voxels.

    ``.nii`` and ``.nii.gz``: the header's shape and type, and that all voxels are there, the gzip stream decoded
    to its end. ``.nrrd``, ``.mha``: that the data, decoded with their checksums, are as many bytes; ``.gipl``: that the
    file is as large. Anything else (``.png``, ``.tif``, ...): only that it is not empty, since the libraries that
    write these raise when the disk is full. The values themselves are not compared.

    Parameters
    ----------
    path : Path
        The file.
    shape : sequence of int
        Of the array that was written. The order of axes is not compared, since the writers of nnU-Net reverse or
        permute them, nor are axes of length 1.
    dtype : dtype
        Of the values in the file; its byte order is not compared.

    Raises
    ------
    DamagedFileError
        If the file is not whole, or something else than expected.
    OSError
        If it cannot be read.
    """
    if path.stat().st_size == 0:
        raise DamagedFileError(f"{path.name} is empty")
    name = path.name.lower()
    held_bytes = voxel_bytes(path)
    if name.endswith((".nii", ".nii.gz")):
        _verify_nifti_header(path, shape, np.dtype(dtype))
    expected_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if held_bytes is not None and held_bytes < expected_bytes:
        raise DamagedFileError(f"{path.name} holds {held_bytes} bytes of voxels, not {expected_bytes}")


def voxel_bytes(path: Path) -> int | None:
    """Return how many bytes of voxels the file holds, decoded with its checksums; None for formats not known here.

    Raises
    ------
    DamagedFileError
        If it is cut or changed.
    OSError
        If it cannot be read.
    """
    name = path.name.lower()
    return next((count(path) for ending, count in _VOXEL_BYTES.items() if name.endswith(ending)), None)


def text_header(path: Path) -> dict[str, str]:
    """Return the fields of the header of a ``.nrrd`` or ``.mha`` file, names in lower case.

    Raises
    ------
    DamagedFileError
        If the file ends within its header.
    """
    with path.open("rb") as file:
        if path.name.lower().endswith(".mha"):
            return _header_fields(file, path, b"=", _is_last_of_mha)
        return _header_fields(file, path, b":", _is_last_of_nrrd)


def _is_last_of_mha(line: bytes) -> bool:
    return line.startswith(b"ElementDataFile")


def _is_last_of_nrrd(line: bytes) -> bool:
    return not line.strip()


def verify_whole(path: Path) -> None:
    """Decode an output that nobody remembers, and compare it with what its own header promises.

    Label files as for `verify_label_file`; of ``.npz`` the checksum of every member; pictures are decoded.

    Raises
    ------
    DamagedFileError
        If the file is not whole.
    OSError
        If it cannot be read.
    """
    name = path.name.lower()
    if path.stat().st_size == 0:
        raise DamagedFileError(f"{path.name} is empty")
    if name.endswith(".npz"):
        _verify_archive(path)
    elif is_volume(path):
        if name.endswith(".nii.gz"):
            verify_gzip(path)  # a damaged stream fails in many ways where its header is read
        shape, dtype = _promised(path)
        verify_label_file(path, shape, dtype)
    else:
        _decode_picture(path)


def is_volume(path: Path) -> bool:
    """Tell by its name whether a file is one that SimpleITK reads; others are pictures."""
    return path.name.lower().endswith(tuple(_VOXEL_BYTES))


def _promised(path: Path) -> tuple[Sequence[int], np.dtype[Any]]:
    """Return shape and type of the voxels by the header alone."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        image = _nifti_image(path)
        return image.shape, image.get_data_dtype()
    import SimpleITK

    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DamagedFileError(f"{path.name}: {str(error).strip().splitlines()[-1]}") from error
    make_image: Any = SimpleITK.Image
    voxel = make_image([1] * reader.GetDimension(), reader.GetPixelIDValue())
    return reader.GetSize(), SimpleITK.GetArrayViewFromImage(voxel).dtype


def _verify_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedFileError(f"{path.name}: {error}") from error
    if damaged is not None:
        raise DamagedFileError(f"{path.name}: the checksum of its member {damaged} is wrong")


def _decode_picture(path: Path) -> None:
    from skimage import io

    try:
        io.imread(path)
    except Exception as error:  # each of its decoders has its own
        raise DamagedFileError(f"{path.name}: {error}") from error


def _verify_nifti_header(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    image = _nifti_image(path)
    held_shape, held_dtype = image.shape, image.get_data_dtype()
    if _essential(held_shape) != _essential(shape):
        raise DamagedFileError(f"{path.name} has shape {held_shape}, not {tuple(shape)} in any order")
    if held_dtype.newbyteorder("=") != dtype.newbyteorder("="):
        raise DamagedFileError(f"{path.name} holds values of type {held_dtype}, not {dtype}")


def _nifti_image(path: Path) -> Any:
    """Return nibabel's view of the file, of which only the header has been read."""
    # takes a quarter of a second to import, which the command line need not wait for
    import nibabel

    try:
        return nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, ValueError) as error:
        raise DamagedFileError(f"{path.name}: {error}") from error


def _essential(shape: Sequence[int]) -> list[int]:
    return sorted(int(length) for length in shape if length != 1)


def _nii_bytes(path: Path) -> int:
    return path.stat().st_size - int(_nifti_image(path).dataobj.offset)


def _nii_gz_bytes(path: Path) -> int:
    # decoded first: a damaged stream says less when it fails in the header
    return verify_gzip(path) - int(_nifti_image(path).dataobj.offset)


def _nrrd_bytes(path: Path) -> int | None:
    """Return the bytes of voxels after the header, which ends with an empty line; None if they are elsewhere."""
    with path.open("rb") as file:
        fields = _header_fields(file, path, b":", _is_last_of_nrrd)
        encoding = fields.get("encoding", "")
        if "data file" in fields or "datafile" in fields:
            return None
        if encoding in ("gzip", "gz"):
            return _gzip_bytes(file, path)
        return path.stat().st_size - file.tell() if encoding == "raw" else None


def _mha_bytes(path: Path) -> int | None:
    """Return the bytes of voxels after the header, whose last field is ElementDataFile; None if they are elsewhere."""
    with path.open("rb") as file:
        fields = _header_fields(file, path, b"=", _is_last_of_mha)
        if fields.get("elementdatafile") != "LOCAL":
            return None
        if fields.get("compresseddata") == "True":
            return _zlib_bytes(file, path)
        return path.stat().st_size - file.tell()


def _gipl_bytes(path: Path) -> int:
    return path.stat().st_size - _GIPL_HEADER_BYTES


_VOXEL_BYTES: dict[str, Callable[[Path], int | None]] = {
    ".nii": _nii_bytes,
    ".nii.gz": _nii_gz_bytes,
    ".nrrd": _nrrd_bytes,
    ".mha": _mha_bytes,
    ".gipl": _gipl_bytes,
}


def _header_fields(file: IO[bytes], path: Path, separator: bytes, is_last: Callable[[bytes], bool]) -> dict[str, str]:
    fields: dict[str, str] = {}
    while file.tell() < _HEADER_LIMIT_BYTES:
        line = file.readline(_HEADER_LIMIT_BYTES)
        if not line:
            break
        key, found, value = line.partition(separator)
        if found:
            fields[key.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        if is_last(line):
            return fields
    raise DamagedFileError(f"{path.name} ends within its header")


def _gzip_bytes(file: IO[bytes], path: Path) -> int:
    count_bytes = 0
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                count_bytes += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path.name}: {error} (after {count_bytes} bytes)") from error
    if count_bytes == 0:
        raise DamagedFileError(f"{path.name} holds nothing")
    return count_bytes


def _zlib_bytes(file: IO[bytes], path: Path) -> int:
    count_bytes, stream = 0, zlib.decompressobj()
    while not stream.eof:
        compressed = stream.unconsumed_tail or file.read(_CHUNK_BYTES)
        if not compressed:
            raise DamagedFileError(f"{path.name} ends within its data (after {count_bytes} bytes)")
        try:
            count_bytes += len(stream.decompress(compressed, _CHUNK_BYTES))
        except zlib.error as error:
            raise DamagedFileError(f"{path.name}: {error} (after {count_bytes} bytes)") from error
    return count_bytes
