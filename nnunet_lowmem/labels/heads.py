"""From slabs of logits to the label map in the original grid, axes of the network; never all heads on that grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.labels import cells_cpu
from nnunet_lowmem.labels.labeller import Labelling, LabelMap, SlabLabeller
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.labels.resampling import flat_tables
from nnunet_lowmem.labels.rules import HEADS_PER_CALL, CaseGeometry, LabelRule, LogitsResampling
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Box, Shape3
from nnunet_lowmem.volumes.mapped import spilled_array
from nnunet_lowmem.volumes.planes import PlaneStore
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
    crop: Box,
    how: Labelling,
    clock: StageClock,
    keeper: Keeper,
    make: Callable[[], LabelMap],
    more: bool = False,
) -> NDArray[Any] | None:
    """Label slabs as they come; needs a resampling that is known as tables.

    Parameters
    ----------
    slabs : iterable of LogitsSlab
        Of a box of the case, or of all of it.
    resampling : LogitsResampling
    crop : 3 slices
        Where in the label map that box lies.
    how : Labelling
    clock : StageClock
    keeper : Keeper
        Gives the map that is written, and is told of what is final.
    make : callable
        Returns a new map for the keeper.
    more : bool
        Other boxes of the case follow.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network; None where nothing is kept
    """
    assert resampling.tables is not None
    whole, told = keeper.label_map(make), 0
    labeller = SlabLabeller(resampling.tables, how, whole, crop)

    def tell(axis: int, ends: bool) -> None:
        nonlocal told
        final = list(crop)
        final[axis] = slice(crop[axis].start + told, crop[axis].start + labeller.written)
        told = labeller.written
        keeper.labelled(whole, (final[0], final[1], final[2]), ends)

    for slab in slabs:
        with clock.stage("export", crop[slab.axis].stop - crop[slab.axis].start):
            done = labeller.done
            labeller.add(slab)
            clock.advance(labeller.done - done)
        tell(slab.axis, ends=False)
    labeller.finish()
    if labeller.written:
        tell(slab.axis, ends=more)
    return whole.kept


def plain(result: Any) -> Any:
    """Return arrays as what clients expect of stock, numpy's own class, where they lie in mapped files."""
    if isinstance(result, tuple):
        return tuple(map(plain, result))
    return np.asarray(result) if isinstance(result, np.memmap) else result


class Keeper:
    """Holds the label map of a case, which may be labelled box after box; whoever keeps it for later overrides.

    Attributes
    ----------
    found : list of boxes
        What is labelled to begin with, axes of the network.
    """

    def __init__(self) -> None:
        self.found: list[Box] = []
        self._labels: LabelMap | None = None

    def label_map(self, make: Callable[[], LabelMap]) -> LabelMap:
        """Return the map that is written, which `make` makes when it is asked for first."""
        if self._labels is None:
            self._labels = make()
        return self._labels

    def counts(self, part: Part, columns: Shape3, seconds: float) -> Shape3:
        """Return into how many boxes a part that takes `seconds` is cut along each axis, if there are these columns."""
        return columns

    def labelled(self, labels: LabelMap, box: Box, ends: bool = False) -> None:
        """Take note: a box is final; `ends` where others follow, each of which is final at its end."""

    def ended(self) -> None:
        """Take note: nothing more is labelled."""


class HeadContest:
    """Labels of voxels while one head after the other is shown: a running argmax.

    Parameters
    ----------
    rule : LabelRule
        Ranked: the largest value wins, the lowest head on a tie. Regions: the last one above 0.5.
    labels : integers, shape (z, y, x), any strides
        Written; of regions 0 at first.

    Attributes
    ----------
    largest : array, shape (z, y, x), or None
        Of the values that were shown; None before the first head, and of regions.
    """

    def __init__(self, rule: LabelRule, labels: NDArray[Any]) -> None:
        self.largest: NDArray[Any] | None = None
        self._rule, self._labels, self._head = rule, labels, 0

    def show(self, planes: Iterable[NDArray[Any]]) -> None:
        """Let the next head compete: logits or, of regions, probabilities, one plane (y, x) after the other."""
        label = self._rule.values[self._head + (not self._rule.ranked)].astype(self._labels.dtype)
        for z, plane in enumerate(planes):
            if not self._rule.ranked:
                np.copyto(self._labels[z], label, where=plane > 0.5)
                continue
            if self.largest is None:
                self.largest = np.empty(self._labels.shape, plane.dtype)
            better: Any = self._head == 0 or plane > self.largest[z]
            np.copyto(self.largest[z], plane, where=better)
            np.copyto(self._labels[z], label, where=better)
        self._head += 1


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
    contest = HeadContest(rule, cropped)
    for logits in heads:
        contest.show(logits if rule.ranked else map(sigmoid, logits))
    return whole


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return stock's probabilities of a region, float32, whatever the type of the logits."""
    return torch.sigmoid(torch.from_numpy(logits).float()).numpy()


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
    on_head : callable
        Called when a head has been used.
    """

    def __init__(
        self,
        store: PlaneStore,
        resampling: LogitsResampling,
        shape: Shape3,
        threads: RowThreads,
        on_head: Callable[[], object] = int,
    ) -> None:
        self.heads = store.heads
        self._store = store
        self._resampling = resampling
        self._shape = shape
        self._threads = threads
        self._on_head = on_head

    def __iter__(self) -> Iterator[NDArray[Any]]:
        group = 1 if self._resampling.tables is not None else HEADS_PER_CALL
        for start in range(0, self.heads, group):
            logits = self._store.read_heads(start, min(start + group, self.heads))
            for head in self._resample(logits):
                yield head
                self._on_head()

    def _resample(self, logits: NDArray[np.float16]) -> Iterable[NDArray[Any]]:
        tables = self._resampling.tables
        if tables is None:
            resampled = self._resampling.function(logits, *self._resampling.arguments)
            return resampled.cpu().numpy() if isinstance(resampled, torch.Tensor) else resampled
        out = np.empty(self._shape, np.uint16)
        rows = self._shape[0] * self._shape[1]
        self._threads.run(cells_cpu.resample_rows, rows, logits.view(np.uint16), *flat_tables(tables), out)
        return [out.view(np.float16)]
