"""Labels of a case in the grids of later stages of a cascade, found along with its segmentation.

Stock resamples all logits to each of these grids. Here the slabs pass by on their way to the segmentation, and a grid
whose resampling is known as tables is labelled as they come. For any other the logits are spilled, and labelled head by
head once the last slab has passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nnunet_lowmem.labels.heads import ResampledHeads, empty_label_map, label_heads
from nnunet_lowmem.labels.labeller import Labelling, LabelMap, SlabLabeller
from nnunet_lowmem.labels.probabilities import label_and_export
from nnunet_lowmem.labels.rules import CaseGeometry, LogitsResampling, streams, takes_softmax
from nnunet_lowmem.types import NextStage
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window.slabs import LogitsSlab, store_slabs


@dataclass(frozen=True)
class Target:
    """A next stage, and how logits get into its grid."""

    stage: NextStage
    geometry: CaseGeometry
    resampling: LogitsResampling


def label_along(
    slabs: Iterator[LogitsSlab],
    wanted: Sequence[Target],
    how: Labelling,
    folder: Path,
) -> Iterator[LogitsSlab]:
    """Pass slabs on as they are; when they have ended, the labels of every target are written."""
    with ExitStack() as stack:
        makers: list[_Streamed | _Stored] = []
        for target in wanted:
            streamed = streams(target.resampling, how.rule)
            makers.append(_Streamed(target, how) if streamed else _Stored(target, how, folder, stack))
        for slab in slabs:
            for maker in makers:
                maker.add(slab)
            yield slab
        for target, maker in zip(wanted, makers, strict=True):
            target.stage.write(maker.finish())


class _Streamed:
    """Labels slab by slab."""

    def __init__(self, target: Target, how: Labelling) -> None:
        assert target.resampling.tables is not None
        self._labels, _ = empty_label_map(target.geometry, how.rule)
        self._labeller = SlabLabeller(target.resampling.tables, how, LabelMap(self._labels), target.geometry.crop)
        self.add = self._labeller.add

    def finish(self) -> NDArray[Any]:
        self._labeller.finish()
        return self._labels


class _Stored:
    """Spills the slabs, and labels head by head."""

    def __init__(self, target: Target, how: Labelling, folder: Path, stack: ExitStack) -> None:
        self._target, self._how, self._folder, self._stack = target, how, folder, stack
        self._store: PlaneStore | None = None

    def add(self, slab: LogitsSlab) -> None:
        if self._store is None:
            shape = self._target.geometry.network_shape
            store = PlaneStore(slab.buffer.shape[0], shape, slab.axis, self._folder)
            self._store = self._stack.enter_context(store)
        store_slabs([slab], self._store)

    def finish(self) -> NDArray[Any]:
        assert self._store is not None, "a grid has at least one tile"
        geometry = self._target.geometry
        heads = ResampledHeads(self._store, self._target.resampling, geometry.cropped_shape, self._how.threads)
        if takes_softmax(self._how.rule):
            return label_and_export(heads, geometry, self._how.rule, None)
        return label_heads(heads, geometry, self._how.rule)
