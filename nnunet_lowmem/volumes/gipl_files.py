"""Where a GIPL file (.gipl, .gipl.gz) keeps its voxels; ITK's reader does not notice what is missing."""

from __future__ import annotations

import struct
from pathlib import Path

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.headers import Header, Layout
from nnunet_lowmem.volumes.stored_parts import Encoding, Part, first_bytes

_HEADER_BYTES = 256
_KIND = struct.Struct(">8xH")
# integers of 8 and 16 bits and floats; of others ITK reads the header alone
_KINDS = (7, 8, 15, 16, 64, 65)
_SPACING = struct.Struct(">10x4f")


def raw_header(path: Path) -> bytes:
    """Return the header as it is stored.

    Raises
    ------
    DamagedFileError
        If it ends too early.
    OSError
        If it cannot be read.
    """
    block = first_bytes(path, _HEADER_BYTES)
    if len(block) < _HEADER_BYTES:
        raise DamagedFileError(f"it ends within its header, after {len(block)} of {_HEADER_BYTES} bytes")
    return block


def layout(path: Path, raw: bytes, header: Header) -> Layout:
    """Return where ITK looks for the voxels."""
    (kind,) = _KIND.unpack_from(raw)
    encoding = Encoding.GZIP if path.name.lower().endswith(".gz") else Encoding.RAW
    spacing = tuple(abs(step) for step in _SPACING.unpack_from(raw))
    return Layout(
        (Part(path, 0, header.needed_bytes, encoding, skipped_bytes=_HEADER_BYTES),),
        header.dtype.newbyteorder(">") if kind in _KINDS else None,
        spacing[: len(header.shape)],
    )
