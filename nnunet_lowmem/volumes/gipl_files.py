"""Where a GIPL file (.gipl, .gipl.gz) keeps its voxels; ITK's reader does not notice what is missing."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

from nnunet_lowmem.volumes.headers import Header, Layout
from nnunet_lowmem.volumes.stored_parts import Part, encoding_by_name, first_bytes

_HEADER_BYTES = 256
# what a voxel is, and the spacing
_FIELDS = struct.Struct(">8xH4f")
# integers of 8 and 16 bits and floats; of others ITK reads the header alone
_KINDS = (7, 8, 15, 16, 64, 65)


#: Returns the header of a file as it is stored.
raw_header = partial(first_bytes, count=_HEADER_BYTES)


def layout(path: Path, raw: bytes, header: Header) -> Layout:
    """Return where ITK looks for the voxels."""
    kind, *spacing = _FIELDS.unpack_from(raw)
    return Layout(
        (Part(path, 0, header.needed_bytes, encoding_by_name(path), skipped_bytes=_HEADER_BYTES),),
        header.dtype.newbyteorder(">") if kind in _KINDS else None,
        tuple(map(abs, spacing[: len(header.shape)])),
    )
