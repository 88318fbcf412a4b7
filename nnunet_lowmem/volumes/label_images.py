"""What a label map is written with where no writer of nnU-Net's knows the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import whole
from nnunet_lowmem.types import Box, Shape3
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.volumes.voxel_files import runs

# above, a map has two bytes a voxel, as nnU-Net's writers have it
_ONE_BYTE = 255


@dataclass(frozen=True)
class LabelImage:
    """Where labels lie, what they are called, and what they were made by.

    Attributes
    ----------
    spacing, origin : (float, float, float)
        Of z, y and x; mm.
    unit : str
        In which lengths are written, by NGFF's names.
    version : str
        Of NGFF.
    classes : dict
        Names of labels; the background among them.
    made : dict
        How the labels were made, for whoever finds them.
    """

    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    unit: str = ""
    version: str = ""
    classes: Mapping[int, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


def stored_type(labels: NDArray[Any]) -> np.dtype[Any]:
    """Return the type that a map is written in: uint8 where all labels are below 255, else uint16."""
    if labels.itemsize == 1 or not labels.size:
        return np.dtype(np.uint8)
    largest = max(int(labels[at].max()) for _, at in runs(whole(labels.shape), labels.shape, labels))
    return np.dtype(np.uint8 if largest < _ONE_BYTE else np.uint16)


def blocks(shape: Shape3, size: Shape3) -> Iterator[Box]:
    """Cut a volume into blocks of a size."""
    for corner in product(*(range(0, extent, step) for extent, step in zip(shape, size, strict=True))):
        z, y, x = (slice(c, min(c + step, n)) for c, step, n in zip(corner, size, shape, strict=True))
        yield z, y, x


def block_of(labels: NDArray[Any], box: Box, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a copy of a block of a map, of which nothing stays mapped."""
    block = np.array(labels[box], dtype, order="C")
    give_back(labels)
    return block
