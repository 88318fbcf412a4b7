"""Image files that are edited as people and programs edit them: bytes that nobody's writer makes, but a disk may hold.

A recipe is plain data, a base and edits of its header, so that a failing one can be read and shrunk.
"""

from __future__ import annotations

import bz2
import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import nibabel
import numpy as np

Files = dict[str, bytes]
Edit = Mapping[str, Any]
NAN, INF = float("nan"), float("inf")
_MOST_BYTES = 2**17


def voxels(count_bytes: int, other: bool = False) -> bytes:
    """Bytes that make positive, finite, different numbers of any type; those of `other` all differ from these."""
    size = max(0, min(count_bytes, _MOST_BYTES))
    return (np.random.default_rng(7).integers(0x3C, 0x44, size, np.uint8) + 8 * other).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Recipe:
    """A format, edits of its header by name, and how the bytes are stored."""

    format: str
    edits: tuple[tuple[str, Edit], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.format}: {', '.join(name for name, _ in self.edits) or 'as it is'} {dict(self.options) or ''}"

    @property
    def merged(self) -> dict[str, Any]:
        """What the builder gets: a later edit wins."""
        merged: dict[str, Any] = dict(self.options)
        for _, values in self.edits:
            merged |= values
        return merged

    def files(self, other: bool = False) -> Files:
        """Return the files by name, the image first."""
        return BUILDERS[self.format](self.merged, other)

    @property
    def spacing(self) -> tuple[float, ...]:
        """As stored, fastest axis first, axes that the image lacks included."""
        return SPACINGS[self.format](self.merged)

    @property
    def is_damaged(self) -> bool:
        """Whether a checksum is wrong, or an end is missing."""
        return bool(self.merged.get("damaged"))

    @property
    def is_cut(self) -> bool:
        """Whether bytes of voxels are missing."""
        return self.merged.get("share", 1) < 1 or self.merged.get("more", 0) < 0


def edit(label: str, /, **values: Any) -> tuple[str, Edit]:
    return label, values


def each(key: str, *values: Any) -> list[tuple[str, Edit]]:
    return [(f"{key}={value}", {key: value}) for value in values]


# -- NIfTI

_NIFTI = {1: (nibabel.nifti1.header_dtype, 348, b"n+1\0"), 2: (nibabel.nifti2.header_dtype, 540, b"n+2\0\r\n\x1a\n")}
_NIFTI_BYTES = {
    1: 1, 2: 1, 4: 2, 8: 4, 16: 4, 32: 8, 64: 8, 128: 3, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8, 1536: 16, 1792: 16,
    2048: 32, 2304: 4,
}  # fmt: skip
AFFINE = {
    "sform_code": 1,
    "srow_x": (-1.5, 0, 0, 7.25),
    "srow_y": (0, -2.0, 0, -3.5),
    "srow_z": (0, 0, 3.0, 11),
}
QUATERNION = {"qform_code": 1, "quatern_d": 1.0, "qoffset_x": 7.25, "qoffset_y": -3.5, "qoffset_z": 11}


def _nifti_header(version: int, order: str, values: Mapping[str, Any]) -> tuple[bytes, Any]:
    dtype, size, magic = _NIFTI[version]
    header = np.zeros((), dtype.newbyteorder(order))
    header["sizeof_hdr"] = size
    header["dim"] = (3, 5, 4, 3, 1, 1, 1, 1)
    header["datatype"], header["bitpix"] = 4, 16
    header["pixdim"] = (1, 1.5, 2, 3, 1, 1, 1, 1)
    header["vox_offset"] = size + 4 + values.get("vox_offset__more", 0)
    header["magic"] = magic[: header["magic"].dtype.itemsize]
    for name, value in (AFFINE | QUATERNION).items():
        header[name] = value
    for name, value in values.items():
        key, _, index = name.partition("__")
        if key not in dtype.names or index == "more":
            continue
        kind = header[key].dtype
        with np.errstate(all="ignore"):
            if kind.kind == "i" and np.ndim(value) == 0:
                value = np.asarray(value if np.isfinite(value) else 0).astype(np.int64).astype(kind)
            if index:
                header[key][int(index)] = value
            else:
                header[key] = value
    if "sizeof_bytes" in values:
        return values["sizeof_bytes"] + header.tobytes()[4:], header
    return header.tobytes(), header


def _extension(content: Any, order: str) -> bytes:
    """Bytes as they are, or one extension of size, code and content."""
    if isinstance(content, bytes):
        return content
    size, code, text = content
    return b"\1\0\0\0" + struct.pack(f"{order}ii{max(0, min(size, 64) - 8)}s", size, code, text)


def _nifti_needed(header: Any) -> int:
    count = int(header["dim"][0])
    sizes = [max(1, int(size)) for size in header["dim"][1 : 1 + (count if 0 < count < 8 else 3)]]
    width = max(_NIFTI_BYTES.get(int(header["datatype"]), 1), int(header["bitpix"]) // 8, 1)
    return math.prod(sizes) * width


def nifti(values: Mapping[str, Any], other: bool) -> Files:
    version, order = values.get("version", 1), values.get("order", "<")
    is_pair, ending = values.get("pair", False), values.get("ending", ".nii")
    name = values.get("name", "case_0000")
    if is_pair:
        values = {"magic": b"ni1" if version == 1 else b"ni2\0\r\n\x1a\n", "vox_offset": 0, **values}
    block, header = _nifti_header(version, order, values)
    data = voxels(int(_nifti_needed(header) * values.get("share", 1)) + values.get("more", 0), other)
    extension = _extension(values.get("extension", b"\0\0\0\0"), order)
    offset = float(header["vox_offset"])
    if is_pair:
        start = int(offset) if 0 < offset < _MOST_BYTES else 0
        head, data = block + extension, b"\x55" * start + data
        pack = values.get("pack", bytes)
        names = [f"{name}.hdr{values.get('packed', '')}", f"{name}.img{values.get('packed', '')}"]
        contents = dict(zip(names, (pack(head), pack(data)), strict=True))
        return contents if not values.get("by_image") else dict(reversed(contents.items()))
    gap = int(offset) - len(block) - len(extension) if 0 < offset < _MOST_BYTES else 0
    whole = block + extension + (b"\x55" if not other else b"\xaa") * max(0, gap) + data
    return {f"{name}{ending}": values.get("pack", bytes)(whole)}


def nifti_spacing(values: Mapping[str, Any]) -> tuple[float, ...]:
    _, header = _nifti_header(values.get("version", 1), values.get("order", "<"), values)
    return tuple(float(step) for step in header["pixdim"][1:8])


def two_members(whole: bytes) -> bytes:
    return gzip.compress(whole[:200], mtime=0) + gzip.compress(whole[200:], mtime=0)


def gzip_with(flags: int, extra: bytes) -> Callable[[bytes], bytes]:
    def pack(whole: bytes) -> bytes:
        head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\x03"
        checksum = struct.pack("<H", zlib.crc32(head + extra) & 0xFFFF) if flags & 2 else b""
        return head + extra + checksum + gzip.compress(whole, mtime=0)[10:]

    return pack


PACKS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda whole: gzip.compress(whole, mtime=0),
    "gzip stored": lambda whole: gzip.compress(whole, 0, mtime=0),
    "gzip and zeros": lambda whole: gzip.compress(whole, mtime=0) + bytes(700),
    "gzip and junk": lambda whole: gzip.compress(whole, mtime=0) + b"junk behind it" * 9,
    "gzip and one byte": lambda whole: gzip.compress(whole, mtime=0) + b"\x1f",
    "gzip and half a magic": lambda whole: gzip.compress(whole, mtime=0) + b"\x1f\x8b",
    "gzip and a cut member": lambda whole: gzip.compress(whole, mtime=0) + gzip.compress(b"more" * 99, mtime=0)[:-5],
    "gzip, zeros, a member": lambda whole: gzip.compress(whole, mtime=0) + bytes(9) + gzip.compress(b"more", mtime=0),
    "two members": two_members,
    "an empty member first": lambda whole: gzip.compress(b"", mtime=0) + gzip.compress(whole, mtime=0),
    "an empty member last": lambda whole: gzip.compress(whole, mtime=0) + gzip.compress(b"", mtime=0),
    "gzip with a name": gzip_with(8, b"name.nii\0"),
    "gzip with a comment": gzip_with(16, b"a comment\0"),
    "gzip with more": gzip_with(4, b"\x06\0AB\x02\0xy"),
    "gzip with a header checksum": gzip_with(2, b""),
    "gzip with all": gzip_with(2 | 4 | 8 | 16, b"\x06\0AB\x02\0xyname\0comment\0"),
}
#: The last two by zlib's rules; Python's, and so nibabel's, are others.
DAMAGING: dict[str, Callable[[bytes], bytes]] = {
    "checksum": lambda whole: gzip.compress(whole, mtime=0)[:-8] + b"abcd" + gzip.compress(whole, mtime=0)[-4:],
    "length": lambda whole: gzip.compress(whole, mtime=0)[:-4] + b"abcd",
    "no checksum": lambda whole: gzip.compress(whole, mtime=0)[:-8],
    "half a checksum": lambda whole: gzip.compress(whole, mtime=0)[:-6],
    "header checksum": lambda whole: b"\x1f\x8b\x08\x02" + bytes(8) + gzip.compress(whole, mtime=0)[10:],
    "two members and zeros between": lambda whole: (
        gzip.compress(whole[:200], mtime=0) + bytes(8) + gzip.compress(whole[200:], mtime=0)
    ),
    "gzip with unknown flags": gzip_with(0xE0, b""),
}


def _dims(*values: int) -> tuple[int, ...]:
    return (*values, *([1] * 8))[:8]


NIFTI_EDITS: list[tuple[str, Edit]] = [
    *each("sizeof_hdr", 0, 348, 540, 1, -1),
    edit("sizeof other order", sizeof_bytes=b"\0\0\x01\x5c"),
    edit("sizeof other order 2", sizeof_bytes=b"\0\0\x02\x1c"),
    *each("dim__0", -1, 0, 1, 2, 4, 5, 6, 7, 8, 100, 1280),
    *(edit(f"dim={dim}", dim=dim) for dim in [
        _dims(1, 5), _dims(2, 5, 4), _dims(2, 5, 4, 0), _dims(2, 5, 4, 3), _dims(3, 5, 4, 1), _dims(3, 1, 1, 1),
        _dims(3, 1, 4, 3), _dims(3, 5, 1, 3), (3, 5, 4, 3, 0, 0, 0, 0), (3, 5, 4, 3, -1, -2, 9, 9), _dims(3, 0, 4, 3),
        _dims(3, 5, 0, 3), _dims(3, 5, 4, 0), _dims(3, -5, 4, 3), _dims(3, 5, 4, -3), _dims(4, 5, 4, 3, 1),
        _dims(4, 5, 4, 3, 2), _dims(4, 5, 4, 1, 2), _dims(4, 5, 1, 1, 2), _dims(4, 5, 4, 3, 0), _dims(4, 5, 4, 3, -1),
        _dims(5, 5, 4, 3, 1, 1), _dims(5, 5, 4, 3, 1, 2), _dims(5, 5, 4, 3, 2, 1), _dims(5, 5, 4, 3, 1, 0),
        _dims(5, 5, 4, 1, 1, 2), _dims(5, 5, 4, 3, 1, 3), _dims(5, 5, 4, 3, 2, 3), _dims(5, 5, 4, 3, 1, 6),
        _dims(6, 5, 4, 3, 1, 1, 1), _dims(6, 5, 4, 3, 1, 1, 2), _dims(7, 5, 4, 3, 1, 1, 1, 1),
        _dims(7, 5, 4, 3, 1, 1, 1, 2), _dims(7, 5, 4, 3, 1, 1, 1, 0), _dims(3, 32767, 1, 1), _dims(4, 5, 4, 3, 32767),
        _dims(0, 5, 4, 3), _dims(2, 5, 1), _dims(2, 1, 4), _dims(1, 1), _dims(5, 5, 4, 0, 0, 3), _dims(5, 5, 4, 0, 1,
        3),
        _dims(4, 5, 4, 0, 2),
    ]),
    *(
        edit(f"datatype={code}", datatype=code, bitpix=8 * width)
        for code, width in {**_NIFTI_BYTES, 0: 0, 255: 1, 3: 2, 9999: 2, -1: 2, 132: 2}.items()
    ),
    *each("bitpix", 0, 8, 1, 32, -16, 15),
    *(edit(f"datatype={code}, bitpix 0", datatype=code, bitpix=0) for code in (2, 16, 64, 512, 1024)),
    *(edit(f"pixdim[{axis}]={step}", **{f"pixdim__{axis}": step})
      for axis in (1, 2, 3) for step in (0, -1.5, NAN, INF, -INF, 1e-30, 1e30)),
    *(edit(f"pixdim[{axis}]={step}", **{f"pixdim__{axis}": step})
      for axis in (4, 5, 6, 7) for step in (0, -1.5, NAN, INF)),
    *(edit(f"pixdim[0]={step}", pixdim__0=step) for step in (0, -1, 2, NAN, INF, -7)),
    *(edit(f"two dimensions, pixdim[3]={step}", dim=_dims(2, 5, 4), pixdim__3=step) for step in (0, NAN, INF, -1)),
    *(edit(f"four dimensions, pixdim[4]={step}", dim=_dims(4, 5, 4, 3, 2), pixdim__4=step)
      for step in (0, NAN, INF, -1)),
    *(edit(f"no forms, pixdim[1]={step}", sform_code=0, qform_code=0, pixdim__1=step) for step in (0, NAN, INF, -1.5)),
    *(edit(f"no sform, pixdim[1]={step}", sform_code=0, pixdim__1=step) for step in (0, NAN, INF, -1.5)),
    *each("vox_offset", 0, 1, 100, 347, 348, 349, 351, 352, 353, 356, 360, 368, 400, 1000, 544, 548, -1, -352, NAN, INF,
          1e9, 352.5, 1e30),
    *each("scl_slope", 0, 1, NAN, INF, -2, 0.37, 0.5),
    *each("scl_inter", 0, NAN, INF, -12.5, 7),
    *(edit(f"slope {slope}, intercept {inter}", scl_slope=slope, scl_inter=inter) for slope, inter in [
        (0, 7), (NAN, 7), (INF, 7), (1, 7), (1, NAN), (2, NAN), (2, INF), (-1, 0), (-0.5, 3), (0.37, -12.5), (0, NAN),
    ]),
    *(edit(f"type {code}, slope {slope}, intercept {inter}", datatype=code, bitpix=8 * _NIFTI_BYTES[code],
           scl_slope=slope, scl_inter=inter)
      for code in (2, 16, 64, 256, 512, 768, 1024, 1280) for slope, inter in [(0.37, -12.5), (1, 7), (3, 0), (1, 0)]),
    *each("qform_code", -1, 0, 2, 3, 4, 5, 99),
    *each("sform_code", -1, 0, 2, 3, 4, 5, 99),
    edit("no forms", sform_code=0, qform_code=0),
    *(edit(f"quaternion {name}, {forms}", **{**values, **codes}) for name, values in {
        "2": {"quatern_b": 2.0}, "nan": {"quatern_b": NAN}, "inf": {"quatern_c": INF}, "zero": {"quatern_d": 0.0},
        "1.0001": {"quatern_d": 1.0001}, "half": {"quatern_b": 0.5, "quatern_c": 0.5, "quatern_d": 0.5},
        "tilt": {"quatern_b": 0.1, "quatern_c": 0.2, "quatern_d": 0.3},
    }.items() for forms, codes in {"qform": {"sform_code": 0}, "both": {}}.items()),
    *(edit(f"offset {value}", qoffset_x=value, sform_code=0) for value in (NAN, INF, 1e30)),
    *(edit(f"srow {name}, {forms}", **{**values, **codes}) for name, values in {
        "zero": {"srow_x": (0, 0, 0, 0), "srow_y": (0, 0, 0, 0), "srow_z": (0, 0, 0, 0)},
        "one zero": {"srow_y": (0, 0, 0, 0)}, "singular": {"srow_y": (-1.5, 0, 0, 0)},
        "shear": {"srow_x": (-1.5, 0.7, 0, 7.25)}, "little shear": {"srow_x": (-1.5, 0.01, 0, 7.25)},
        "tiny shear": {"srow_x": (-1.5, 1e-5, 0, 7.25)},
        "nan": {"srow_x": (NAN, 0, 0, 0)}, "inf": {"srow_z": (0, 0, INF, 0)}, "nan origin": {"srow_x": (-1.5, 0, 0,
        NAN)},
        "other scale": {"srow_x": (-3, 0, 0, 7.25)}, "mirrored": {"srow_x": (1.5, 0, 0, 7.25)},
        "permuted": {"srow_x": (0, 2.0, 0, 1), "srow_y": (1.5, 0, 0, 2)},
        "tiny": {"srow_x": (-1e-20, 0, 0, 7.25), "srow_y": (0, 1e-20, 0, 0), "srow_z": (0, 0, 1e-20, 0)},
    }.items() for forms, codes in {"sform": {"qform_code": 0}, "both": {}}.items()),
    *each("magic", b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0", b"\0\0\0\0", b"abcd", b"n+3\0", b"N+1\0", b"n+1 ", b"n+1x",
          b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n", b"n+2\0\n\n\x1a\n"),
    edit("no magic, offset 0", magic=b"\0\0\0\0", vox_offset=0),
    edit("no magic, offset 348", magic=b"\0\0\0\0", vox_offset=348, extension=b""),
    *(edit(f"extension {label}", extension=content, vox_offset__more=more) for label, content, more in [
        ("of 16", (16, 4, b"afni"), 16), ("of 32", (32, 6, b"comment"), 32), ("of 0", (0, 4, b"afni1234"), 16),
        ("of 8", (8, 4, b""), 8), ("of 7", (7, 4, b"afni1234"), 16), ("of -1", (-1, 4, b"afni1234"), 16),
        ("of 2 GB", (2**31 - 16, 4, b"afni1234"), 16), ("beyond the voxels", (3200, 4, b"afni1234"), 16),
        ("promised only", b"\1\0\0\0", 0), ("flag 2", b"\2\0\0\0", 0), ("flag of ones", b"\xff\xff\xff\xff", 0),
        ("none", b"", -4), ("code unknown", (16, -5, b"afni"), 16), ("json in latin", (32, 44, b'{"a": "\xe4"}'), 32),
        ("dicom in junk", (32, 2, b"\xff" * 24), 32), ("in the other byte order", (2**28, 2**26, b"afni1234"), 16),
        ("without room", (16, 4, b"afni1234"), 0),
    ]),
    *(edit(f"intent {code}, dim {dim}", intent_code=code, dim=_dims(*dim)) for code in (0, 2, 1001, 1002, 1003, 1004,
      1005,
      1006, 1007, 1010, 2003, 2004, -1, 12345) for dim in ((3, 5, 4, 3), (5, 5, 4, 3, 1, 3), (5, 5, 4, 3, 1, 6))),
    edit("intent 1007, dim 5 of 1", intent_code=1007, dim=_dims(5, 5, 4, 3, 1, 1)),
    edit("intent 1007, flat", intent_code=1007, dim=_dims(5, 5, 4, 1, 1, 2)),
    *each("xyzt_units", 0, 1, 2, 3, 4, 7, 8, 10, 9, 11, 18, 26, 48, 63, 255),
    *each("descrip", b"\xff\xfe" * 40, b"\n" * 80),
    *each("intent_name", b"\xff" * 16),
    *each("dim_info", 57, 255),
    *(edit(f"{key}={value}", **{key: value}) for key, value in [
        ("slice_code", 9), ("slice_duration", NAN), ("toffset", NAN), ("cal_max", NAN), ("slice_end", -5),
        ("slice_start", 500), ("intent_p1", NAN), ("regular", b"x"), ("extents", 7),
    ]),
    *each("more", 1, 16, 5000),
    *each("share", 0, 0.5),
    edit("one byte less", more=-1),
]  # fmt: skip


# -- MetaImage

MET_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 8,
    "MET_ULONG": 8, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8, "MET_NONE": 0,
    "MET_ASCII_CHAR": 1, "MET_STRING": 1, "MET_CHAR_ARRAY": 1, "MET_UCHAR_ARRAY": 1, "MET_SHORT_ARRAY": 2,
    "MET_USHORT_ARRAY": 2, "MET_INT_ARRAY": 4, "MET_UINT_ARRAY": 4, "MET_LONG_ARRAY": 8, "MET_ULONG_ARRAY": 8,
    "MET_LONG_LONG_ARRAY": 8, "MET_ULONG_LONG_ARRAY": 8, "MET_FLOAT_ARRAY": 4, "MET_DOUBLE_ARRAY": 8,
    "MET_FLOAT_MATRIX": 4, "MET_OTHER": 1, "met_short": 2, "SHORT": 2, "short": 2, "": 2, "MET_SHORT ": 2, "3": 2,
}  # fmt: skip
META_BASE: dict[str, Any] = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3",
    "ElementSpacing": "1.5 2 3", "DimSize": "5 4 3", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
}  # fmt: skip
_META_OPTIONS = (
    "order", "newline", "separator", "more", "share", "pack", "name", "where", "prefix", "sized", "repeat", "first",
    "gap", "damaged",
)  # fmt: skip


def _first(text: Any, count: int, default: float = 1) -> list[float]:
    """Numbers of a text as far as there are any."""
    numbers: list[float] = []
    for word in str(text).replace(",", " ").split()[:count]:
        try:
            numbers.append(float(word))
        except ValueError:
            break
    return numbers


def meta(values: Mapping[str, Any], other: bool) -> Files:
    fields = {**META_BASE, **{key: value for key, value in values.items() if key not in _META_OPTIONS}}
    fields = {key: value for key, value in fields.items() if value is not None}
    sizes = [int(min(max(size, 1), 1e6)) for size in _first(fields.get("DimSize", ""), 9) if math.isfinite(size)]
    width = MET_BYTES.get(str(fields.get("ElementType", "")), 2)
    try:
        channels = max(1, int(fields.get("ElementNumberOfChannels", 1)))
    except ValueError:
        channels = 1
    needed = math.prod(sizes[:5]) * max(1, width) * min(channels, 99)
    data = voxels(int(needed * values.get("share", 1)) + values.get("more", 0), other)
    if str(fields.get("BinaryData", "True"))[:1] not in ("T", "t", "1"):
        data = " ".join(str(number) for number in np.frombuffer(data[: len(data) // 2 * 2], "<i2")).encode() + b"\n"
    data = values.get("pack", bytes)(data)
    if "sized" in values:
        fields["CompressedDataSize"] = str(len(data) + values["sized"])
    last = {"ElementDataFile": fields.pop("ElementDataFile")} if "ElementDataFile" in fields else {}
    lines = list((fields | last).items())
    lines = values.get("order", lambda items: items)(lines)
    if "first" in values:
        lines.insert(0, values["first"])
    if "repeat" in values:
        lines.insert(-1, values["repeat"])
    separator, newline = values.get("separator", " = "), values.get("newline", "\n")
    head = values.get("prefix", b"") + "".join(f"{key}{separator}{value}{newline}" for key, value in lines).encode()
    name = values.get("name", "case_0000.mha")
    where = values.get("where")
    if where is None:
        return {name: head + values.get("gap", b"") + data}
    return {name: head, where: values.get("gap", b"") + data}


def meta_spacing(values: Mapping[str, Any]) -> tuple[float, ...]:
    fields = {**META_BASE, **values}
    text = fields.get("ElementSpacing") or fields.get("ElementSize")
    return tuple(_first(text, 9)) if text is not None else (1.0,) * 9


def _zlib_sized(name: str, flag: str, **options: Any) -> tuple[str, Edit]:
    return edit(name, CompressedData=flag, pack=zlib.compress, sized=0, **options)


META_EDITS: list[tuple[str, Edit]] = [
    *(_zlib_sized(f"CompressedData={flag}", flag) for flag in ("True", "T", "true", "t", "TRUE", "1")),
    *(edit(f"CompressedData={flag}, raw", CompressedData=flag) for flag in ("yes", "0", "no", "", "2", "Yes", "F",
      "-1")),
    _zlib_sized("CompressedData=yes, packed", "yes"),
    edit("size left out", CompressedData="True", pack=zlib.compress),
    *(edit(f"size {more:+}", CompressedData="True", pack=zlib.compress, sized=more, damaged=True) for more in (-1, 1,
      -50)),
    edit("gzip", CompressedData="True", pack=PACKS["gzip"], sized=0),
    *each("ElementSpacing", "0 2 3", "-1.5 2 3", "nan 2 3", "inf 2 3", "1.5 2", "1.5", "", "1.5 2 3 4", "1,5 2 3",
      "a b c",
          "1.5  2\t3", "1e-30 2 3", "1.5 0 3", "1.5 2 0", "1.5 2 -3", "1e400 2 3", "0x10 2 3", "1.5, 2, 3", None),
    *each("ElementSize", "1.5 2 3", "4 5 6", "0 0 0", "nan 1 1", "4", ""),
    *(edit(f"ElementSize {size} alone", ElementSpacing=None, ElementSize=size)
      for size in ("4 5 6", "0 5 6", "-4 5 6", "nan 5 6", "4 5", "")),
    edit("no spacing at all", ElementSpacing=None),
    *each("BinaryDataByteOrderMSB", "True", "T", "1", "yes", "", None),
    *(edit(f"ElementByteOrderMSB={flag}", BinaryDataByteOrderMSB=None, ElementByteOrderMSB=flag)
      for flag in ("True", "False", "1", "t", "")),
    edit("both byte orders", ElementByteOrderMSB="True"),
    *(edit(f"HeaderSize={size}", HeaderSize=size) for size in ("0", "-1", "-2", "20", "abc", "", "1000000")),
    edit("HeaderSize and a gap", HeaderSize="-1", gap=b"junk" * 5),
    *each("ElementNumberOfChannels", "1", "2", "3", "0", "-1", "", "abc", "4"),
    *each("DimSize", "5 4", "5", "", "5 4 3 2", "5 4 0", "0 4 3", "-5 4 3", "5 4 -3", "5 4 1", "1 1 1", "5.0 4 3",
      "5.9 4 3",
          "a 4 3", "5,4,3", "5\t4\t3", " 5  4  3 ", "100000 100000 100000", "4294967301 4 3", "5 4 3.7", "+5 4 3",
          "05 4 3",
          "5e0 4 3", "0x5 4 3", None),
    *(edit(f"NDims={count}, {sizes}", NDims=count, DimSize=sizes, ElementSpacing=spacing, TransformMatrix=None,
      Offset=None)
      for count, sizes, spacing in [
        ("1", "5", "1.5"), ("2", "5 4", "1.5 2"), ("4", "5 4 3 2", "1.5 2 3 4"), ("4", "5 4 3 1", "1.5 2 3 4"),
        ("5", "5 4 3 2 2", "1 2 3 4 5"), ("5", "5 4 3 1 1", "1 2 3 4 5"), ("4", "5 4 3 2", "1.5 2 3 0"),
        ("4", "5 4 3 2", "1.5 2 3"), ("2", "5 4 3", "1.5 2 3"), ("2", "5 4", "1.5 2 3"),
        ("4", "5 4 1 2", "1.5 2 3 1"), ("11", "5 4 3 1 1 1 1 1 1 1 1", "1 1 1 1 1 1 1 1 1 1 1"), ("10",
        "5 4 3 1 1 1 1 1 1 1", "1 1 1 1 1 1 1 1 1 1"),
    ]),
    *each("NDims", "0", "-3", "abc", "", "3.0", "03", "2", "4", "11", "100", "1000000", None),
    *(edit(f"ElementType={name!r}", ElementType=name) for name in MET_BYTES),
    *(edit(f"{key}={value}", **{"TransformMatrix": None, key: value}) for key in ("TransformMatrix", "Rotation",
      "Orientation")
      for value in ("0 1 0 1 0 0 0 0 1", "1 0 0 0 1 0 0 0 -1", "1 0 0", "0 0 0 0 0 0 0 0 0", "1 1 0 0 1 0 0 0 1",
      "nan 0 0 0 1 0 0 0 1",
                    "2 0 0 0 1 0 0 0 1", "a b c", "")),
    *(edit(f"{key}={value}", **{"Offset": None, key: value}) for key in ("Offset", "Origin", "Position")
      for value in ("1 2 3", "nan 2 3", "inf 2 3", "1 2", "", "a b c", "1e400 2 3")),
    *each("CenterOfRotation", "0 0 0", "5 5 5", "", "nan 0 0"),
    *each("AnatomicalOrientation", "RAI", "LPS", "???", ""),
    *each("ElementMin", "0", "nan", ""), *each("ElementMax", "9", "abc"),
    *each("ElementToIntensityFunctionSlope", "2", "0", "nan", "abc"),
    *each("ElementToIntensityFunctionOffset", "7"),
    *each("Modality", "MET_MOD_CT", "junk"), *each("Comment", "a = b", "x" * 5000, "ä", "ElementDataFile = v.raw"),
    *each("Name", "x" * 600), *each("ID", "abc"), *each("Color", "1 1 1 1", "1"), *each("TransformType", "Rigid"),
    *each("ObjectType", "image", "Tube", "", None), *each("ObjectSubType", "x"),
    *each("SequenceID", "1 2 3 4", ""), *each("ElementAlignment", "1"), *each("UnknownField", "7", ""),
    *each("BinaryData", "False", "T", "yes", "", None),
    *each("newline", "\r\n", " \n", "\n\n", "\r", "\t\n"),
    *each("separator", "=", ":", ": ", " : ", "  =  ", " ", "\t=\t", " == ", " =: "),
    edit("fields backwards", order=lambda lines: [*lines[-2::-1], lines[-1]]),
    edit("sizes before NDims", order=lambda lines: [lines[8], *lines[:8], *lines[9:]]),
    edit("data file first", order=lambda lines: [lines[-1], *lines[:-1]]),
    edit("no ObjectType, spacing first", order=lambda lines: [lines[7], *lines[1:7], *lines[8:]]),
    edit("nothing behind data file", order=lambda lines: lines[:-1]),
    *(edit(f"repeated {key}={value}", repeat=(key, value)) for key, value in [
        ("DimSize", "5 4 3"), ("DimSize", "5 4 2"), ("DimSize", "5 4 6"), ("ElementType", "MET_UCHAR"),
        ("ElementType", "MET_FLOAT"),
        ("ElementSpacing", "9 9 9"), ("ElementSpacing", "0 0 0"), ("CompressedData", "True"), ("NDims", "2"),
        ("HeaderSize", "-1"),
    ]),
    *(edit(f"prefix {prefix}", prefix=prefix) for prefix in (b"\n", b"\r\n", b"# comment\n", b"# a = b\n",
      b"\xef\xbb\xbf", b" ", b"junk\n",
                                                            b"Comment = first\n", b"%\n", b"; x\n")),
    *each("dimsize", "9 9 9"), *each(" DimSize", "5 4 3"), *each("ELEMENTSPACING", "9 9 9"),
    *(edit(f"ElementDataFile={name}", ElementDataFile=name) for name in
      ("Local", "local", "LOCAL ", " LOCAL", "LOCAL\t", "lOCAL", "LOCAL # x", "", "nowhere.raw", "LOCAL.raw")),
    *(edit(f"detached {where}", where=where, ElementDataFile=text, name=name) for where, text, name in [
        ("v.raw", "v.raw", "case_0000.mhd"), ("v.raw", "v.raw", "case_0000.mha"), ("v.raw", "./v.raw", "case_0000.mhd"),
        ("sub/v.raw", "sub/v.raw", "case_0000.mhd"), ("sub/v.raw", "sub\\v.raw", "case_0000.mhd"), ("v w.raw",
        "v w.raw", "case_0000.mhd"),
        ("v.raw", "v.raw  ", "case_0000.mhd"), ("v.raw", "/nowhere/v.raw", "case_0000.mhd"), ("v.raw", "sub/../v.raw",
        "case_0000.mhd"),
        ("ä.raw", "ä.raw", "case_0000.mhd"), ("v%.raw", "v%.raw", "case_0000.mhd"), ("v.raw", '"v.raw"',
        "case_0000.mhd"),
        ("LIST.raw", "LIST.raw", "case_0000.mhd"), ("LOCAL", "LOCAL", "case_0000.mhd"), ("v.raw", "v.raw 0 2 1",
        "case_0000.mhd"),
        ("case_0000.raw", "", "case_0000.mhd"), ("v=1.raw", "v=1.raw", "case_0000.mhd"), ("v:1.raw", "v:1.raw",
        "case_0000.mhd"),
    ]),
    edit("detached with a gap", where="v.raw", ElementDataFile="v.raw", name="case_0000.mhd", HeaderSize="8",
      gap=b"junkjunk"),
    edit("detached, last bytes", where="v.raw", ElementDataFile="v.raw", name="case_0000.mhd", HeaderSize="-1",
      gap=b"junkjunk"),
    edit("detached, packed", where="v.zraw", ElementDataFile="v.zraw", name="case_0000.mhd", CompressedData="True",
         pack=zlib.compress),
    *each("more", 1, -1, 16), *each("share", 0, 0.5),
]  # fmt: skip


# -- NRRD

NRRD_TYPES = {
    1: ["signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t", "char", "unsignedchar"],
    2: ["short", "short int", "signed short", "signed short int", "int16", "int16_t", "ushort", "unsigned short",
        "unsigned short int", "uint16", "uint16_t", "SHORT", "Short"],
    4: ["int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"],
    8: ["longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
        "ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"],
    0: ["block", "long", "half", "float16", "float32", "bool", "", "junk"],
}  # fmt: skip
NRRD_WIDTHS = {name: max(1, width) for width, names in NRRD_TYPES.items() for name in names}
NRRD_BASE: dict[str, Any] = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "5 4 3",
    "space directions": "(1.5,0,0) (0,2,0) (0,0,3)", "kinds": "domain domain domain", "endian": "little",
    "encoding": "raw", "space origin": "(1,2,3)",
}  # fmt: skip
_NRRD_OPTIONS = (
    "magic",
    "order",
    "newline",
    "separator",
    "more",
    "share",
    "pack",
    "name",
    "where",
    "gap",
    "lines",
    "blank",
    "damaged",
)
_PLAIN = {"space": None, "space directions": None, "space origin": None, "kinds": None}


def nrrd(values: Mapping[str, Any], other: bool) -> Files:
    fields = {**NRRD_BASE, **{key: value for key, value in values.items() if key not in _NRRD_OPTIONS}}
    fields = {key: value for key, value in fields.items() if value is not None}
    sizes = [int(min(max(size, 1), 1e6)) for size in _first(fields.get("sizes", ""), 9) if math.isfinite(size)]
    width = NRRD_WIDTHS.get(str(fields.get("type", "")), 2)
    needed = math.prod(sizes) * width
    data = voxels(int(needed * values.get("share", 1)) + values.get("more", 0), other)
    encoding = str(fields.get("encoding", "")).lower()
    if encoding in ("ascii", "text", "txt"):
        kind = {1: "u1", 2: "<i2", 4: "<i4", 8: "<i8"}[width]
        data = " ".join(map(str, np.frombuffer(data[: len(data) // width * width], kind))).encode() + b"\n"
    elif encoding == "hex":
        data = data.hex().encode() + b"\n"
    elif encoding in ("gzip", "gz"):
        data = values.get("pack", PACKS["gzip"])(values.get("gap", b"") + data)
    elif encoding in ("bzip2", "bz2"):
        data = bz2.compress(data)
    if encoding not in ("gzip", "gz"):
        data = values.get("gap", b"") + data
    lines = [f"{key}{values.get('separator', ': ')}{value}" for key, value in fields.items()]
    lines = values.get("order", lambda items: items)(lines) + list(values.get("lines", ()))
    newline = values.get("newline", "\n")
    head = "".join(line + newline for line in [values.get("magic", "NRRD0004"), *lines]).encode()
    blank = values.get("blank", newline).encode()
    name, where = values.get("name", "case_0000.nrrd"), values.get("where")
    if where is None:
        return {name: head + blank + data}
    return {name: head, where: data}


def nrrd_spacing(values: Mapping[str, Any]) -> tuple[float, ...]:
    fields = {**NRRD_BASE, **values}
    if text := fields.get("space directions"):
        vectors = [part.partition(")")[0] for part in text.split("(")[1:]]
        try:
            return tuple(math.hypot(*(float(word) for word in vector.split(","))) for vector in vectors)
        except ValueError:
            return (NAN,)
    if text := fields.get("spacings"):
        return tuple(_first(text, 9))
    return (1.0,) * 9


NRRD_EDITS: list[tuple[str, Edit]] = [
    *(edit(f"magic {magic}", magic=magic) for magic in ("NRRD0001", "NRRD0002", "NRRD0003", "NRRD0005", "NRRD0006",
      "NRRD00.01", "nrrd0004", "NRRD")),
    *(edit(f"magic {magic}, plain", magic=magic, spacings="1.5 2 3", **_PLAIN) for magic in ("NRRD0001", "NRRD0002",
      "NRRD0003", "NRRD0005", "NRRD00.01")),
    *(edit(f"type {name!r}", type=name) for name in NRRD_WIDTHS),
    *(edit(f"spacings {text}", spacings=text, **_PLAIN) for text in
      ("1.5 2 3", "0 2 3", "-1.5 2 3", "nan 2 3", "inf 2 3", "1.5 2", "1.5 2 3 4", "", "a b c", "NaN NaN NaN",
      "1,5 2 3", "1.5 2 NaN")),
    edit("no spacing at all", **_PLAIN),
    edit("spacings with directions", spacings="1.5 2 3"),
    edit("axis mins", spacings="1.5 2 3", **{**_PLAIN, "axis mins": "1 2 3"}),
    edit("axismins", spacings="1.5 2 3", **{**_PLAIN, "axismins": "1 2 3"}),
    edit("axis maxs", **{**_PLAIN, "axis mins": "0 0 0", "axis maxs": "10 10 10"}),
    *each("space directions", "(0,2,0) (1.5,0,0) (0,0,3)", "(-1.5,0,0) (0,-2,0) (0,0,3)", "(0,0,0) (0,2,0) (0,0,3)",
      "(nan,0,0) (0,2,0) (0,0,3)",
          "(inf,0,0) (0,2,0) (0,0,3)", "none (0,2,0) (0,0,3)", "(1.5,0,0) (0,2,0) none", "none none none",
          "(1.5,0,0) (0,2,0)", "(1.5,0) (0,2) (0,3)",
          "(1.5, 0, 0) (0, 2, 0) (0, 0, 3)", "( 1.5 , 0,0 ) (0,2,0)(0,0,3)", "(1.5,0,0)(0,2,0)(0,0,3)", "1.5 2 3", "",
          "(1.5,0,0) (0,2,0) (0,0,3) (1,1,1)",
          "(1,1,0) (0,2,0) (0,0,3)", "(a,0,0) (0,2,0) (0,0,3)", "(1e-30,0,0) (0,2,0) (0,0,3)",
          "(1.5,0,0) (1.5,0,0) (0,0,3)", None,
          "(1.5,0,0)   (0,2,0)\t(0,0,3)", "(nan,nan,nan) (0,2,0) (0,0,3)"),
    *(edit(f"four axes, {name}", dimension="4", sizes=sizes, **{"space directions": directions, "kinds": kinds})
      for name, sizes, directions, kinds in [
        ("none first", "2 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "vector domain domain domain"),
        ("none first, list", "2 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "list domain domain domain"),
        ("none first, of one", "1 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "vector domain domain domain"),
        ("none first, list of one", "1 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "list domain domain domain"),
        ("none first, colour", "3 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "RGB-color domain domain domain"),
        ("none first, no kinds", "2 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", None),
        ("none last", "5 4 3 2", "(1.5,0,0) (0,2,0) (0,0,3) none", "domain domain domain list"),
        ("none last, vector", "5 4 3 2", "(1.5,0,0) (0,2,0) (0,0,3) none", "domain domain domain vector"),
        ("none last, of one", "5 4 3 1", "(1.5,0,0) (0,2,0) (0,0,3) none", "domain domain domain list"),
        ("none between", "5 2 4 3", "(1.5,0,0) none (0,2,0) (0,0,3)", "domain list domain domain"),
        ("nan for none", "2 5 4 3", "(nan,nan,nan) (1.5,0,0) (0,2,0) (0,0,3)", "vector domain domain domain"),
        ("three colours of 3d matrix", "6 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)",
        "3D-symmetric-matrix domain domain domain"),
        ("masked matrix", "7 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)",
        "3D-masked-symmetric-matrix domain domain domain"),
        ("complex", "2 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "complex domain domain domain"),
        ("stub", "1 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "stub domain domain domain"),
        ("scalar", "1 5 4 3", "none (1.5,0,0) (0,2,0) (0,0,3)", "scalar domain domain domain"),
    ]),
    *(edit(f"plain four axes {kinds} {spacings}", dimension="4", sizes="5 4 3 2", spacings=spacings, **{**_PLAIN,
      "kinds": kinds})
      for kinds in (None, "domain domain domain domain", "space space space time", "domain domain domain list")
      for spacings in ("1.5 2 3 4", "1.5 2 3 nan", "1.5 2 3 0")),
    *(edit(f"dimension {count}, sizes {sizes}", dimension=count, sizes=sizes, **_PLAIN) for count, sizes in [
        ("1", "5"), ("2", "5 4"), ("2", "5 4 3"), ("4", "5 4 3"), ("5", "5 4 3 2 2"), ("5", "5 4 3 1 1"), ("17",
        "1 " * 17), ("0", ""), ("-3", "5 4 3"),
        ("a", "5 4 3"), ("3", "5 4"), ("3", "0 4 3"), ("3", "-5 4 3"), ("3", "5.0 4 3"), ("3", "a 4 3"), ("3",
        "5 4 1"), ("3", "1 1 1"), ("3", "5,4,3"),
        ("3", "1099511627776 4 3"), ("3", "1099511627776 1099511627776 1099511627776"), ("03", "5 4 3"), ("3",
        "05 4 3"), ("3", "+5 4 3"), ("3", "5 4 3 "),
    ]),
    *(edit(f"two axes, {directions}", dimension="2", sizes="5 4", space=space, kinds=None,
      **{"space directions": directions, "space origin": origin})
      for directions, space, origin in [("(1.5,0) (0,2)", "2", "(1,2)"), ("(1.5,0,0) (0,2,0)",
      "left-posterior-superior", "(1,2,3)")]),
    *each("kinds", "space space space", "domain domain", "vector domain domain", "list domain domain",
      "domain domain list", "domain domain vector", "??? ??? ???",
          "none none none", "time domain domain", "RGB-color domain domain", "3-color domain domain", "",
          "junk domain domain", "scalar domain domain",
          "domain domain domain domain", "Domain Domain Domain", None),
    *each("thicknesses", "1 2 3", "nan nan nan", "0 0 0", "-1 2 3", "1 2", ""),
    *each("space", "RAS", "LAS", "LPS", "right-anterior-superior", "left-anterior-superior", "scanner-xyz",
      "3D-right-handed", "3D-left-handed",
          "left-posterior-superior-time", "junk", "", None),
    edit("space dimension", space=None, **{"space dimension": "3"}),
    edit("space dimension 2", space=None, **{"space dimension": "2"}),
    edit("space dimension and space", **{"space dimension": "3"}),
    *each("space origin", "(0,0,0)", "(nan,0,0)", "(inf,0,0)", "(1,2)", "none", "", "(1, 2, 3)", "1 2 3", "(a,b,c)",
      None),
    *each("measurement frame", "(1,0,0) (0,1,0) (0,0,1)", "(0,0,0) (0,0,0) (0,0,0)", "junk"),
    *each("space units", '"mm" "mm" "mm"', '"" "" ""', "mm mm mm", '"m" "m" "m"'),
    *(edit(f"units {text}", units=text, spacings="1.5 2 3", **_PLAIN) for text in ('"mm" "mm" "mm"', '"mm"')),
    *each("centerings", "cell cell cell", "node node node", "junk junk junk"), *each("centers", "cell cell cell"),
    *each("labels", '"x" "y" "z"', '"x"', "x y z"), *each("content", "something", "a: b", ""), *each("number", "60",
      "9"),
    *each("min", "0", "nan"), *each("max", "9"), *each("old min", "0"), *each("sample units", "HU"),
      *each("block size", "2"), *each("blocksize", "2"),
    *each("endian", "big", "LITTLE", "Little", "junk", "", None),
    edit("no endian, bytes", endian=None, type="uchar"),
    *each("encoding", "gzip", "gz", "GZIP", "Gzip", "RAW", "ascii", "text", "txt", "hex", "bzip2", "bz2", "zlib",
      "junk", "", None),
    # behind half a magic number, ITK's reader of NRRD looks for another member
    *(edit(name, encoding="gzip", pack=pack) for name, pack in PACKS.items() if name != "gzip and half a magic"),
    edit("zlib for gzip", encoding="gzip", pack=zlib.compress),
    edit("not packed", encoding="gzip", pack=bytes),
    *(edit(f"ascii {kind}", encoding="ascii", type=kind) for kind in ("uchar", "ushort", "int", "float", "double",
      "int8")),
    *(edit(f"hex {kind}", encoding="hex", type=kind) for kind in ("uchar", "ushort", "int", "double")),
    edit("hex, big", encoding="hex", endian="big"),
    *(edit(f"newline {text!r}", newline=text) for text in ("\r\n", "\r", " \n", "\n\n")),
    edit("CRLF and LF", newline="\r\n", blank="\n"), edit("LF and CRLF", blank="\r\n"),
      edit("space on the blank line", blank=" \n"), edit("no blank line", blank=""),
    edit("two blank lines", blank="\n\n"),
    *each("separator", ":", " : ", ":  ", ":\t", "=", " ", ":="),
    edit("backwards", order=lambda lines: lines[::-1]),
    edit("sizes first", order=lambda lines: sorted(lines, key=lambda line: not line.startswith("sizes"))),
    edit("dimension first", order=lambda lines: sorted(lines, key=lambda line: not line.startswith("dimension"))),
    edit("dimension last", order=lambda lines: sorted(lines, key=lambda line: line.startswith("dimension"))),
    edit("space last", order=lambda lines: sorted(lines, key=lambda line: line.startswith("space: "))),
    edit("endian last", order=lambda lines: sorted(lines, key=lambda line: line.startswith("endian"))),
    *(edit(f"lines {lines}", lines=lines) for lines in [
        ("# comment",), ("#comment: x",), ("key:=value",), ("spacings:=0 0 0",), ("encoding:=gzip",), ("key:=",),
        (":=value",), ("sizes: 5 4 3",), ("type: uchar",),
        ("junk",), ("junk: junk",), ("data file:=x",), ("a b:=c d",), ("key:=a:=b",), ("# data file: v.raw",),
        ("ä:=ö",), ("a" * 3000 + ":=b",), ("DICOM_0010:=x\\ny",),
        ("data file:",),
    ]),
    *each("TYPE", "uchar"), *each("Sizes", "5 4 3"),
    edit("upper fields", order=lambda lines: [line.partition(":")[0].upper() + ":" + line.partition(":")[2]
      for line in lines]),
    edit("space before fields", order=lambda lines: [" " + line for line in lines]),
    edit("space behind values", order=lambda lines: [line + "  " for line in lines]),
    *(edit(f"byte skip {text}", gap=gap, **{"byte skip": text}) for text, gap in [("4", b"abcd"), ("-1", b""), ("-1",
      b"abcd"), ("0", b""), ("-2", b""), ("1.5", b"a"), ("4 5", b"abcd"), ("", b""), ("9999", b"")]),
    *(edit(f"line skip {text}", gap=gap, **{"line skip": text}) for text, gap in [("1", b"abcd\n"), ("0", b""), ("-1",
      b""), ("2", b"a\nb\n"), ("9999", b""), ("", b"")]),
    edit("both skips", gap=b"abc\nxyz", **{"byte skip": "3", "line skip": "1"}), edit("byteskip", byteskip="4",
      gap=b"abcd"), edit("lineskip", lineskip="1", gap=b"abcd\n"),
    *(edit(f"gzip, byte skip {text}", encoding="gzip", gap=gap, **{"byte skip": text}) for text, gap in [("4",
      b"abcd"), ("-1", b""), ("-1", b"abcd"), ("-2", b"")]),
    *(edit(f"gzip, line skip {text}", encoding="gzip", gap=gap, **{"line skip": text}) for text, gap in [("1",
      b"abcd\n")]),
    edit("gzip, line skip outside", encoding="gzip", pack=lambda data: b"line\n" + PACKS["gzip"](data),
      **{"line skip": "1"}),
    *(edit(f"{encoding}, byte skip 4", encoding=encoding, gap=b"abcd", **{"byte skip": "4"}) for encoding in ("ascii",
      "hex", "bzip2")),
    *(edit(f"{encoding}, line skip 1", encoding=encoding, gap=b"line\n", **{"line skip": "1"})
      for encoding in ("ascii", "hex")),
    *(edit(f"detached {text!r} as {name}", where=where, name=name, **{key: text}) for where, text, name, key in [
        ("v.raw", "v.raw", "case_0000.nhdr", "data file"), ("v.raw", "v.raw", "case_0000.nrrd", "data file"),
        ("v.raw", "./v.raw", "case_0000.nhdr", "data file"),
        ("sub/v.raw", "sub/v.raw", "case_0000.nhdr", "datafile"), ("v w.raw", "v w.raw", "case_0000.nhdr",
        "data file"), ("v.raw", "v.raw  ", "case_0000.nhdr", "data file"),
        ("v.raw", "/nowhere/v.raw", "case_0000.nhdr", "data file"), ("v%.raw", "v%.raw", "case_0000.nhdr",
        "data file"), ("ä.raw", "ä.raw", "case_0000.nhdr", "data file"),
        ("v.raw", "", "case_0000.nhdr", "data file"), ("v.raw", "LIST\nv.raw", "case_0000.nhdr", "data file"),
        ("v.raw", "LIST 3\nv.raw", "case_0000.nhdr", "data file"),
        ("v.raw", "LIST", "case_0000.nhdr", "data file"), ("v.raw", "v%d.raw 0 0 1", "case_0000.nhdr", "data file"),
        ("v1.raw", "v%d.raw 1 1 1", "case_0000.nhdr", "data file"),
        ("v1.raw", "v%d.raw 1 1 1 3", "case_0000.nhdr", "data file"), ("v1.raw", "v%d.raw 1 1 0", "case_0000.nhdr",
        "data file"), ("v1.raw", "v%d.raw", "case_0000.nhdr", "data file"),
        ("v1.raw", "v%d.raw a b c", "case_0000.nhdr", "data file"), ("v1.raw", "v%s.raw 1 1 1", "case_0000.nhdr",
        "data file"), ("v.raw", "list", "case_0000.nhdr", "data file"),
    ]),
    edit("data file first", order=lambda lines: [lines[-1], *lines[:-1]], where="v.raw", name="case_0000.nhdr",
      **{"data file": "v.raw"}),
    edit("detached gzip", where="v.gz", name="case_0000.nhdr", encoding="gzip", **{"data file": "v.gz"}),
    edit("detached, byte skip", where="v.raw", name="case_0000.nhdr", gap=b"abcd", **{"data file": "v.raw",
      "byte skip": "4"}),
    edit("detached, byte skip -1", where="v.raw", name="case_0000.nhdr", gap=b"abcd", **{"data file": "v.raw",
      "byte skip": "-1"}),
    edit("detached, CRLF", where="v.raw", name="case_0000.nhdr", newline="\r\n", **{"data file": "v.raw"}),
    *each("more", 1, -1, 16), *each("share", 0, 0.5),
    *(edit(f"{encoding}, cut", encoding=encoding, share=0.5) for encoding in ("gzip", "ascii", "hex", "bzip2")),
]  # fmt: skip


# -- GIPL

GIPL_BYTES = {1: 1, 7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8, 144: 2, 160: 8, 192: 8, 193: 16, 0: 2, 9: 1,
  200: 2}  # fmt: skip
_GIPL_FIELDS = {
    "dim": (0, ">4H"), "type": (8, ">H"), "pixdim": (10, ">4f"), "line": (26, ">80s"), "matrix": (106, ">20f"),
    "flag1": (186, ">B"), "flag2": (187, ">B"), "min": (188, ">d"), "max": (196, ">d"), "origin": (204, ">4d"),
    "pixval_offset": (236, ">f"), "pixval_cal": (240, ">f"), "gap": (244, ">f"), "user": (248, ">f"), "magic": (252,
      ">I"),
}  # fmt: skip
GIPL_BASE: dict[str, Any] = {
    "dim": (5, 4, 3, 1), "type": 15, "pixdim": (1.5, 2, 3, 1), "origin": (1, 2, 3, 0), "magic": 719555000,
}  # fmt: skip


def gipl(values: Mapping[str, Any], other: bool) -> Files:
    fields = {**GIPL_BASE, **{key: value for key, value in values.items() if key in _GIPL_FIELDS}}
    head = bytearray(256)
    for key, value in fields.items():
        start, form = _GIPL_FIELDS[key]
        struct.pack_into(form, head, start, *(value if isinstance(value, tuple) else (value,)))
    sizes = [max(1, size) for size in fields["dim"]]
    needed = math.prod(sizes) * GIPL_BYTES.get(fields["type"], 2)
    data = voxels(int(needed * values.get("share", 1)) + values.get("more", 0), other)
    whole = bytes(head) + data
    return {values.get("name", "case_0000.gipl"): values.get("pack", bytes)(whole)}


def gipl_spacing(values: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple({**GIPL_BASE, **values}["pixdim"])


GIPL_EDITS: list[tuple[str, Edit]] = [
    *each("magic", 719555000, 4026526128, 0, 1),
    *(edit(f"dim {dim}", dim=dim) for dim in [
        (5, 4, 3, 0), (5, 4, 3, 2), (5, 4, 1, 1), (5, 4, 0, 0), (5, 4, 0, 1), (5, 0, 0, 0), (0, 4, 3, 1), (5, 1, 1,
        1), (1, 1, 1, 1), (5, 4, 1, 2),
        (65535, 65535, 65535, 1), (5, 4, 1, 0), (1, 4, 3, 1), (0, 0, 0, 0), (5, 4, 2, 0),
    ]),
    *(edit(f"type {code}", type=code) for code in GIPL_BYTES),
    *(edit(f"pixdim {step}", pixdim=step) for step in [
        (0, 2, 3, 1), (-1.5, 2, 3, 1), (NAN, 2, 3, 1), (INF, 2, 3, 1), (1.5, 2, 0, 1), (1.5, 2, 3, 0), (1.5, 2, 3,
        NAN), (1.5, 0, 3, 1), (1.5, 2, -3, 1),
        (1e-30, 2, 3, 1), (1.5, 2, 3, -1),
    ]),
    *(edit(f"flat, pixdim {step}", dim=(5, 4, 1, 0), pixdim=step) for step in [(1.5, 2, 0, 0), (1.5, 2, NAN, 0), (1.5,
      2, -1, 0)]),
    *(edit(f"four axes, pixdim {step}", dim=(5, 4, 3, 2), pixdim=step) for step in [(1.5, 2, 3, 0), (1.5, 2, 3, NAN),
      (1.5, 2, 3, 4)]),
    *(edit(f"origin {origin}", origin=origin) for origin in [(NAN, 0, 0, 0), (INF, 0, 0, 0), (0, 0, 0, 0)]),
    *(edit(f"{key} {value}", **{key: value}) for key, value in [
        ("flag1", 1), ("flag2", 255), ("min", NAN), ("max", NAN), ("pixval_offset", 5.0), ("pixval_cal", 2.0), ("gap",
        7.0), ("user", NAN), ("line", b"\xff" * 80),
        ("matrix", tuple(range(20))),
    ]),
    *each("more", 1, -1, 16), *each("share", 0, 0.5),
    *(edit(f"{name}", name="case_0000.gipl.gz", pack=pack) for name, pack in PACKS.items()),
    edit(".gz, not packed", name="case_0000.gipl.gz"),
    edit("packed, no .gz", pack=PACKS["gzip"]),
    edit("GIPL", name="case_0000.GIPL"),
]  # fmt: skip

BUILDERS: dict[str, Callable[[Mapping[str, Any], bool], Files]] = {
    "nifti": nifti,
    "meta": meta,
    "nrrd": nrrd,
    "gipl": gipl,
}
SPACINGS: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "nifti": nifti_spacing, "meta": meta_spacing, "nrrd": nrrd_spacing, "gipl": gipl_spacing,
}  # fmt: skip


def singles(format: str, edits: Iterable[tuple[str, Edit]], **options: Any) -> list[Recipe]:
    return [Recipe(format, (one,), options) for one in edits]
