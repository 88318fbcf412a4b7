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
from nnunet_lowmem.types import Attempt, SlabLimits, once
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


class SlabLabeller:
    """Turns slabs, in order, into a label map.

    Parameters
    ----------
    tables : 3 AxisTable
        From network space to the cropped grid.
    how : Labelling
    labels : uint8 or uint16, shape of the cropped grid, any strides
        Written.

    Attributes
    ----------
    done, written : int
        Output planes that are labelled, and those of which the labels are there: others are on their way from a device.
    """

    def __init__(self, tables: tuple[AxisTable, ...], how: Labelling, labels: NDArray[Any]) -> None:
        self._tables = tables
        self._how = how
        self._labels = labels
        self._outbox: HostBuffer | None = None
        self._arriving: tuple[torch.Tensor, NDArray[Any]] | None = None
        self._axis = 0
        self.done = self.written = 0

    def add(self, slab: LogitsSlab) -> None:
        """Label every output plane whose neighbours are now final."""
        self._axis = slab.axis
        table = self._tables[slab.axis]
        ready = table.ready(slab.stop)
        while self.done < ready:
            self._how.attempt(lambda: self._label_part(slab, ready))

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
        labels = self._labels[(*[slice(None)] * slab.axis, slice(self.done, ready))]
        if slab.buffer.device.type == "cpu":
            self._write_arrived()  # of a window that has been moved from a device meanwhile
            self._label_on_cpu(part, tables, labels)
            self.written = ready
        else:
            winners = cells_torch.winners(part.logits, tables, self._how.rule.ranked, limits.block_bytes)
            self._write_arrived()
            self._outbox = self._outbox or HostBuffer(slab.buffer.device)
            self._arriving = self._outbox.receive(winners), labels
        self.done = ready

    def finish(self) -> None:
        """Write what is still on its way from a device, and check that nothing is missing."""
        self._write_arrived()
        assert self.done == self._labels.shape[self._axis], "slabs ended before the last plane"

    def _write_arrived(self) -> None:
        """Write the labels of the slab before, whose winners have crossed over while the window moved on."""
        if self._arriving is not None and self._outbox is not None:
            self._outbox.wait()
            for winners, plane in zip(*self._arriving, strict=True):
                plane[...] = self._how.rule.values[winners.numpy()]
            self._arriving, self.written = None, self.done

    def _label_on_cpu(self, part: LogitsSlab, tables: tuple[AxisTable, ...], labels: NDArray[Any]) -> None:
        rule, run = self._how.rule, self._how.threads.run
        box = (part.buffer.numpy().view(np.uint16), part.origin)
        survey = tuple(np.empty(part.shape, dtype) for dtype in (np.uint16, np.int8, np.int8))
        look = cells_cpu.survey_heads if rule.ranked else cells_cpu.survey_regions
        run(look, part.shape[0] * part.shape[1], *box, survey)
        interpolates = any(table.interpolates for table in tables)
        arguments = (*flat_tables(tables), tables[2].cells, interpolates, rule.ranked, rule.values, labels)
        run(cells_cpu.label_rows, labels.shape[0] * labels.shape[1], *box, survey, *arguments)
