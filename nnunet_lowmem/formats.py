"""The table of image formats: how a file of each is read to its end, so that nothing is missing that will be used.

Libraries fill up what is missing with zeros, or with whatever the memory held before; few look at checksums. So a file
is decoded here once before a library reads it, in bounded memory and by the rules that the library goes by.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem import meta_image, nrrd_files, tiff_pages
from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.stored_parts import Contents, Encoding, Part

_GIPL_HEADER_BYTES = 256
_CHUNK_BYTES = 2**20

Parts = Callable[[Path, Sequence[int], int], list[Part]]


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes
    ----------
    read_whole : callable
        Decodes a file to its end and gives shape and type of what it holds; DamagedFileError where something is missing
        or changed.
    is_volume : bool
        Whether SimpleITK reads its voxels; others are pictures for tifffile and skimage.
    parts : callable or None
        The pieces that ITK will read, by path, sizes and bytes of a voxel.
    spacing : callable or None
        As the file stores it, fastest axis first, where that is looked at before anything is decoded.
    """

    read_whole: Callable[[Path], Contents]
    is_volume: bool = True
    parts: Parts | None = None
    spacing: Callable[[Path], list[float]] | None = None


def format_of(path: Path) -> Format | None:
    """Return the row for a file, by the longest ending that fits its name; None if there is none."""
    name = path.name.lower()
    endings = [ending for ending in FORMATS if name.endswith(ending)]
    return FORMATS[max(endings, key=len)] if endings else None


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
    count_bytes = 0
    try:
        with gzip.open(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                count_bytes += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path.name}: {error} (after {count_bytes} bytes)") from error
    if count_bytes == 0:
        raise DamagedFileError(f"{path.name} holds nothing")
    return count_bytes


@dataclass(frozen=True)
class ItkHeader:
    """What SimpleITK makes of a header: sizes fastest first, values of a voxel, and their type."""

    sizes: tuple[int, ...]
    values: int
    dtype: np.dtype[Any]

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all values of a voxel."""
        return self.values * self.dtype.itemsize


def itk_header(path: Path) -> ItkHeader:
    """Read a header with SimpleITK.

    Raises
    ------
    DamagedFileError
        If it is none.
    """
    import SimpleITK

    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DamagedFileError(f"{path.name}: {str(error).strip().splitlines()[-1]}") from error
    make_image: Any = SimpleITK.Image
    values = reader.GetNumberOfComponents()
    voxel = make_image([1] * reader.GetDimension(), reader.GetPixelIDValue(), values if values > 1 else 0)
    return ItkHeader(reader.GetSize(), values, SimpleITK.GetArrayViewFromImage(voxel).dtype)


def _in_parts(parts: Parts) -> Callable[[Path], Contents]:
    """Return the reader of a format whose pieces are known."""

    def read_whole(path: Path) -> Contents:
        header = itk_header(path)
        try:
            pieces = parts(path, header.sizes, header.voxel_bytes)
        except ValueError as error:  # words where the header should have numbers
            raise DamagedFileError(f"{path.name}: {error}") from error
        for part in pieces:
            part.verify()
        return Contents((*header.sizes[::-1], *([header.values] if header.values > 1 else [])), header.dtype)

    return read_whole


def _gipl_parts(path: Path, sizes: Sequence[int], voxel_bytes: int) -> list[Part]:
    whole_bytes = math.prod(sizes) * voxel_bytes
    if path.name.lower().endswith(".gz"):
        return [Part(path, 0, _GIPL_HEADER_BYTES + whole_bytes, Encoding.GZIP)]
    return [Part(path, _GIPL_HEADER_BYTES, whole_bytes)]


def _read_nifti(path: Path) -> Contents:
    # decoded first: a damaged stream says less when it fails in the header
    held_bytes = verify_gzip(path) if path.name.lower().endswith(".gz") else path.stat().st_size
    image = _nifti_image(path)
    contents = Contents(image.shape, image.get_data_dtype())
    held_bytes -= int(image.dataobj.offset)
    needed_bytes = math.prod(contents.shape) * contents.dtype.itemsize
    if held_bytes < needed_bytes:
        raise DamagedFileError(f"{path.name} ends after {held_bytes:,} of {needed_bytes:,} bytes of voxels")
    return contents


def _read_pair(path: Path) -> Contents:
    """Header and voxels in a file each (.hdr, .img), either of them compressed or not."""
    stem = re.sub(r"(?i)\.(hdr|img)(\.gz)?$", "", str(path))
    held = {ending: Path(stem + ending) for ending in _PAIR if Path(stem + ending).is_file()}
    header = held.get(".hdr") or held.get(".hdr.gz")
    if header is None:
        raise DamagedFileError(f"its header should be in {Path(stem).name}.hdr, which is not there")
    if ".hdr.gz" in held:
        verify_gzip(held[".hdr.gz"])
    image = _nifti_image(header)
    contents = Contents(image.shape, image.get_data_dtype())
    needed_bytes = int(image.dataobj.offset) + math.prod(contents.shape) * contents.dtype.itemsize
    voxels = [held[ending] for ending in (".img", ".img.gz") if ending in held] or [Path(stem + ".img")]
    for file in voxels:  # which of two is read depends on the library
        Part(file, 0, needed_bytes, Encoding.GZIP).verify()
    return contents


def _nifti_image(path: Path) -> Any:
    """Return nibabel's view of the file, of which only the header has been read."""
    # takes a quarter of a second to import, which the command line need not wait for
    import nibabel

    try:
        return nibabel.load(path)
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        nibabel.wrapstruct.WrapStructError,
        ValueError,
    ) as error:
        raise DamagedFileError(f"{path.name}: {error}") from error


def _read_picture(path: Path) -> Contents:
    from skimage import io

    try:
        if path.name.lower().endswith(".png"):
            _verify_chunks(path)
        array = np.asarray(io.imread(path))
    except MemoryError:
        raise
    except Exception as error:  # each of its decoders has its own
        raise DamagedFileError(f"{path.name}: {error}") from error
    return Contents(array.shape, array.dtype)


def _verify_chunks(path: Path) -> None:
    """Check every chunk of a PNG, the last included; a decoder is content once it has all rows."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.verify()


_NIFTI = Format(_read_nifti)
_NRRD = Format(_in_parts(nrrd_files.parts), parts=nrrd_files.parts, spacing=nrrd_files.spacing)
_META = Format(_in_parts(meta_image.parts), parts=meta_image.parts, spacing=meta_image.spacing)
_GIPL = Format(_in_parts(_gipl_parts), parts=_gipl_parts)
_TIFF = Format(tiff_pages.read_whole, is_volume=False)
#: What skimage decodes, with errors of its own where something is missing.
PICTURE = Format(_read_picture, is_volume=False)
_PAIR = {ending: Format(_read_pair) for ending in (".hdr", ".hdr.gz", ".img", ".img.gz")}

#: By ending, in lower case.
FORMATS: dict[str, Format] = {
    ".nii": _NIFTI,
    ".nii.gz": _NIFTI,
    **_PAIR,
    ".nrrd": _NRRD,
    ".nhdr": _NRRD,
    ".mha": _META,
    ".mhd": _META,
    ".gipl": _GIPL,
    ".gipl.gz": _GIPL,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".png": PICTURE,
    ".bmp": PICTURE,
    ".jpg": PICTURE,
    ".jpeg": PICTURE,
}
