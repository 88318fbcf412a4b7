"""From slabs of logits to the label map in the original grid, axes of the network; never all heads on that grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.labels import cells_cpu
from nnunet_lowmem.labels.labeller import SlabLabeller, SlabLimits
from nnunet_lowmem.labels.resampling import flat_tables
from nnunet_lowmem.labels.rules import HEADS_PER_CALL, CaseGeometry, LabelRule, LogitsResampling
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Attempt, Shape3, once
from nnunet_lowmem.volumes.planes import PlaneStore, spilled_array
from nnunet_lowmem.window.slabs import LogitsSlab


def empty_label_map(
    geometry: CaseGeometry, rule: LabelRule, folder: Path | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a map of zeros in the original grid, in a file of `folder` if one is given, and its cropped part."""
    shape = geometry.original_shape
    whole = np.zeros(shape, rule.dtype) if folder is None else spilled_array(shape, rule.dtype, folder)
    return whole, whole[geometry.crop]


def label_slabs(
    slabs: Iterable[LogitsSlab],
    resampling: LogitsResampling,
    geometry: CaseGeometry,
    rule: LabelRule,
    threads: RowThreads,
    clock: StageClock,
    limits: Callable[[], SlabLimits] = SlabLimits,
    folder: Path | None = None,
    attempt: Attempt = once,
) -> NDArray[Any]:
    """Label slabs as they come, into a file of `folder` if one is given; needs a resampling that is known as tables.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network
    """
    assert resampling.tables is not None
    whole, cropped = empty_label_map(geometry, rule, folder)
    labeller = SlabLabeller(resampling.tables, rule, cropped, threads, limits, attempt)
    for slab in slabs:
        with clock.stage("export", cropped.shape[slab.axis]):
            done = labeller.done
            labeller.add(slab)
            clock.advance(labeller.done - done)
    labeller.finish()
    return whole


def plain(result: Any) -> Any:
    """Return arrays as what clients expect of stock, numpy's own class, where they lie in mapped files."""
    if isinstance(result, tuple):
        return tuple(map(plain, result))
    return np.asarray(result) if isinstance(result, np.memmap) else result


def label_heads(heads: Iterable[NDArray[Any]], geometry: CaseGeometry, rule: LabelRule) -> NDArray[Any]:
    """Label head after head: for resampling functions that are not known as tables.

    Parameters
    ----------
    heads : iterable of arrays, shape (z, y, x)
        Logits in the cropped grid.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network
    """
    whole, cropped = empty_label_map(geometry, rule)
    best: NDArray[Any] | None = None
    for index, logits in enumerate(heads):
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


class ResampledHeads:
    """The heads of a store in the cropped grid, one after the other; may be iterated several times.

    A resampling that is known as tables is done by the compiled kernel, any other by the configured function, for a few
    heads per call.

    Parameters
    ----------
    store : PlaneStore
        All finished logits.
    resampling : LogitsResampling
    shape : int, 3
        Cropped grid.
    threads : RowThreads

    Attributes
    ----------
    on_head : callable
        Called when a head has been used.
    """

    def __init__(self, store: PlaneStore, resampling: LogitsResampling, shape: Shape3, threads: RowThreads) -> None:
        self.heads = store.heads
        self._store = store
        self._resampling = resampling
        self._shape = shape
        self._threads = threads
        self.on_head: Callable[[], object] = int

    def __iter__(self) -> Iterator[NDArray[Any]]:
        group = 1 if self._resampling.tables is not None else HEADS_PER_CALL
        for start in range(0, self.heads, group):
            logits = self._store.read_heads(start, min(start + group, self.heads))
            for head in self._resample(logits):
                yield head
                self.on_head()

    def _resample(self, logits: NDArray[np.float16]) -> Iterable[NDArray[Any]]:
        tables = self._resampling.tables
        if tables is None:
            resampled = self._resampling.function(logits, *self._resampling.arguments)
            return resampled.cpu().numpy() if isinstance(resampled, torch.Tensor) else resampled
        out = np.empty(self._shape, np.uint16)
        rows = self._shape[0] * self._shape[1]
        self._threads.run(cells_cpu.resample_rows, rows, logits.view(np.uint16), *flat_tables(tables), out)
        return [out.view(np.float16)]
