"""Whether a file on the disk is whole, found by reading it to its end in bounded memory.

SimpleITK writes a truncated file on a full disk and reads it back, filled up with zeros, without a word; nor does it
look at the checksum of a gzip file. So its output is never judged by its success.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from nnunet_lowmem.errors import DamagedFileError as DamagedFileError
from nnunet_lowmem.volumes.formats import PICTURE, Format, format_of
from nnunet_lowmem.volumes.headers import last_line
from nnunet_lowmem.volumes.stored_parts import Contents


def verify_label_file(path: Path, shape: Sequence[int] | None = None, dtype: DTypeLike | None = None) -> None:
    """Check that a label file holds all of its voxels.

    It is decoded to its end by the row that its ending has in the table of formats, and compared with its own header,
    and that with the array that was written. The values themselves are not compared. Of a format without a row nothing
    is known but that the file is not empty.

    Parameters
    ----------
    path : Path
        The file.
    shape : sequence of int, optional
        Of the array that was written. The order of axes is not compared, since the writers of nnU-Net reverse or
        permute them, nor are axes of length 1.
    dtype : dtype, optional
        Of the values in the file; its byte order is not compared.

    Raises
    ------
    DamagedFileError
        If the file is not whole, or something else than expected.
    OSError
        If it cannot be read.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise DamagedFileError(f"{path.name} is empty")
    row = format_of(path)
    if row is None:
        return
    held = _decoded(row, path)
    if shape is not None and _essential(held.shape) != _essential(shape):
        raise DamagedFileError(f"{path.name} has shape {held.shape}, not {tuple(shape)} in any order")
    if dtype is not None and held.dtype.newbyteorder("=") != np.dtype(dtype).newbyteorder("="):
        raise DamagedFileError(f"{path.name} holds values of type {held.dtype}, not {np.dtype(dtype)}")


def verify_whole(path: Path) -> None:
    """Decode an output that nobody remembers, and compare it with what its own header promises.

    Label files as for `verify_label_file`; of ``.npz`` the checksum of every member. What has no row counts as whole
    if it can be decoded as a picture.

    Raises
    ------
    DamagedFileError
        If the file is not whole.
    OSError
        If it cannot be read.
    """
    if path.name.lower().endswith(".npz"):
        _verify_archive(path)
    else:
        verify_label_file(path)
        if format_of(path) is None:
            _decoded(PICTURE, path)


def _decoded(row: Format, path: Path) -> Contents:
    try:
        return row.contents(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # libraries raise what they like
        if isinstance(error, DamagedFileError) and path.name in str(error):
            raise
        raise DamagedFileError(f"{path.name}: {last_line(error)}") from error


def _verify_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedFileError(f"{path.name}: {error}") from error
    if damaged is not None:
        raise DamagedFileError(f"{path.name}: the checksum of its member {damaged} is wrong")


def _essential(shape: Sequence[int]) -> list[int]:
    return sorted(int(length) for length in shape if length != 1)
