"""Slices of an image with its labels laid over: a few planes are read, nothing of the size of a volume is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex
from numpy.typing import NDArray
from PIL import Image

from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.types import NetworkImage, PreprocessedCase

#: Longer side of a slice.
LONGEST_PIXELS = 384
_SHORTEST_PIXELS = 8
_FILL = 0.4
# neighbours in value are far apart in hue
_GOLDEN_RATIO = 0.618034
# the image is black to white between these shares of its brightness
_PERCENTILES = (1.0, 99.5)


@dataclass(frozen=True)
class Volume:
    """An image and its labels, the same box of the body; axis order of the network.

    Attributes
    ----------
    image : float32, shape (channels, z, y, x)
        In network space.
    labels : integers, shape (z, y, x)
        In the cropped grid of the file.
    spacing : float, 3
        Of the labels.
    directions : shape (3, 3), or None
        Where each axis points: to the patient's left, back and head; None where the file does not tell.
    first, original_shape : int, 3
        Where the cropped grid lies in that of the file.
    """

    image: NetworkImage
    labels: NDArray[np.integer[Any]]
    spacing: Sequence[float]
    directions: NDArray[np.float64] | None
    first: Sequence[int]
    original_shape: Sequence[int]


def labelled_volume(case: PreprocessedCase, segmentation: NDArray[Any], transpose_forward: Sequence[int]) -> Volume:
    """Return views of the first channel and the labels, in the axes of the network."""
    geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
    return Volume(
        image=case.image,
        labels=segmentation.transpose(transpose_forward)[geometry.crop],
        spacing=[case.properties["spacing"][axis] for axis in transpose_forward],
        directions=_directions(case.properties, transpose_forward),
        first=[part.start for part in geometry.crop],
        original_shape=geometry.original_shape,
    )


def _directions(properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> NDArray[np.float64] | None:
    """Where the axes of the network point: to the patient's left, back and head; files keep x first, arrays z."""
    direction = properties.get("sitk_stuff", {}).get("direction", ())
    affines = properties.get("nibabel_stuff")
    if len(direction) == 9:
        columns = np.reshape(direction, (3, 3)).T
    elif affines is not None:
        affine = np.asarray(affines.get("reoriented_affine", affines["original_affine"]))
        columns = affine[:3, :3].T * (-1, -1, 1)  # its axes point to the right, the front and the head
    else:
        return None
    return columns[::-1][list(transpose_forward)].astype(np.float64)


@dataclass(frozen=True)
class Overlay:
    """One slice as a picture.

    Attributes
    ----------
    title : str
    rgb : uint8, shape (rows, columns, 3)
    counts : Counter
        Pixels of each label but 0.
    """

    title: str
    rgb: NDArray[np.uint8]
    counts: Counter[int]


@dataclass(frozen=True)
class _View:
    name: str
    axis: int
    rows: int
    columns: int
    flip_rows: bool = False
    flip_columns: bool = False


def overlays(volume: Volume) -> list[Overlay]:
    """Return an axial, a coronal and a sagittal slice as radiologists look at them: those that hold the most labels.

    One along each axis of the file where its directions are not known; none along an axis across a single plane.
    """
    chosen = _fullest_planes(volume.labels)
    shape = volume.labels.shape
    views = [view for view in _views(volume.directions) if min(shape[view.rows], shape[view.columns]) > 1]
    planes = [_image_plane(volume, view, chosen[view.axis]) for view in views]
    if not planes:
        return []
    low, high = np.percentile(np.concatenate([plane.ravel() for plane in planes]), _PERCENTILES)
    return [
        _overlay(volume, view, plane, chosen[view.axis], (float(low), float(high)))
        for view, plane in zip(views, planes, strict=True)
    ]


def blend(grey: NDArray[Any], labels: NDArray[np.integer[Any]], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Lay labels over a slice, outlined.

    Parameters
    ----------
    grey, labels : shape (rows, columns)
    window : float, float
        Brightness between which the picture runs from black to white.

    Returns
    -------
    uint8, shape (rows, columns, 3)
    """
    low, high = window
    base = np.clip((grey.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)[..., None]
    cover = np.where(labels > 0, np.where(_outline(labels), np.float32(1), np.float32(_FILL)), np.float32(0))[..., None]
    values, which = np.unique(labels, return_inverse=True)
    mixed = base * (1 - cover) + _colours(values)[which.reshape(labels.shape)] * cover
    return np.asarray((mixed * 255).round(), np.uint8)


def colour(label: int) -> str:
    """Return the colour of a label for a page."""
    red, green, blue = _colours(np.array(label))
    return to_hex((float(red), float(green), float(blue)))


def _colours(labels: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    hue = labels * _GOLDEN_RATIO % 1
    saturation = 0.55 + 0.35 * (labels % 3) / 2
    colours = hsv_to_rgb(np.stack([hue, saturation, np.full(hue.shape, 0.95)], axis=-1))
    return np.asarray(colours, np.float32)


def _outline(labels: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    edge = np.zeros(labels.shape, np.bool_)
    for lines, edges in ((labels, edge), (labels.T, edge.T)):
        differs = lines[1:] != lines[:-1]
        edges[1:] |= differs
        edges[:-1] |= differs
    return edge


def _fullest_planes(labels: NDArray[np.integer[Any]]) -> list[int]:
    """Along each axis the plane with the most labelled voxels; the middle one where none is."""
    counts = [np.zeros(size, np.int64) for size in labels.shape]
    for position, plane in enumerate(labels):
        labelled = plane != 0
        counts[0][position] = labelled.sum()
        counts[1] += labelled.sum(1)
        counts[2] += labelled.sum(0)
    return [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]


def _views(directions: NDArray[np.float64] | None) -> list[_View]:
    if directions is None:
        return [_View("axis 0", 0, 1, 2), _View("axis 1", 1, 0, 2), _View("axis 2", 2, 0, 1)]
    matched = max(permutations(range(3)), key=lambda axes: sum(abs(directions[axes[i], i]) for i in range(3)))
    left, back, head = matched
    to_left, to_back, to_head = (bool(directions[axis, i] > 0) for i, axis in enumerate(matched))
    return [
        _View("axial", head, back, left, not to_back, not to_left),
        _View("coronal", back, head, left, to_head, not to_left),
        _View("sagittal", left, head, back, to_head, not to_back),
    ]


def _upright(plane: NDArray[Any], view: _View) -> NDArray[Any]:
    """Turn a plane whose axes are in the volume's order."""
    plane = plane.T if view.rows > view.columns else plane
    return plane[:: -1 if view.flip_rows else 1, :: -1 if view.flip_columns else 1]


def _image_plane(volume: Volume, view: _View, position: int) -> NDArray[np.float32]:
    planes, cropped = volume.image.shape[1 + view.axis], volume.labels.shape[view.axis]
    nearest = min(int((position + 0.5) * planes / cropped), planes - 1)
    key = [slice(0, 1), *[slice(None)] * 3]
    key[1 + view.axis] = slice(nearest, nearest + 1)
    plane = _upright(volume.image[tuple(key)][0].squeeze(view.axis), view)
    # in the proportions of the body
    sizes = [volume.labels.shape[axis] * float(volume.spacing[axis]) for axis in (view.rows, view.columns)]
    rows, columns = (max(_SHORTEST_PIXELS, round(size * LONGEST_PIXELS / max(sizes))) for size in sizes)
    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BILINEAR))


def _overlay(
    volume: Volume, view: _View, grey: NDArray[np.float32], position: int, window: tuple[float, float]
) -> Overlay:
    plane = _upright(np.take(volume.labels, position, view.axis), view)
    nearest = [
        ((np.arange(pixels) + 0.5) * voxels / pixels).astype(int)
        for pixels, voxels in zip(grey.shape, plane.shape, strict=True)
    ]
    labels = plane[np.ix_(*nearest)]
    number = f"slice {volume.first[view.axis] + position + 1} of {volume.original_shape[view.axis]}"
    counts = Counter(np.sort(labels[labels > 0]).tolist())
    return Overlay(f"{view.name}, {number}", blend(grey, labels, window), counts)
