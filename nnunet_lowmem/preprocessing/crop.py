"""Where an image is nonzero: the box that nnU-Net crops to, and the hole-filled mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nnunet_lowmem.preprocessing.sources import Volume
from nnunet_lowmem.types import Allocate
from nnunet_lowmem.volumes.planes import give_back

#: Labelled at a time, unless a plane has more.
SLAB_VOXELS = 2**21


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
    fill_holes(mask)
    return mask


def fill_holes(mask: NDArray[np.bool_]) -> None:
    """Set what scipy's ``binary_fill_holes`` does: what no path across faces of unset voxels leads out of, in place.

    Some planes at a time. A hole within them is filled at once; a part that reaches to their faces waits until it is
    known whether those that it meets lead out.
    """
    depth = max(1, SLAB_VOXELS // max(1, mask[0].size))
    slabs = [mask[start : start + depth] for start in range(0, len(mask), depth)]
    waiting, meetings = [], []
    count, above = 1, np.zeros(mask.shape[1:], np.int64)  # part 0 is the outside, of those that wait
    for number, slab in enumerate(slabs):
        labels, found = label(~slab)
        at = _where_on_faces(labels, found)
        reaching = np.flatnonzero(at >= 0)
        parts = np.zeros(found + 1, np.int64)
        parts[reaching] = np.arange(count, count + len(reaching))
        slab |= (parts == 0)[labels]
        sides = [labels[:, [0, -1]], labels[:, :, [0, -1]]]
        sides += [labels[0]] * (number == 0) + [labels[-1]] * (number == len(slabs) - 1)
        outside = np.unique(np.concatenate([parts[side].ravel() for side in sides]))
        meetings.append(np.stack([np.zeros_like(outside), outside]))
        pairs = np.stack([above, parts[labels[0]]]).reshape(2, -1)
        meetings.append(np.unique(pairs[:, pairs.all(axis=0)], axis=1))
        waiting.append((slab, at[reaching], parts[reaching]))
        count, above = count + len(reaching), parts[labels[-1]]
        give_back(mask)
    some, others = np.concatenate(meetings, axis=1)
    graph = coo_array((np.ones(len(some), np.bool_), (some, others)), (count, count))
    joined = connected_components(graph, directed=False)[1]
    for slab, at, parts in waiting:
        holes = at[joined[parts] != joined[0]]
        if holes.size:
            labels, found = label(~slab)
            is_hole = np.zeros(found + 1, np.bool_)
            is_hole[labels.ravel()[holes]] = True
            slab |= is_hole[labels]
            give_back(mask)


def _where_on_faces(labels: NDArray[np.int32], found: int) -> NDArray[np.intp]:
    """Return for each label a flat position on the six faces, -1 where there is none, and for 0."""
    faces = np.ones(labels.shape, np.bool_)
    faces[1:-1, 1:-1, 1:-1] = False
    shell = np.flatnonzero(faces)
    at = np.full(found + 1, -1, np.intp)
    at[labels.ravel()[shell]] = shell
    at[0] = -1
    return at


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
