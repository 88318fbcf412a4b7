"""A channel on its way into the network: cropped, cast and normalised block by block, when it is read.

nnU-Net normalises a whole channel in float32. Each of its rules is one number or two of the whole channel, and
arithmetic on single voxels: the numbers are found first, in a pass over planes, and the arithmetic is done on blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.preprocessing import statistics
from nnunet_lowmem.preprocessing.normalisation import (
    BOUNDED,
    RESCALING,
    VOXELWISE,
    ZSCORE,
    Normaliser,
    is_one_of,
    needs_mask,
)
from nnunet_lowmem.types import Box, Shape3, shape3
from nnunet_lowmem.volumes.file_volume import StoredVolume
from nnunet_lowmem.volumes.mapped import give_back

Volume = NDArray[Any] | StoredVolume
"""One channel, shape (z, y, x) in any order of axes, of any real type."""
Block = NDArray[np.float32]
Rule = Callable[[Block, Box], Block]
"""Normalises a block in place or not; the box says where it lies in the cropped channel."""

_BLOCK_BYTES = 4 << 20
_EPS = 1e-8  # nnU-Net's least deviation, and range


def view(volume: Volume, order: Sequence[int], crop: Sequence[slice]) -> Volume:
    """Return a view with its axes in another order, cropped along these."""
    turned = volume.transpose(tuple(order))
    return turned.within(tuple(crop)) if isinstance(turned, StoredVolume) else turned[tuple(crop)]


class Source(NamedTuple):
    """A cropped channel in the network's order of axes.

    Attributes
    ----------
    volume : array or StoredVolume
        In the type of the file.
    rule : callable
        How a block is normalised.
    """

    volume: Volume
    rule: Rule

    @property
    def shape(self) -> Shape3:
        """Of the cropped channel."""
        z, y, x = self.volume.shape
        return z, y, x

    def read(self, planes: slice, rows: slice, columns: slice = slice(None)) -> Block:
        """Return a box of normalised voxels, C-contiguous."""
        block = self.volume[planes, rows, columns].astype(np.float32, order="C")
        return np.asarray(self.rule(block, (planes, rows, columns)), np.float32)

    def read_along(self, axis: int, planes: slice, rows: slice) -> Block:
        """As `read`, with another axis as the first."""
        box = [rows, slice(None)]
        box.insert(axis, planes)
        return np.ascontiguousarray(np.moveaxis(self.read(*box), axis, 0))


def is_streamed(normaliser: Normaliser) -> bool:
    """Whether a normaliser's result can be had block by block, bit by bit."""
    if is_one_of(normaliser, ZSCORE):
        return statistics.matches_numpy()
    return is_one_of(normaliser, (*VOXELWISE, *RESCALING))


def keeps_order(volume: Volume) -> bool:
    """Whether sums over a volume go along its memory as stock's do over its float32 copy."""
    return isinstance(volume, StoredVolume) or volume.flags.c_contiguous


def source_of(
    volume: Volume,
    order: Sequence[int],
    crop: Sequence[slice],
    normaliser: Normaliser,
    mask: NDArray[np.bool_] | None,
) -> Source:
    """Find what a rule has to know of a channel, and return what reads it.

    Parameters
    ----------
    volume : array or StoredVolume
        Whole, axes as in the file; if the rule takes sums, one that `keeps_order`.
    order : sequence of int
        nnU-Net's ``transpose_forward``.
    crop : 3 slices
        In the order of the network.
    normaliser : Normaliser
        One that `is_streamed`.
    mask : bool, shape (z, y, x) of the cropped channel in the order of the network, or None
        Where to normalise, if the rule asks for a mask.
    """
    cropped = view(volume, order, crop)
    if is_one_of(normaliser, VOXELWISE):
        if is_one_of(normaliser, BOUNDED):  # which refuses values; of a block it would say so when it is read
            normaliser.run(np.array(statistics.extremes(lambda: _pieces(cropped))))
        return Source(cropped, lambda block, box: normaliser.run(block))
    if is_one_of(normaliser, RESCALING):
        return Source(cropped, _rescaling(cropped))
    if needs_mask(normaliser):
        assert mask is not None, "where a rule needs a mask, one is made"
        return Source(cropped, _masked_zscore(cropped, mask))
    as_stored = [crop[list(order).index(axis)] for axis in range(3)]
    return Source(cropped, _zscore(view(volume, (0, 1, 2), as_stored), volume.shape))


def whole_source(volume: Block) -> Source:
    """Return what reads a channel that is normalised already."""
    return Source(volume, lambda block, box: block)


def _rescaling(volume: Volume) -> Rule:
    lowest, largest = statistics.extremes(lambda: _pieces(volume))
    highest = np.clip(largest - lowest, a_min=_EPS, a_max=None)

    def rule(block: Block, box: Box) -> Block:
        block -= lowest
        block /= highest
        return block

    return rule


def _zscore(volume: Volume, whole: Sequence[int]) -> Rule:
    """`volume` is cropped, and `whole` the shape it was cropped out of; both as stored."""
    _, *cuts = (inside != outside for inside, outside in zip(volume.shape, whole, strict=True))
    shape, is_cropped = shape3(volume.shape), (cuts[0], cuts[1])
    mean, deviation = statistics.mean_and_deviation(lambda: _pieces(volume), shape, is_cropped)
    least: Any = max(deviation, _EPS)

    def rule(block: Block, box: Box) -> Block:
        block -= mean
        block /= least
        return block

    return rule


def _masked_zscore(volume: Volume, mask: NDArray[np.bool_]) -> Rule:
    def parts() -> Iterator[tuple[slice, NDArray[np.bool_]]]:
        for planes in _planes(volume):
            yield planes, mask[planes]
            give_back(mask)

    def values() -> Iterator[NDArray[Any]]:
        return (volume[planes][inside] for planes, inside in parts())

    count = sum(int(np.count_nonzero(inside)) for _, inside in parts())
    if not count:
        return lambda block, box: block
    mean, deviation = statistics.mean_and_deviation(values, (1, 1, count))
    least: Any = max(deviation, _EPS)

    def rule(block: Block, box: Box) -> Block:
        inside = mask[box]
        np.subtract(block, mean, out=block, where=inside)
        np.divide(block, least, out=block, where=inside)
        give_back(mask)
        return block

    return rule


def _pieces(volume: Volume) -> Iterator[NDArray[Any]]:
    return (volume[planes] for planes in _planes(volume))


def depth_of_blocks(shape: Sequence[int]) -> int:
    """Return how many planes of a volume of this shape have a few MiB as float32."""
    return max(1, _BLOCK_BYTES // (4 * shape[1] * shape[2]))


def _planes(volume: Volume) -> list[slice]:
    """Return the planes of a volume, some MiB at a time."""
    planes, depth = len(volume), depth_of_blocks(volume.shape)
    return [slice(start, min(start + depth, planes)) for start in range(0, planes, depth)]


class AsRead:
    """The preprocessed image where nothing is resampled: normalised as it is read, and never kept.

    What a network takes of an image: ``image[channels, planes, rows, columns]`` by slices, and a shape.

    Parameters
    ----------
    sources : sequence of Source
        One a channel.
    box : 3 slices, optional
        Of the image.
    """

    dtype = np.dtype(np.float32)
    ndim = 4
    nbytes = 0

    def __init__(self, sources: Sequence[Source], box: Box | None = None) -> None:
        self._sources = list(sources)
        sizes = self._sources[0].shape
        parts = [slice(None)] * 3 if box is None else box
        self._ranges = [range(*part.indices(size)) for part, size in zip(parts, sizes, strict=True)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, z, y, x."""
        z, y, x = map(len, self._ranges)
        return len(self._sources), z, y, x

    def within(self, box: Box) -> AsRead:
        """Return the image of a box of this one."""
        z, y, x = self._slices(box)
        return AsRead(self._sources, (z, y, x))

    def __getitem__(self, key: tuple[slice, ...]) -> Block:
        channels, *box = key
        z, y, x = self._slices(box)
        sources = self._sources[channels]
        voxels = np.empty((len(sources), *(part.stop - part.start for part in (z, y, x))), np.float32)
        for source, target in zip(sources, voxels, strict=True):
            target[...] = source.read(z, y, x)
        return voxels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[(slice(None),) * 4].astype(dtype or self.dtype, copy=False)

    def _slices(self, box: Sequence[slice]) -> list[slice]:
        cut = [whole[part] for whole, part in zip(self._ranges, box, strict=True)]
        return [slice(part.start, part.stop) for part in cut]
