"""Where an image is nonzero: the box that nnU-Net crops to, and the hole-filled mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from nnunet_lowmem.preprocessing.sources import Volume
from nnunet_lowmem.types import Allocate
from nnunet_lowmem.volumes.mapped import give_back

#: Labelled at a time, unless a plane has more.
SLAB_VOXELS = 2**21
# beside 0, unset, and 1, set
_LEADS_OUT = np.uint8(2)


def _is_nonzero(volume: Volume, plane: int) -> NDArray[np.bool_]:
    nonzero: NDArray[np.bool_] = volume[plane].astype(np.float32, copy=False) != 0
    return nonzero


def nonzero_mask(volumes: Sequence[Volume], make: Allocate = np.empty) -> NDArray[np.bool_]:
    """Voxels that are nonzero in any channel, holes filled in 3D, in an array that `make` makes.

    Of the crop the holes are the same as of the whole: what surrounds the box of the mask is connected to the outside.
    """
    mask = make(volumes[0].shape, np.dtype(np.bool_))
    for plane, target in enumerate(mask):
        target[...] = _is_nonzero(volumes[0], plane)
        for volume in volumes[1:]:
            target |= _is_nonzero(volume, plane)
        give_back(mask)
    fill_holes(mask)
    return mask


def fill_holes(mask: NDArray[np.bool_]) -> None:
    """Set what scipy's ``binary_fill_holes`` does: what no path across faces of unset voxels leads out of, in place.

    Some planes at a time, and again where the planes beside them have changed: how often depends on how ways out wind,
    what is kept does not.
    """
    if min(mask.shape) < 3:  # all of it lies on a face
        return
    voxels, depth = mask.view(np.uint8), max(1, SLAB_VOXELS // mask[0].size)
    slabs = [voxels[start : start + depth] for start in range(0, len(voxels), depth)]
    outside = np.full(mask.shape[1:], _LEADS_OUT)  # above the first plane and below the last
    waiting = dict.fromkeys(range(len(slabs)))
    while waiting:
        number = next(iter(waiting))
        del waiting[number]
        above = slabs[number - 1][-1] if number else outside
        below = slabs[number + 1][0] if number + 1 < len(slabs) else outside
        if _mark_ways_out(slabs[number], above, below):
            waiting |= dict.fromkeys(beside for beside in (number - 1, number + 1) if 0 <= beside < len(slabs))
        give_back(mask)
    for slab in slabs:
        np.not_equal(slab, _LEADS_OUT, out=slab, casting="unsafe")
        give_back(mask)


def _mark_ways_out(slab: NDArray[np.uint8], above: NDArray[np.uint8], below: NDArray[np.uint8]) -> bool:
    """Mark the parts of unset voxels that reach a side, or what leads out in the planes beside; tell of any."""
    labels, found = label(slab == 0)
    leads_out = np.zeros(found + 1, np.bool_)
    beside = labels[0][above == _LEADS_OUT], labels[-1][below == _LEADS_OUT]
    for reached in (labels[:, [0, -1]], labels[:, :, [0, -1]], *beside):
        leads_out[reached] = True
    leads_out[0] = False  # what is set, or marked
    if not leads_out.any():
        return False
    slab[leads_out[labels]] = _LEADS_OUT
    return True


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
