"""From slabs of logits to the label map in the original grid, and to files; never all heads on the original grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.clock import StageClock
from nnunet_lowmem.labelling import LabelRule, LogitsSlab, SlabLabeller
from nnunet_lowmem.nnunet_adapter import CaseGeometry, LogitsResampling
from nnunet_lowmem.spill import PlaneStore
from nnunet_lowmem.threads import RowThreads


def empty_label_map(geometry: CaseGeometry, rule: LabelRule) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a map of zeros in the original grid and the view of it that the cropped grid covers."""
    whole = np.zeros(geometry.original_shape, rule.dtype)
    return whole, whole[geometry.crop]


def label_slabs(
    slabs: Iterable[LogitsSlab],
    resampling: LogitsResampling,
    geometry: CaseGeometry,
    rule: LabelRule,
    threads: RowThreads,
    clock: StageClock,
) -> NDArray[Any]:
    """Label slabs as they come; needs a resampling that is known as tables.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network
    """
    assert resampling.tables is not None
    whole, cropped = empty_label_map(geometry, rule)
    labeller = SlabLabeller(resampling.tables, rule, cropped, threads)
    for slab in slabs:
        with clock.stage("export"):
            labeller.add(slab)
    labeller.finish()
    return whole


def store_slabs(slabs: Iterable[LogitsSlab], store: PlaneStore) -> None:
    """Put all final planes into `store`."""
    for slab in slabs:
        logits = slab.logits
        for position in range(slab.start, slab.stop):
            store.write_plane(position, logits.select(slab.axis + 1, position - slab.start))


def collect_slabs(slabs: Iterable[LogitsSlab], heads: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return all logits as one half tensor, shape (heads, z, y, x), on the device of the slabs.

    For callers that ask for logits; nothing else in this package holds them.
    """
    result: torch.Tensor | None = None
    for slab in slabs:
        if result is None:
            result = torch.empty((heads, *shape), dtype=torch.half, device=slab.buffer.device)
        result.narrow(slab.axis + 1, slab.start, slab.stop - slab.start).copy_(slab.logits)
    assert result is not None, "a grid has at least one tile"
    return result


def label_heads(heads: Iterator[tuple[int, NDArray[Any]]], geometry: CaseGeometry, rule: LabelRule) -> NDArray[Any]:
    """Label head after head: for resampling functions that are not known as tables.

    Parameters
    ----------
    heads : iterator of (index, logits of shape (z, y, x) in the cropped grid)
        In rising order.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network
    """
    whole, cropped = empty_label_map(geometry, rule)
    best: NDArray[Any] | None = None
    for index, logits in heads:
        if not rule.ranked:
            probability = torch.sigmoid(torch.from_numpy(logits).float()).numpy()
            np.copyto(cropped, rule.values[index + 1].astype(rule.dtype), where=probability > 0.5)
        elif best is None:
            best = logits.copy()
            cropped[...] = rule.values[index]
        else:
            better = logits > best
            np.copyto(best, logits, where=better)
            np.copyto(cropped, rule.values[index].astype(rule.dtype), where=better)
    return whole


def resample_heads(
    store: PlaneStore, heads: int, resampling: LogitsResampling, group: int
) -> Iterator[tuple[int, Any]]:
    """Yield each head in the cropped grid, resampled by the configured function, `group` heads per call."""
    for start in range(0, heads, group):
        stop = min(start + group, heads)
        logits = resampling.function(store.read_heads(start, stop), *resampling.arguments)
        for head in range(start, stop):
            values = logits[head - start]
            yield head, values.cpu().numpy() if isinstance(values, torch.Tensor) else values
