"""Where NIfTI and Analyze files (.nii, .hdr with .img, each compressed or not) keep their voxels.

SimpleITK and nibabel go by rules of their own. ITK takes a size below 1 for 1 and an offset within the header for its
end, and tells one file from two by its name; nibabel refuses all that, but reads NIfTI-2, which ITK does not. Found by
experiments; ``tests/volumes/test_mutated_files.py`` holds ours against both.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.headers import UNSCALED, Header, Layout, Library
from nnunet_lowmem.volumes.stored_parts import Encoding, Part, encoding_by_name, first_bytes

_HEADER_BYTES = 348
_NIFTI2 = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
_ONE_FILE = re.compile(rb"n\+[1-9]")
# symmetric matrices and displacements, of which ITK makes no image
_INTENTS_OF_NO_IMAGE = (1005, 1006)
_HEADERS, _VOXELS = (".hdr", ".hdr.gz"), (".img", ".img.gz")
_PAIR_ENDING = re.compile(r"(?i)\.(hdr|img)(\.gz)?$")
# beyond these, nibabel and numpy speak of lists of numbers that are too long
_LARGEST_VOXELS = 2**62


class Raw(NamedTuple):
    """The fields of NIfTI-1 as stored, and the type of the voxels in its byte order."""

    fields: Any
    stored: np.dtype[Any]


def raw_header(path: Path) -> Raw:
    """Return the header as it is stored, in the byte order in which its number of dimensions is one.

    Raises
    ------
    DamagedFileError
        If ITK does not read it.
    OSError
        If it cannot be read.
    """
    import nibabel

    block = first_bytes(_header_file(path), _HEADER_BYTES)
    if block[:4] in _NIFTI2 and block[4:7] in (b"n+2", b"ni2"):
        raise DamagedFileError("it is NIfTI-2, which SimpleITK does not read")
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        fields = np.frombuffer(block, nibabel.nifti1.header_dtype.newbyteorder(order))[0]
        if 1 <= int(fields["dim"][0]) <= 7:
            sizes = [int(size) for size in fields["dim"][1 : 1 + int(fields["dim"][0])]]
            if sizes[0] < 1:
                raise DamagedFileError(f"its header says {len(sizes)} dimensions of sizes {sizes}")
            return Raw(fields, _stored_type(int(fields["datatype"])).newbyteorder(order))
    raise DamagedFileError("it is not a NIfTI file")


def layout(path: Path, raw: Raw, header: Header) -> Layout:
    """Return where ITK looks for the voxels; the pieces need not be there."""
    fields, stored = raw
    # of colours the type is that of all values of a voxel
    per_voxel = 1 if stored.fields else header.components
    needed_bytes = header.voxels * per_voxel * stored.itemsize
    part, axes = _part(path, fields, needed_bytes), min(int(fields["dim"][0]), len(header.shape))
    is_lost = _offset(fields) < 0 and not part.is_raw
    is_left_to_itk = stored.fields or is_lost or int(fields["intent_code"]) in _INTENTS_OF_NO_IMAGE
    return Layout(
        (part,),
        None if is_left_to_itk else stored,
        tuple(abs(float(step)) for step in fields["pixdim"][1 : 1 + axes]),
        _itk_scale(float(fields["scl_slope"]), float(fields["scl_inter"])),
        _pair(path, _HEADERS + _VOXELS),
        loses_nan=True,
    )


def nibabel_header(path: Path) -> Header:
    """Return what nibabel makes of a header, and where it looks for the voxels.

    Raises
    ------
    DamagedFileError
        If there are fewer than no voxels, or more than memory has addresses.
    Exception
        Of nibabel's, if it is none.
    """
    # takes a quarter of a second to import, which the command line need not wait for
    import nibabel

    _header_file(path)
    try:
        image: Any = nibabel.load(path)
    except MemoryError as error:
        raise DamagedFileError("the extensions of its header take more memory than there is") from error
    stored, shape, proxy = image.get_data_dtype(), tuple(map(int, image.shape)), image.dataobj
    if not shape or min(shape) < 0 or math.prod(shape) > _LARGEST_VOXELS:
        raise DamagedFileError(f"its header says {len(shape)} dimensions of sizes {list(shape)}")
    spacing = tuple(map(float, image.header.get_zooms()))
    file = Path(image.file_map["image"].filename)
    scale = float(proxy.slope), float(proxy.inter)
    return Header(
        path,
        Library.NIBABEL,
        shape[::-1],
        spacing[::-1],
        len(stored.fields or (0,)),
        _nibabel_type(stored, scale),
        {"affine": image.affine},
        Layout(
            (_nibabel_part(file, int(proxy.offset), math.prod(shape) * stored.itemsize),),
            None if stored.fields else stored,
            _nibabel_spacing(image)[: len(shape)],
            scale,
            _pair(path, _HEADERS + _VOXELS),
        ),
    )


def _nibabel_part(file: Path, offset: int, needed_bytes: int) -> Part:
    encoding = encoding_by_name(file)
    if offset < 0 and encoding is Encoding.RAW:  # Python's gzip takes it for 0
        raise DamagedFileError(f"its header says that its voxels begin at byte {offset}")
    return Part(file, 0, needed_bytes, encoding, skipped_bytes=max(0, offset))


def _nibabel_spacing(image: Any) -> tuple[float, ...]:
    """Return the spacing as it is stored: nibabel makes 1 of 0."""
    header, files = image.header, image.file_map
    block = first_bytes(Path(files.get("header", files["image"]).filename), len(header.binaryblock))
    return tuple(abs(float(step)) for step in type(header)(block, header.endianness, check=False)["pixdim"][1:4])


def _nibabel_type(stored: np.dtype[Any], scale: tuple[float, float]) -> np.dtype[Any]:
    """Return the stored type where float32 follows from them alone; else nnU-Net's reader gets it by way of float64."""
    is_plain = stored.kind == "f" or (stored.kind in "iub" and stored.itemsize <= np.dtype(np.float32).itemsize)
    return stored.newbyteorder("=") if is_plain and scale == UNSCALED else np.dtype(np.float32)


def _itk_scale(slope: float, intercept: float) -> tuple[float, float]:
    """Take a slope of 0, or that is no number, for no scaling, whatever the intercept."""
    is_scaled = math.isfinite(slope) and slope != 0 and (slope, intercept) != UNSCALED
    return (slope, intercept) if is_scaled else UNSCALED


def _pair(path: Path, endings: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the names with these endings that may belong to a pair; nothing for one file."""
    stem, is_pair = _PAIR_ENDING.subn("", str(path))
    return tuple(Path(stem + ending) for ending in endings) if is_pair else ()


def _header_file(path: Path) -> Path:
    """Return the file that holds the header: of a pair, the one beside the voxels."""
    names = _pair(path, _HEADERS)
    held = [name for name in names if name.is_file()]
    if names and not held:
        raise DamagedFileError(f"its header should be in {names[0].name}, which is not there")
    return held[0] if held else path


def _part(path: Path, fields: Any, needed_bytes: int) -> Part:
    names = _pair(path, _VOXELS)
    file = next((name for name in names if name.is_file()), names[0] if names else path)
    part, start = Part(file, 0, needed_bytes, encoding_by_name(file)), _offset(fields)
    if start < 0 and file.is_file() and part.is_raw:  # the last bytes count
        start = max(0 if names else _HEADER_BYTES, file.stat().st_size - needed_bytes)
    return replace(part, skipped_bytes=max(0, start))


def _offset(fields: Any) -> int:
    """Return the offset as C makes a number of it; what that cannot hold is less than 0."""
    offset = float(fields["vox_offset"])
    start = int(offset) if abs(offset) < 2**31 else -1
    return max(start, _HEADER_BYTES) if _ONE_FILE.fullmatch(bytes(fields["magic"])) else start


def _stored_type(code: int) -> np.dtype[Any]:
    import nibabel

    known: Any = nibabel.nifti1.data_type_codes.dtype
    stored: np.dtype[Any] = np.dtype(known.get(code, np.void))
    if not stored.itemsize:
        raise DamagedFileError(f"its header says that its voxels are of datatype {code}, which NIfTI does not know")
    return stored
