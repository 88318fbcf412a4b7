"""Boxes of a case in the axes of its file, of nnU-Net's array and of the network, and where a box lies in space.

Readers that reorient give an array whose axes are others than the file's, and write them back. What they keep of it in
their properties is read here, and moved along for the file of a box.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nibabel.orientations import aff2axcodes

from nnunet_lowmem.types import Box, Shape3, shape3

logger = logging.getLogger(__name__)

_OPPOSITE = dict(zip("LRPAIS", "RLAPSI", strict=True))


def file_shape(shape: Sequence[int], properties: Mapping[str, Any]) -> Shape3:
    """Return the shape of the file, slowest axis first, of which nnU-Net's array has this shape."""
    return shape3(shape[axis] for axis, _ in _axes(properties))


def box_of_array(box: Box, shape: Sequence[int], properties: Mapping[str, Any]) -> Box:
    """Return where a box of the file lies in nnU-Net's array of this shape."""
    found = list(box)
    for within, (axis, is_turned) in zip(box, _axes(properties), strict=True):
        found[axis] = _turned(within, shape[axis]) if is_turned else within
    return found[0], found[1], found[2]


def moved(
    properties: Mapping[str, Any], box: Box, shape: Sequence[int], voxels: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the properties of a box of nnU-Net's array, for its writers: where it begins, and how large voxels are.

    Parameters
    ----------
    properties : dict
        Of the whole case; not changed.
    box : 3 slices
        Of the array.
    shape : int, 3
        Of the array.
    voxels : int, 3, optional
        Into how many the box is cut along each axis; without, into its own.
    """
    found = dict(properties)
    sizes = [within.stop - within.start for within in box]
    steps = [size / count for size, count in zip(sizes, voxels or sizes, strict=True)]
    if "spacing" in properties:
        found["spacing"] = [float(s) * step for s, step in zip(properties["spacing"], steps, strict=True)]
    first = _first(box, steps)
    if "sitk_stuff" in properties:
        place = found["sitk_stuff"] = dict(properties["sitk_stuff"])
        axes = len(place["spacing"])  # of a file that holds the channels, too, four
        step = np.asarray(place["spacing"]) * [*first, 0][:axes]
        origin = np.asarray(place["origin"]) + np.reshape(place["direction"], (axes, axes)) @ step
        place["origin"] = tuple(origin.tolist())
        place["spacing"] = tuple((np.asarray(place["spacing"]) * [*reversed(steps), 1][:axes]).tolist())
    elif "nibabel_stuff" in properties:
        affines = found["nibabel_stuff"] = dict(properties["nibabel_stuff"])
        if "reoriented_affine" in affines:
            affines["reoriented_affine"] = _from(affines["reoriented_affine"], first, steps)
        axes_of_file = _axes(properties)
        in_file = [_turned(box[axis], shape[axis]) if is_turned else box[axis] for axis, is_turned in axes_of_file]
        steps = [steps[axis] for axis, _ in axes_of_file]
        affines["original_affine"] = _from(affines["original_affine"], _first(in_file, steps), steps)
    elif any(first):
        logger.info("nothing is known of where the image lies in space: nor does the file of its box tell")
    return found


def _turned(within: slice, size: int) -> slice:
    return slice(size - within.stop, size - within.start)


def place_of(properties: Mapping[str, Any]) -> list[Any]:
    """Return what says where nnU-Net's array lies in space, to be compared with another's; empty where nothing does."""
    place, affines = properties.get("sitk_stuff"), properties.get("nibabel_stuff")
    if place is not None:
        return [place["origin"], place["direction"]]
    return [] if affines is None else [affines.get("reoriented_affine", affines["original_affine"])]


def _first(box: Sequence[slice], steps: Sequence[float]) -> list[float]:
    """Return where the middle of the first voxel of a box lies, (x, y, z), if its voxels have the size of `steps`."""
    return [within.start + (step - 1) / 2 for within, step in zip(reversed(box), reversed(steps), strict=True)]


def _from(affine: Any, voxel: Sequence[float], steps: Sequence[float]) -> Any:
    """Return the affine of an image that begins at a voxel (x, y, z) of the one that `affine` is of.

    Its own voxels are `steps` (z, y, x) of those.
    """
    found = np.array(affine, np.float64)
    found[:3, :3] = found[:3, :3] * steps[::-1]
    found[:3, 3] = (affine @ [*voxel, 1])[:3]
    return found


def _axes(properties: Mapping[str, Any]) -> list[tuple[int, bool]]:
    """Return for each axis of the file, slowest first, the axis of the array along which it lies, and if it is turned.

    A writer that orders axes anew keeps where the file's own point to.
    """
    codes = _codes(properties)
    if codes is None:
        return [(0, False), (1, False), (2, False)]
    of_file, of_array = (list(reversed(code)) for code in codes)
    return [
        next((axis, own != code) for axis, own in enumerate(of_array) if code in (own, _OPPOSITE[own]))
        for code in of_file
    ]


def _codes(properties: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str]] | None:
    """Return where the axes x, y, z of file and array point to; None where they are the same."""
    place, affines = properties.get("sitk_stuff", {}), properties.get("nibabel_stuff", {})
    if "original_orientation" in place:
        array = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(place["direction"])  # type: ignore[no-untyped-call]  # SimpleITK has no annotations
        return place["original_orientation"], array
    if "reoriented_affine" in affines:
        of_file, of_array = (aff2axcodes(affines[name]) for name in ("original_affine", "reoriented_affine"))  # type: ignore[no-untyped-call]  # nor has this of nibabel
        return of_file, of_array
    return None
