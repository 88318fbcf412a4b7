"""Cases that are refused by their headers, before they cost anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.preprocessing.reading import check_grid, count_channels, library_of, read_by
from nnunet_lowmem.volumes.formats import is_volume, read_header
from nnunet_lowmem.volumes.headers import Header

try:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
except ImportError:  # new in nnU-Net 2.6
    SimpleITKIOWithReorient = None

#: More than any machine can predict; the budget speaks below that.
VOXELS = 2**40


def check_case(files: Sequence[str], reader: type, channels: int, target_spacing: Sequence[float]) -> None:
    """Refuse a case by the headers of its files.

    Pictures, formats that are not in the table, and readers that are not nnU-Net's for volumes decide for themselves;
    what they make of the files is checked when it has been read.

    Parameters
    ----------
    files : sequence of str
        One file per channel, or fewer with several channels each.
    reader : type
        The model's reader class.
    channels : int
        How many the model takes.
    target_spacing : sequence of float
        The network's, in any order.

    Raises
    ------
    UsageError
        With the file and what is the matter.
    """
    library = library_of(reader)
    if library is None or not all(map(is_volume, files)) or lookup.found(Step.READING, reader):
        return
    with read_by(reader):
        headers = [read_header(file, library) for file in files]
    for file, header in zip(files, headers, strict=True):
        _check_spacing(file, header)
    if reader in (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient):
        held = sum(count_channels(file, header, reader) for file, header in zip(files, headers, strict=True))
        if held != channels:
            raise twin(UsageError, RuntimeError if 0 < held < channels else IndexError)(
                _wrong_count(files, held, channels)
            )
        check_grid(files, [header.shape for header in headers], [header.spacing for header in headers])
    _check_resampled(files[0], headers[0], target_spacing)


def _check_spacing(file: str, header: Header) -> None:
    """Refuse a spacing as it is stored: of 0 and of what is no number SimpleITK makes 1 without a word."""
    stored = header.layout.spacing[:3] if header.layout is not None and header.components == 1 else ()
    if not all(0 < step < math.inf for step in stored):
        raise UsageError(f"{file}: the spacing in its header is {stored[::-1]} mm; mend it, all must be positive")


def _wrong_count(files: Sequence[str], held: int, channels: int) -> str:
    names = ", ".join([*files[:4], "..."] if len(files) > 4 else files)
    needed = f"one file per channel, _0000 to _{channels - 1:04d}" if channels > 1 else "a single file, _0000"
    return f"The image has {held} channels, the model takes {channels}: give {needed}. Given were {names}"


def _check_resampled(file: str, header: Header, target_spacing: Sequence[float]) -> None:
    """Sorted, the spacings give the smallest grid that resampling could lead to."""
    spacing = header.spacing[-len(target_spacing) :]
    voxels = math.prod(header.shape[-3:]) * math.prod(spacing) / math.prod(target_spacing)
    if voxels > VOXELS:
        raise UsageError(
            f"{file}: {header.shape[-3:]} voxels of {header.spacing} mm make {voxels:.3g} voxels at the model's "
            f"{tuple(target_spacing)} mm, more than {VOXELS:.3g}: the spacing in its header cannot be right"
        )
