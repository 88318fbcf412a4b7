"""Label images as OME-Zarr: shard by shard, with coarser scales that hold every second voxel."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.types import Shape3, shape3
from nnunet_lowmem.volumes import ome
from nnunet_lowmem.volumes.label_images import LabelImage, block_of, blocks, stored_type
from nnunet_lowmem.volumes.selection import ZARR, ending_of
from nnunet_lowmem.volumes.zarr_stores import library

#: What viewers ask for at a time, voxels along each axis.
CHUNK = 64
# chunks along each axis of the file that holds them; zarr 2 has none such
_SHARD = 4
#: Coarser scales are added until one is no larger.
_SMALLEST = 64
# axes are halved together while none is coarser than this times the finest
_ANISOTROPY = 2.0
_LOOK_S = 0.01


def write(labels: NDArray[Any], path: Path, image: LabelImage) -> None:
    """Write a map of shape (z, y, x) as a store of its own.

    Parameters
    ----------
    labels : ndarray of integers
        May be mapped.
    path : Path
        There is nothing yet.
    image : LabelImage
        A version of NGFF that is not known is written as the latest one.

    Raises
    ------
    OSError
        If the disk is full, or there can be no such folder.
    """
    version = image.version if image.version in ome.VERSIONS else ome.LATEST
    dtype, levels = stored_type(labels), _levels(shape3(labels.shape), image.spacing)
    name = path.name.removesuffix(ending_of(path, ZARR))
    attributes = ome.label_attributes(levels, image.spacing, image.origin, image.unit, version, image.classes, name)
    with _store_at(path) as store:
        group = library().create_group(
            store=store,
            zarr_format=2 if version == ome.VERSIONS[0] else 3,
            attributes={**attributes, **image.made},
        )
        _write_levels(group, levels, labels, dtype)


def _write_levels(group: Any, levels: Sequence[ome.Level], labels: NDArray[Any], dtype: np.dtype[Any]) -> None:
    finer: Any = None
    for level in levels:
        array = _array(group, level, dtype)
        step = tuple(1 for _ in level.shape)
        if finer is not None:
            step = tuple(b // a for a, b in zip(finer[1].factors, level.factors, strict=True))
        for box in blocks(level.shape, shape3(array.shards or array.chunks)):
            if finer is None:
                array[box] = block_of(labels, box, dtype)
            else:
                ends = zip(box, step, finer[1].shape, strict=True)
                array[box] = finer[0][tuple(slice(b.start * s, min(b.stop * s, n), s) for b, s, n in ends)]
        finer = array, level


@contextmanager
def _store_at(path: Path) -> Iterator[Any]:
    """Give a new store, into which nothing is written any more once the block has ended.

    Where a file cannot be written zarr says so at once, and goes on with others in its own thread.
    """
    local: Any = library().storage.LocalStore
    writing: set[object] = set()
    has_ended = Event()

    class Store(local):  # type: ignore[misc]  # of a library that need not be there
        async def set(self, *given: Any, **words: Any) -> None:
            await self._unless_ended(super().set, *given, **words)

        async def set_if_not_exists(self, *given: Any, **words: Any) -> None:
            await self._unless_ended(super().set_if_not_exists, *given, **words)

        async def _unless_ended(self, write: Any, *given: Any, **words: Any) -> None:
            mark = object()
            writing.add(mark)
            try:
                if not has_ended.is_set():
                    await write(*given, **words)
            finally:
                writing.discard(mark)

    try:
        yield Store(str(path))
    finally:
        has_ended.set()
        while writing:
            time.sleep(_LOOK_S)


def _levels(shape: Shape3, spacing: Sequence[float]) -> list[ome.Level]:
    levels = [ome.Level("0", shape, (1, 1, 1))]
    while max(levels[-1].shape) > _SMALLEST:
        last = levels[-1]
        steps = [s * f for s, f in zip(spacing, last.factors, strict=True)]
        # an axis that is short by now does not hold up the others
        finest = min(step for n, step in zip(last.shape, steps, strict=True) if n > _SMALLEST)
        halved = [n > 1 and step < _ANISOTROPY * finest for n, step in zip(last.shape, steps, strict=True)]
        factors = shape3(f * (1 + half) for f, half in zip(last.factors, halved, strict=True))
        coarser = shape3(-(-n // (1 + half)) for n, half in zip(last.shape, halved, strict=True))
        levels.append(ome.Level(str(len(levels)), coarser, factors))
    return levels


def _array(group: Any, level: ome.Level, dtype: np.dtype[Any]) -> Any:
    chunk = tuple(min(CHUNK, max(1, extent)) for extent in level.shape)
    is_3 = group.metadata.zarr_format == 3
    shard = tuple(c * min(_SHARD, math.ceil(n / c)) for c, n in zip(chunk, level.shape, strict=True))
    return group.create_array(
        level.path,
        shape=level.shape,
        dtype=dtype,
        chunks=chunk,
        shards=shard if is_3 else None,
        fill_value=0,
        dimension_names=("z", "y", "x") if is_3 else None,
        chunk_key_encoding={"name": "default" if is_3 else "v2", "separator": "/"},
    )
