"""Where an image is nonzero: the box that nnU-Net crops to, and the hole-filled mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

from nnunet_lowmem.preprocessing.sources import Volume


def _is_nonzero(volume: Volume, plane: int) -> NDArray[np.bool_]:
    nonzero: NDArray[np.bool_] = volume[plane].astype(np.float32, copy=False) != 0
    return nonzero


def nonzero_mask(volumes: Sequence[Volume]) -> NDArray[np.bool_]:
    """Voxels that are nonzero in any channel, holes filled in 3D.

    Of the crop the holes are the same as of the whole: what surrounds the box of the mask is connected to the outside.
    """
    mask = np.zeros(volumes[0].shape, bool)
    for volume in volumes:
        for plane in range(len(mask)):
            mask[plane] |= _is_nonzero(volume, plane)
    filled: NDArray[np.bool_] = binary_fill_holes(mask)
    return filled


def nonzero_box(volumes: Sequence[Volume]) -> list[list[int]]:
    """Bounding box [start, stop) of the nonzero voxels of all channels; everything if there are none.

    The box of the hole-filled mask that ``crop_to_nonzero`` takes is the box of the mask.
    """
    shape = volumes[0].shape

    def nonzero(plane: int) -> NDArray[np.bool_]:
        planes: NDArray[np.bool_] = np.any([_is_nonzero(volume, plane) for volume in volumes], axis=0)
        return planes

    start = next((plane for plane in range(shape[0]) if nonzero(plane).any()), None)
    if start is None:
        return [[0, n] for n in shape]
    stop = next(plane for plane in reversed(range(shape[0])) if nonzero(plane).any()) + 1
    rows, columns = np.zeros(shape[1], bool), np.zeros(shape[2], bool)
    for plane in range(start, stop):
        here = nonzero(plane)
        rows |= here.any(axis=1)
        columns |= here.any(axis=0)
        if rows[0] and rows[-1] and columns[0] and columns[-1]:
            break
    ends = [(int(np.argmax(line)), len(line) - int(np.argmax(line[::-1]))) for line in (rows, columns)]
    return [[start, stop], *map(list, ends)]
