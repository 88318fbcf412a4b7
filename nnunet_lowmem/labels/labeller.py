"""Resample and decide in one step: slabs of logits in network space become labels in the cropped grid.

Most of a volume lies in network-grid cells whose eight corners agree; linear interpolation is a convex combination, so
every original voxel in such a cell has that label and no head is interpolated. Only boundary cells are, and only for
heads that can win. Rounding to half can create a tie that a *lower* head would win; a cell counts as uniform only if at
every corner the winner exceeds each lower head by more than one unit in the last place (`cells_cpu.survey_heads`).

CPU tensors go through the compiled kernels, all others through torch operations on their device; both give the bits of
the slow twin in ``tests/support/reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.labels import cells_cpu, cells_torch
from nnunet_lowmem.labels.resampling import AxisTable, flat_tables
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Attempt, Box, SlabLimits, once
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.window.host_buffer import HostBuffer
from nnunet_lowmem.window.slabs import LogitsSlab


@dataclass(frozen=True)
class Labelling:
    """How slabs are labelled.

    Attributes
    ----------
    rule : LabelRule
    threads : RowThreads
        For the compiled kernels.
    limits : callable
        Returns the `SlabLimits` of now; asked before every part.
    attempt : Attempt
        Calls what labels a part.
    """

    rule: LabelRule
    threads: RowThreads
    limits: Callable[[], SlabLimits] = SlabLimits
    attempt: Attempt = once


class LabelMap:
    """Labels of a case in the original grid, axes of the network, which come box after box; here they stay.

    Parameters
    ----------
    labels : uint8 or uint16, shape (z, y, x), any strides
        Zeros, written.
    """

    def __init__(self, labels: NDArray[Any]) -> None:
        self._labels = labels

    @property
    def kept(self) -> NDArray[Any] | None:
        """The map, where it is kept."""
        return self._labels

    def block(self, box: Box) -> NDArray[Any]:
        """Return where the labels of a box can be put, zeros so far."""
        return self._labels[box]

    def put(self, box: Box, values: NDArray[Any]) -> None:
        """Take the labels of a box, which may be in the block for it."""
        if not np.may_share_memory(values, self._labels):
            self._labels[box] = values
        give_back(self._labels)

    def read(self, box: Box) -> NDArray[Any]:
        """Return the labels of a box that were put."""
        return self._labels[box]


class SlabLabeller:
    """Turns slabs, in order, into a label map.

    Parameters
    ----------
    tables : 3 AxisTable
        From network space to the cropped grid.
    how : Labelling
    labels : LabelMap
    crop : 3 slices
        Where in the map the cropped grid lies.

    Attributes
    ----------
    done, written : int
        Output planes that are labelled, and those of which the labels are there: others are on their way from a device.
    """

    def __init__(self, tables: tuple[AxisTable, ...], how: Labelling, labels: LabelMap, crop: Box) -> None:
        self._tables = tables
        self._how = how
        self._labels, self._crop = labels, crop
        self._outbox: HostBuffer | None = None
        self._arriving: tuple[torch.Tensor, Box] | None = None
        # what is found, and to be put into the map: an attempt may be repeated, putting may not
        self._found: list[tuple[Box, NDArray[Any]]] = []
        self._axis = 0
        self.done = self.written = 0

    def add(self, slab: LogitsSlab) -> None:
        """Label every output plane whose neighbours are now final."""
        self._axis = slab.axis
        table = self._tables[slab.axis]
        ready = table.ready(slab.stop)
        while self.done < ready:
            self._how.attempt(lambda: self._label_part(slab, ready))
            self._put()
            slab.give_back()

    def _next_stop(self, table: AxisTable, ready: int, planes: int | None) -> int:
        """End of the output planes that are labelled together."""
        if planes is None:
            return ready
        within = int(np.searchsorted(table.high, int(table.low[self.done]) + planes))
        return min(ready, max(within, self.done + 1))

    def _label_part(self, slab: LogitsSlab, ready: int) -> None:
        table, limits = self._tables[slab.axis], self._how.limits()
        ready = self._next_stop(table, ready, limits.planes)
        first, last = int(table.low[self.done]), int(table.high[ready - 1])
        part = slab.part(first, last + 1)
        own = table.part(self.done, ready, first)
        tables = (*self._tables[: slab.axis], own, *self._tables[slab.axis + 1 :])
        box = self._box(self.done, ready)
        if slab.buffer.device.type == "cpu":
            self._write_arrived()  # of a window that has been moved from a device meanwhile
            labels = self._labels.block(box)
            self._label_on_cpu(part, tables, labels)
            self._found.append((box, labels))
        else:
            winners = cells_torch.winners(part.logits, tables, self._how.rule.ranked, limits.block_bytes)
            self._write_arrived()
            self._outbox = self._outbox or HostBuffer(slab.buffer.device)
            self._arriving = self._outbox.receive(winners), box
        self.done = ready

    def _box(self, start: int, stop: int) -> Box:
        """Return where in the map some planes of the cropped grid lie."""
        box = list(self._crop)
        first = box[self._axis].start
        box[self._axis] = slice(first + start, first + stop)
        return box[0], box[1], box[2]

    def finish(self) -> None:
        """Write what is still on its way from a device, and check that nothing is missing."""
        self._write_arrived()
        self._put()
        last = self._crop[self._axis]
        assert self.done == last.stop - last.start, "slabs ended before the last plane"

    def _write_arrived(self) -> None:
        """Look up the labels of the slab before, whose winners have crossed over while the window moved on."""
        if self._arriving is not None and self._outbox is not None:
            self._outbox.wait()
            winners, box = self._arriving
            labels = self._labels.block(box)
            for plane, found in zip(labels, winners, strict=True):
                plane[...] = self._how.rule.values[found.numpy()]
            self._found.append((box, labels))
            self._arriving = None

    def _put(self) -> None:
        """Put what was found into the map."""
        for box, labels in self._found:
            self._labels.put(box, labels)
            self.written = box[self._axis].stop - self._crop[self._axis].start
        self._found.clear()

    def _label_on_cpu(self, part: LogitsSlab, tables: tuple[AxisTable, ...], labels: NDArray[Any]) -> None:
        rule, run = self._how.rule, self._how.threads.run
        box = (part.buffer.numpy().view(np.uint16), part.origin)
        survey = tuple(np.empty(part.shape, dtype) for dtype in (np.uint16, np.int8, np.int8))
        look = cells_cpu.survey_heads if rule.ranked else cells_cpu.survey_regions
        run(look, part.shape[0] * part.shape[1], *box, survey)
        interpolates = any(table.interpolates for table in tables)
        arguments = (*flat_tables(tables), tables[2].cells, interpolates, rule.ranked, rule.values, labels)
        run(cells_cpu.label_rows, labels.shape[0] * labels.shape[1], *box, survey, *arguments)
