"""Boxes of voxels: as text, what ``--bbox`` asks for in the axes of a file; and what is left of one without others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import Any

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.types import BBox, Box

_RANGE = re.compile(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*")
_HOW = "write z0:z1,y0:y1,x0:x1 in voxels of the file, the stop excluded; an end that is left out is the volume's"

#: A box without a voxel.
NOTHING: Box = (slice(0, 0), slice(0, 0), slice(0, 0))


def parse_box(value: Any) -> BBox | None:
    """Return what the option `bbox` asks for.

    Parameters
    ----------
    value : str, or sequence of 3 slices or pairs, or None
        Text as in ``10:50,0:128,:``; in Python ``[slice(10, 50), (0, 128), (None, None)]`` is the same.

    Returns
    -------
    3 pairs of int or None
        Start and stop along each axis, slowest axis of the file first; None where the volume's own end is meant.

    Raises
    ------
    UsageError
        If it is no box.
    """
    if value is None or (isinstance(value, str | tuple) and not value):  # a variable that is empty
        return None
    try:
        pairs = tuple(map(_pair, value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError) as error:
        raise UsageError(f"bbox {value!r} is no box: {_HOW}") from error
    if len(pairs) != 3:
        raise UsageError(f"bbox {value!r} has {len(pairs)} axes, 3 are needed: {_HOW}")
    return pairs


def _pair(bounds: Any) -> tuple[int | None, int | None]:
    if isinstance(bounds, str):
        match = _RANGE.fullmatch(bounds)
        if match is None:
            raise ValueError(bounds)
        start, stop = (int(end) if end else None for end in match.groups())
        return start, stop
    if isinstance(bounds, slice):
        if bounds.step not in (None, 1):
            raise ValueError(bounds)
        bounds = bounds.start, bounds.stop
    start, stop = (None if end is None else index(end) for end in bounds)
    return start, stop


def box_within(bbox: BBox, shape: Sequence[int]) -> Box:
    """Return the box in a volume of this shape, axes of the file.

    Raises
    ------
    UsageError
        If it holds no voxel of it, or others.
    """
    ends = [
        (0 if start is None else start, size if stop is None else stop)
        for (start, stop), size in zip(bbox, shape, strict=True)
    ]
    for (start, stop), size, axis in zip(ends, shape, "zyx", strict=True):
        if not 0 <= start < stop <= size:
            raise UsageError(
                f"the box {in_words(ends)} does not lie in the volume of {tuple(shape)} voxels (z, y, x): along {axis} "
                f"it goes from {start} to {stop}, there are {size}. {_HOW.capitalize()}"
            )
    z, y, x = (slice(start, stop) for start, stop in ends)
    return z, y, x


def whole(shape: Sequence[int]) -> Box:
    """Return the box that is all of a shape."""
    z, y, x = (slice(0, int(extent)) for extent in shape)
    return z, y, x


def moved(box: Box, into: Box) -> Box:
    """Return a box that is counted from the beginning of another as it is counted where that one is."""
    z, y, x = (slice(at.start + part.start, at.start + part.stop) for at, part in zip(into, box, strict=True))
    return z, y, x


def common(one: Box, other: Box) -> Box | None:
    """Return what two boxes share, None for nothing."""
    z, y, x = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return (z, y, x) if all(part.start < part.stop for part in (z, y, x)) else None


def bounds(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds all of several; of none, one without a voxel."""
    z, y, x = (
        slice(min((b[a].start for b in boxes), default=0), max((b[a].stop for b in boxes), default=0)) for a in range(3)
    )
    return z, y, x


def along_last(axis: int) -> list[int]:
    """Return the three axes, that one last."""
    return sorted(range(3), key=lambda other: other == axis)


def without(box: Box, taken: Iterable[Box], order: Sequence[int] = (0, 1, 2)) -> list[Box]:
    """Return boxes that are together what others leave of one.

    Parameters
    ----------
    box : 3 slices
    taken : iterable of boxes
    order : sequence of int
        The axes, in the order in which is cut: along the first nothing is cut more often than it has to be.
    """
    left = [box]
    for other in taken:
        left = [piece for part in left for piece in _without(part, other, order)]
    return left


def _without(box: Box, other: Box, order: Sequence[int]) -> Iterator[Box]:
    shared = common(box, other)
    if shared is None:
        yield box
        return
    middle = list(box)
    for axis in order:
        before, after = slice(box[axis].start, shared[axis].start), slice(shared[axis].stop, box[axis].stop)
        middle[axis] = shared[axis]
        for beside in (before, after):
            if beside.start < beside.stop:
                z, y, x = (beside if at == axis else part for at, part in enumerate(middle))
                yield z, y, x


def joined(one: Box, other: Box) -> Box | None:
    """Return the box of two of which the second begins where the first ends, None if they are others."""
    differing = [axis for axis in range(3) if one[axis] != other[axis]]
    if len(differing) != 1 or one[differing[0]].stop != other[differing[0]].start:
        return None
    z, y, x = (slice(a.start, b.stop) for a, b in zip(one, other, strict=True))
    return z, y, x


def check_mask_shape(found: Sequence[int], shape: Sequence[int], of_headers: bool = False) -> None:
    """Refuse a mask that is not of the image's shape.

    Parameters
    ----------
    found, shape : int, 3
        Of the mask and of the image.
    of_headers : bool
        As their files have it: a reader may order the axes of both anew, so in any order.

    Raises
    ------
    UsageError
        With both.
    """
    ordered = sorted if of_headers else list
    if ordered(found) != ordered(shape):
        raise UsageError(
            f"the mask of the option roi has {tuple(found)} voxels, the image {tuple(shape)}: "
            "resample the mask onto the image"
        )


def in_words(bbox: Sequence[tuple[int | None, int | None]]) -> str:
    """Return a box as the flag takes it."""
    return ",".join(":".join("" if end is None else str(end) for end in ends) for ends in bbox)
