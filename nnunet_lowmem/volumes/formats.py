"""The table of image formats: what is known of a file before it is read, and how it is read to its end.

Libraries fill up what is missing with zeros, or with whatever the memory held before; few look at checksums. So the
voxels are decoded here, in bounded memory and by the rules that the library goes by: either they are taken from that
pass as they are, or the library reads them afterwards. A format is one row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.types import Allocate
from nnunet_lowmem.volumes import (
    gipl_files,
    hdf5_files,
    meta_image,
    nifti_files,
    nrrd_files,
    pictures,
    tiff_pages,
    tiff_volumes,
    zarr_labels,
    zarr_stores,
)
from nnunet_lowmem.volumes.chunked_volume import read_whole, verify_chunks
from nnunet_lowmem.volumes.headers import Header, Layout, Library, itk_header, last_line
from nnunet_lowmem.volumes.label_images import LabelImage
from nnunet_lowmem.volumes.selection import HDF5, TIFF, ZARR, Selection, is_remote, is_store
from nnunet_lowmem.volumes.stored_parts import Contents

# a header is read once per case: when the run begins, when the case is checked and planned, and when it is read
_REMEMBERED_HEADERS, _REMEMBERED_PARTS = 2**12, 16
_logger = logging.getLogger(__name__)
#: By which a header is read: a library's, or ours of what is selected.
Rules = Library | Selection


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes
    ----------
    raw : callable or None
        Gives the header as it is stored; DamagedFileError where ITK does not read it, would end the process or never
        return. None for pictures, which are decoded as a whole.
    layout : callable or None
        Where ITK looks for the voxels, by path, header as stored and what ITK makes of it.
    decode : callable or None
        Decodes a file without a layout to its end; DamagedFileError where something is missing or changed.
    nibabel_header : callable or None
        What nibabel makes of a header, layout included; None where it reads no such file.
    own_header : callable or None
        What is read here by a selection, layout included, whatever nnU-Net's readers make of such files.
    write : callable or None
        Writes a label map that no writer of nnU-Net's writes.
    """

    raw: Callable[[Path], Any] | None = None
    layout: Callable[[Path, Any, Header], Layout] | None = None
    decode: Callable[[Path], Contents] | None = None
    nibabel_header: Callable[[Path], Header] | None = None
    own_header: Callable[[Path, Selection], Header] | None = None
    write: Callable[[NDArray[Any], Path, LabelImage], None] | None = None

    @property
    def is_volume(self) -> bool:
        """Whether SimpleITK reads its voxels; others are pictures for tifffile and skimage."""
        return self.layout is not None

    def header(self, path: Path, library: Rules = Library.ITK) -> Header:
        """Read the header of a file; whatever is wrong with it is raised as it comes."""
        if isinstance(library, Selection):
            if self.own_header is not None:
                return self.own_header(path, library)
            return self._with_spacing(self.header(path), library.spacing)
        if library is Library.NIBABEL and self.nibabel_header is not None:
            return self.nibabel_header(path)
        raw = None if self.raw is None else self.raw(path)
        header = itk_header(path)
        return header if self.layout is None else replace(header, layout=self.layout(path, raw, header))

    @staticmethod
    def _with_spacing(header: Header, spacing: tuple[float, ...] | None) -> Header:
        """Replace what a file says; of an axis more it stays, of a picture's two the last are taken."""
        if spacing is None:
            return header
        steps = (*header.spacing[:-3], *spacing)[-len(header.spacing) :]
        layout = None if header.layout is None else replace(header.layout, spacing=())
        return replace(header, spacing=steps, place={**header.place, "spacing": steps[::-1]}, layout=layout)

    def known_header(self, path: Path) -> Header:
        """Read the header of a file of which nobody says who reads it: by nibabel's rules, which mind no geometry."""
        if self.nibabel_header is not None:
            try:
                return self.nibabel_header(path)
            except Exception as error:
                _logger.debug("%s: nibabel does not read it: %s", path, error)
        return self.header(path)

    def contents(self, path: Path) -> Contents:
        """Decode a file to its end, whoever reads it; whatever is wrong with it is raised as it comes."""
        if self.decode is None and self.own_header is not None:
            return _decoded(self.own_header(path, Selection()))
        return self.decode(path) if self.decode is not None else _decoded(self.known_header(path))


def _decoded(header: Header) -> Contents:
    """Decode all that holds the voxels to its end."""
    assert header.layout is not None, "what is not decoded as a whole has a layout"
    if header.layout.chunked is not None:
        verify_chunks(header.layout.chunked)
    for part in header.layout.parts:
        part.verify()
    values = (header.components,) * (header.components > 1)
    return Contents((*header.shape, *values), header.layout.dtype or header.dtype)


_NIFTI = Format(nifti_files.raw_header, nifti_files.layout, nibabel_header=nifti_files.nibabel_header)
#: What skimage decodes, with errors of its own where something is missing.
PICTURE = Format(decode=pictures.read_whole)
ZARR_STORE = Format(own_header=zarr_stores.header, write=zarr_labels.write)

#: By ending, in lower case.
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz"), _NIFTI),
    **dict.fromkeys((".nrrd", ".nhdr"), Format(nrrd_files.raw_header, nrrd_files.layout)),
    **dict.fromkeys((".mha", ".mhd"), Format(meta_image.raw_header, meta_image.layout)),
    **dict.fromkeys((".gipl", ".gipl.gz"), Format(gipl_files.raw_header, gipl_files.layout)),
    **dict.fromkeys(
        TIFF, Format(decode=tiff_pages.read_whole, own_header=tiff_volumes.header, write=tiff_volumes.write)
    ),
    **dict.fromkeys(HDF5, Format(own_header=hdf5_files.header, write=hdf5_files.write)),
    **dict.fromkeys(ZARR, ZARR_STORE),
    **dict.fromkeys((".png", ".bmp", ".jpg", ".jpeg"), PICTURE),
}
_UNKNOWN = Format()


def format_of(path: Path | str, selection: Selection | None = None) -> Format | None:
    """Return the row for a file, by the ending of its name; None if there is none.

    With a selection a folder has one, too: that of planes, or of a zarr store by whatever name.
    """
    if selection is not None and selection.planes and os.path.isdir(path):
        return FORMATS[TIFF[-1]]
    if selection is not None and is_store(path):
        return ZARR_STORE
    name = os.path.basename(path).lower()
    return next((row for ending, row in FORMATS.items() if name.endswith(ending)), None)


def check_writable(ending: str) -> None:
    """Refuse an ending whose library is missing, before anything is computed.

    Raises
    ------
    UsageError
        With what to install.
    """
    if ending.lower() in ZARR:
        zarr_stores.library()
    if ending.lower() in HDF5:
        hdf5_files.library()


def is_volume(path: Path | str, library: Rules | None = None) -> bool:
    """Tell by its name whether a file is one of which it is known where its voxels are; others may be pictures."""
    selection = library if isinstance(library, Selection) else None
    row = format_of(path, selection)
    return row is not None and (row.is_volume or (selection is not None and row.own_header is not None))


def read_header(path: str, library: Rules = Library.ITK) -> Header:
    """Read the header of a file as a library sees it, or by a selection, once as long as the file stays as it is.

    Raises
    ------
    UsageError
        If it is none, or promises more voxels than its files can hold.
    """
    with _named(path):
        if not is_remote(path) and not os.path.isdir(path) and os.path.getsize(path) == 0:
            raise DamagedFileError("the file is empty")
        known, before = _remembered.get((path, library)), _state(Path(path))
        if known is not None and _states(known[1]) == known[0]:
            return known[1]
        row = format_of(path, library if isinstance(library, Selection) else None) or _UNKNOWN
        if isinstance(library, Selection) and is_remote(path):
            header = zarr_stores.header(path, library)  # as it is: a path would lose one of two slashes
        else:
            header = row.header(Path(path), library)
        header.check_size()
        if not is_remote(path) and _state(Path(path)) == before:
            _remember(path, library, header)
    return header


# by path and library: the files as they were, and what is in the header
_remembered: dict[tuple[str, Rules], tuple[list[Any], Header]] = {}


def _remember(path: str, library: Rules, header: Header) -> None:
    if header.layout is not None and len(header.layout.parts) > _REMEMBERED_PARTS:
        return
    while len(_remembered) >= _REMEMBERED_HEADERS:
        _remembered.pop(next(iter(_remembered)), None)
    _remembered[path, library] = _states(header), header


def _states(header: Header) -> list[Any]:
    """Return what tells a file from the one that was there before, of every file that says where the voxels are."""
    layout = header.layout
    beside = () if layout is None else (*layout.beside, *(part.path for part in layout.parts))
    return [_state(file) for file in dict.fromkeys((header.path, *beside))]


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_voxels(header: Header, allocate: Allocate = np.empty) -> NDArray[Any]:
    """Read the voxels as stored, decoding all that holds them to its end.

    Parameters
    ----------
    header : Header
        With a layout whose type is known.
    allocate : callable
        ``allocate(shape, dtype)`` makes the array, in a file perhaps.

    Returns
    -------
    ndarray
        In the header's shape, its layout's type and byte order.

    Raises
    ------
    UsageError
        If voxels are missing, or a checksum is wrong.
    """
    layout = header.layout
    assert layout is not None, "the layout is known"
    assert layout.dtype is not None, "the type is known"
    voxels = allocate(header.shape, layout.dtype if layout.chunked is None else header.dtype)
    with _named(str(header.path)):
        if layout.chunked is not None:
            read_whole(layout.chunked, voxels.reshape(layout.chunked.shape))
            return voxels
        target, start = voxels.reshape(-1).view(np.uint8).data, 0
        for part in layout.parts:
            part.read_into(target[start : start + part.needed_bytes])
            start += part.needed_bytes
    return voxels


def verify_voxels(path: str, library: Rules | None = Library.ITK) -> None:
    """Decode a file once, and those that it names, to see that all the voxels are there that a library will read.

    Of a format that has no row nothing is known; a warning says so. Without a library, somebody else's reader is to
    judge the header; where that is known here, no voxels may be missing.

    Raises
    ------
    UsageError
        If not.
    """
    row = format_of(path)
    if row is None:
        _tell_unchecked(Path(path).suffix)
        return
    with _named(path):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise DamagedFileError("the file is empty")
        if not row.is_volume and not isinstance(library, Selection):
            row.contents(Path(path))
        elif header := _header_for_reader(row, path) if library is None else read_header(path, library):
            _decoded(header)


def _header_for_reader(row: Format, path: str) -> Header | None:
    """Return what is known here of a header that somebody else's reader is to judge."""
    try:
        return row.known_header(Path(path))
    except MemoryError:
        raise
    except Exception as error:
        _logger.debug("%s: its header is for its reader to judge: %s", path, error)
        return None


@cache
def _tell_unchecked(ending: str) -> None:
    """Once for an ending."""
    _logger.warning("of %s files it is not known here how they end: missing voxels are the reader's to find", ending)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while bytes of strangers are read: libraries raise what they like."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{path} cannot be read: {shown(last_line(error))}") from error
