"""Shape and spacing of an image file, from its header alone."""

from __future__ import annotations

from typing import Any

import SimpleITK

from nnunet_lowmem.errors import UsageError

# nnU-Net gives two-dimensional images a third axis of one slice, so thick that it is never resampled
_SLICE_THICKNESS_FACTOR = 999


def read_header(path: str) -> tuple[list[int], list[float]]:
    """Return shape and spacing (mm), three entries each, in the axis order of nnU-Net's arrays.

    Raises
    ------
    UsageError
        If the file is not an image, or has neither two, three nor four dimensions.
    """
    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"{path} cannot be read as an image: {reason}") from None
    shape, spacing = list(reader.GetSize())[::-1], [abs(value) for value in reader.GetSpacing()[::-1]]
    if len(shape) == 2:
        return [1, *shape], [max(spacing) * _SLICE_THICKNESS_FACTOR, *spacing]
    if len(shape) not in (3, 4):
        raise UsageError(f"{path} has {len(shape)} dimensions; nnU-Net takes 2 to 4")
    return shape[-3:], spacing[-3:]
