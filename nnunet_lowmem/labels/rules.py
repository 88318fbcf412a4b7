"""How logits become labels, as plain data: which head wins, in which grid, and by which resampling.

Nothing here knows nnU-Net: whoever reads its objects (`nnunet.adapter`) makes these of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.labels.resampling import AxisTable, resampling_tables
from nnunet_lowmem.types import Shape3

#: Heads per call of a resampling function whose rule is not known; torch's resampling gives stock's bits in eights.
HEADS_PER_CALL = 8


@dataclass(frozen=True)
class LabelRule:
    """How heads become label values.

    Attributes
    ----------
    ranked : bool
        True: the largest head wins, the lowest index on a tie. False: regions, the last one whose sigmoid exceeds 0.5.
    values : uint16, shape (heads + 1,)
        Label value of each winner; for regions entry 0 is the background.
    dtype : numpy dtype
        Of the label map; larger values wrap as in stock nnU-Net.
    by_softmax : bool
        The largest softmax wins, rounded as stock rounds it, and not the largest logit: nnU-Net 2.5.
    """

    ranked: bool
    values: NDArray[np.uint16]
    dtype: np.dtype[Any]
    by_softmax: bool = False

    @property
    def labels(self) -> NDArray[Any]:
        """All that a label map may hold, in its type."""
        return self.values[: -1 if self.ranked else None].astype(self.dtype)


@dataclass(frozen=True)
class CaseGeometry:
    """Shapes of one case, axis order of the network.

    Attributes
    ----------
    network_shape, cropped_shape, original_shape : int, 3
    crop : 3 slices
        Where the cropped box lies in the original grid.
    """

    network_shape: Shape3
    cropped_shape: Shape3
    original_shape: Shape3
    crop: tuple[slice, slice, slice]

    @classmethod
    def uncropped(cls, network_shape: Shape3, shape: Shape3) -> CaseGeometry:
        """Shapes of a case of which nothing is cropped."""
        z, y, x = shape
        return cls(network_shape, shape, shape, (slice(0, z), slice(0, y), slice(0, x)))


@dataclass(frozen=True)
class LogitsResampling:
    """How logits get from network space to the cropped grid.

    Attributes
    ----------
    function : callable
        nnU-Net's configured function: (logits, shape, current spacing, new spacing) -> logits.
    arguments : tuple
        Its arguments after the logits.
    tables : 3 AxisTable, or None
        The same as tables, where the function is the default one with order 1; None where it must be called.
    per_head : bool
        Whether it treats heads one by one, as nnU-Net's own do; else it must be called with all of them.
    """

    function: Any
    arguments: tuple[Any, ...]
    tables: tuple[AxisTable, ...] | None
    per_head: bool = True

    def to_same_grid(self, shape: Shape3) -> LogitsResampling:
        """Return one that changes nothing, whatever the function would do where the shape stays."""
        return replace(self, tables=resampling_tables(shape, shape, None), per_head=True)


def takes_softmax(rule: LabelRule | None, probabilities: bool = False) -> bool:
    """Whether stock decides by probabilities where this does."""
    return probabilities or (rule is not None and rule.by_softmax)


def streams(resampling: LogitsResampling, rule: LabelRule | None, probabilities: bool = False) -> bool:
    """Whether labels can be found slab by slab, no head being needed as a whole."""
    known = rule is not None and resampling.tables is not None and resampling.per_head
    return known and not takes_softmax(rule, probabilities)
