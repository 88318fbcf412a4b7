"""How many voxels each label has, counted where a label map passes by: block after block, no copy of its size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# small enough for the processor's cache, as the wide integers that numpy counts by
_BLOCK_VOXELS = 2**14
_VALUES = 2**16


class LabelCounts:
    """Voxels of each label but 0, of what has been added."""

    def __init__(self) -> None:
        self._voxels = np.zeros(_VALUES, np.int64)

    def add(self, labels: NDArray[np.integer[Any]]) -> None:
        """Count a box of labels below 2**16; shape (z, y, x), any strides."""
        for plane in labels.swapaxes(0, int(np.argmax(labels.strides))):
            self._add_flat(plane.ravel(order="K"))

    def _add_flat(self, labels: NDArray[np.integer[Any]]) -> None:
        for start in range(0, labels.size, _BLOCK_VOXELS):
            block = labels[start : start + _BLOCK_VOXELS]
            if block.any():  # most of a body is not labelled
                found = np.bincount(block)
                self._voxels[: len(found)] += found

    def voxels(self) -> dict[int, int]:
        """Return how many voxels each label has that is there."""
        return {int(label): int(self._voxels[label]) for label in np.flatnonzero(self._voxels) if label}


def counted(labels: NDArray[Any]) -> dict[int, int]:
    """Return how many voxels each label of a map has; nothing where its values can be no labels."""
    is_array = isinstance(labels, np.ndarray) and labels.dtype.kind in "ui"  # else of somebody else's export
    if not is_array or (labels.size and not 0 <= labels.min() <= labels.max() < _VALUES):
        return {}
    counts = LabelCounts()
    counts.add(labels)
    return counts.voxels()
