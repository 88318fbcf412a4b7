"""Voxels that are no numbers: one makes a whole tile background, so they are refused, or set to 0 and counted."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.volumes.file_volume import StoredVolume

_PLANES_BYTES = 2**24
_logger = logging.getLogger(__name__)


def check_values(voxels: NDArray[Any] | StoredVolume, name: str, accept_nan: bool) -> bool:
    """Refuse NaN and infinity, or set them to 0; in place, a few planes at a time.

    Parameters
    ----------
    voxels : array or StoredVolume
        Slowest axis first; changed only if `accept_nan`, and if it is an array.
    name : str
        Of the file.
    accept_nan : bool

    Returns
    -------
    bool
        Whether all of them were numbers.

    Raises
    ------
    UsageError
        With their number and the first index, unless they are accepted.
    """
    if voxels.dtype.kind != "f":
        return True
    depth = max(1, _PLANES_BYTES * len(voxels) // max(1, voxels.size * voxels.dtype.itemsize))
    count, first = 0, None
    for start in range(0, len(voxels), depth):
        planes = voxels[start : start + depth]
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(planes.astype(np.float32, copy=False))  # nnU-Net reads float32
        if not wrong.any():
            continue
        if first is None:
            leading, *others = np.argwhere(wrong)[0].tolist()
            first = (*others[::-1], leading + start)
        count += int(np.count_nonzero(wrong))
        if accept_nan:
            planes[wrong] = 0
    if first is None:
        return True
    found = f"{name}: {count} of {voxels.size} voxels are NaN or infinite, the first at index {first}, x first"
    if not accept_nan:
        raise UsageError(f"{found}; mend the image, or have them set to 0 with --accept_nan")
    _logger.warning("%s; they are set to 0", found)
    return False
