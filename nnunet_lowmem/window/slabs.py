"""Slabs of final logits: what the window hands on, and what becomes of those that nobody labels as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from nnunet_lowmem.types import Shape3, shape3
from nnunet_lowmem.volumes.planes import PlaneStore


@dataclass
class LogitsSlab:
    """Final logits of some planes, as a box of a larger buffer that stays alive until the next slab is asked for.

    Attributes
    ----------
    axis : int
        The axis along which slabs follow each other.
    start, stop : int
        The planes that are new, in network space.
    first : int
        First plane that the box holds: `start`, or ``start - 1`` where the last plane of the slab before is kept.
    buffer : half tensor, shape (heads, a, b, c), contiguous
        Another one once the window has moved.
    origin : int, 3
        Buffer position of (first plane, 0, 0) or its permutation for another `axis`.
    shape : int, 3
        Extent of the box, halo included.
    give_back : callable
        Lets go what of the buffer is mapped; called now and then by whoever reads it.
    """

    axis: int
    start: int
    stop: int
    first: int
    buffer: torch.Tensor
    origin: Shape3
    shape: Shape3
    give_back: Callable[[], object] = object

    def part(self, first: int, stop: int) -> LogitsSlab:
        """Return the planes [first, stop) of the box, all of them new."""
        origin, shape = list(self.origin), list(self.shape)
        origin[self.axis] += first - self.first
        shape[self.axis] = stop - first
        return LogitsSlab(self.axis, first, stop, first, self.buffer, shape3(origin), shape3(shape))

    @property
    def logits(self) -> torch.Tensor:
        """View of the new planes without the halo, shape (heads, z, y, x)."""
        view = self.buffer
        for axis in range(3):
            view = view.narrow(axis + 1, self.origin[axis], self.shape[axis])
        return view.narrow(self.axis + 1, self.start - self.first, self.stop - self.start)


def whole_slab(logits: torch.Tensor) -> LogitsSlab:
    """Take logits that exist as a whole, half and contiguous, shape (heads, z, y, x), for the only slab of a case."""
    shape = shape3(logits.shape[1:])
    return LogitsSlab(axis=0, start=0, stop=shape[0], first=0, buffer=logits, origin=(0, 0, 0), shape=shape)


def store_slabs(slabs: Iterable[LogitsSlab], store: PlaneStore) -> None:
    """Put all final planes into `store`."""
    for slab in slabs:
        logits = slab.logits
        for position in range(slab.start, slab.stop):
            store.write_plane(position, logits.select(slab.axis + 1, position - slab.start))
            slab.give_back()


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
