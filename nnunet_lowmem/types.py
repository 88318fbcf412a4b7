"""Plain data that rooms hand to each other; no torch, no nnU-Net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape3 = tuple[int, int, int]


@dataclass(frozen=True)
class PreprocessedCase:
    """One case as the network takes it.

    Attributes
    ----------
    image : ndarray of float32, shape (channels, z, y, x)
        In network space (transposed, cropped, normalised, resampled), bit-equal to stock nnU-Net's. May be backed by a
        file.
    previous_stage : ndarray of integers, shape (z, y, x), or None
        Labels of the previous stage of a cascade in network space, -1 outside the nonzero mask.
    properties : dict
        nnU-Net's own properties of the case (spacing, crop, shapes, what the writer needs). Read, never changed.
    """

    image: NDArray[np.float32]
    previous_stage: NDArray[np.integer[Any]] | None
    properties: dict[str, Any]
