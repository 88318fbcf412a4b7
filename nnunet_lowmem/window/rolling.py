"""The rolling window: tile logits in, slabs of final logits out, one patch deep whatever the length of the scan.

Tiles come in stock nnU-Net's order, axis by axis. After a row of tiles nothing more is added to the planes before the
next row, so they are final: they are divided, handed on, and the window moves. Sums are rounded to half after every
tile exactly as stock's full-size accumulator rounds them, since each voxel sees the same additions in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.errors import NetworkOutputError, NonFiniteLogitsError
from nnunet_lowmem.network.fast_layers import bits_of
from nnunet_lowmem.network.fast_network import Head
from nnunet_lowmem.network.tile_memory import storage_users
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Attempt, Place, Shape3, once, shape3
from nnunet_lowmem.volumes.mapped import give_back, spilled_array, touched_page_by_page
from nnunet_lowmem.volumes.planes import PlaneStore
from nnunet_lowmem.window import kernels
from nnunet_lowmem.window.host_buffer import HostBuffer
from nnunet_lowmem.window.non_finite import where_not_finite
from nnunet_lowmem.window.slabs import LogitsSlab
from nnunet_lowmem.window.tiles import PredictedTiles
from nnunet_lowmem.window.tiling import TileGrid

logger = logging.getLogger(__name__)

# of sums on disk, at a time; what is mapped counts for whoever goes by the resident set
_MAPPED_BYTES = 2**25


class RollingWindow:
    """Half-precision accumulator over the planes that still receive tiles.

    Buffer plane 0 along the roll axis keeps the last final plane (resampling needs it as a neighbour); the window
    itself starts at buffer plane 1.

    Parameters
    ----------
    grid : TileGrid
    heads : int
    importance : half tensor, shape of a tile
        Weight of each tile voxel, on the device of the window.
    threads : RowThreads
    folder : Path or None
        Where to spill the sums; None keeps them on the device of `importance`.
    attempt : Attempt
        Calls what takes memory.
    """

    def __init__(
        self,
        grid: TileGrid,
        heads: int,
        importance: torch.Tensor,
        threads: RowThreads,
        folder: Path | None = None,
        attempt: Attempt = once,
    ) -> None:
        near = Place.RAM if importance.device.type == "cpu" else Place.VRAM
        self._place = near if folder is None else Place.DISK
        self._grid = grid
        self._axis = grid.roll_axis
        self._threads = threads
        self.attempt = attempt
        self._head: Head | None = None
        self._told_of_broadcast = False
        self._slab_made: LogitsSlab | None = None
        self._inbox: HostBuffer | None = None
        self._arriving: tuple[torch.Tensor, Shape3] | None = None
        self._set_importance(importance)
        shape = list(grid.padded_shape)
        shape[self._axis] = grid.tile_shape[self._axis] + 1
        self._give_back: Callable[[], object] = object
        if folder is None:
            self._buffer = torch.zeros((heads, *shape), dtype=torch.half, device=importance.device)
        else:
            mapped = _on_disk((heads, *shape), folder)
            self._buffer, self._give_back = torch.from_numpy(mapped), partial(give_back, mapped)
        self._weight_sum = torch.zeros(shape, dtype=torch.half, device=importance.device)
        self._position = 0
        self._touched: tuple[int, ...] = ()

    def _set_importance(self, importance: torch.Tensor) -> None:
        self._importance = importance
        self._importance_single = importance.float().contiguous().numpy() if importance.device.type == "cpu" else None

    def move_to(self, place: Place, folder: Path) -> None:
        """Take all sums off the device, or out of RAM into a file of `folder`; the slab that is out moves along."""
        if place is self._place:
            return
        self._place = place
        shape = tuple(self._buffer.shape)
        array = _on_disk(shape, folder) if place is Place.DISK else np.empty(shape, np.float16)
        self._give_back = partial(give_back, array) if place is Place.DISK else object
        with torch.inference_mode(False):  # what is made in inference mode could not be changed outside of it
            buffer = torch.from_numpy(array)
            buffer.copy_(self._buffer)
            self._weight_sum = self._weight_sum.cpu()
            self._set_importance(self._importance.cpu())
        self._buffer = buffer
        if self._slab_made is not None:
            self._slab_made.buffer, self._slab_made.give_back = buffer, self._give_back
        self._give_back()

    def _some(self, planes: int, first: int = 0) -> Iterator[range]:
        """Give planes of the sums, from the `first` on, as many at a time as may be mapped if they are on disk."""
        plane_bytes = self._buffer.nbytes // self._buffer.shape[self._axis + 1]
        count = planes if self._place is not Place.DISK else max(1, _MAPPED_BYTES // plane_bytes)
        for start in range(first, first + planes, max(1, count)):
            yield range(start, min(start + count, first + planes))
            self._give_back()

    def _empty(self, planes: int, first: int) -> None:
        for some in self._some(planes, first):
            self._buffer.narrow(self._axis + 1, some.start, len(some)).zero_()
        self._weight_sum.narrow(self._axis, first, planes).zero_()

    @property
    def device(self) -> torch.device:
        """Where the sums are kept."""
        return self._buffer.device

    def restart(self, head: Head | None = None) -> None:
        """Begin again at plane 0 with empty sums; `head` makes logits of what is added, if it is none."""
        self._head = head
        self._empty(self._weight_sum.shape[self._axis], 0)
        self._arriving = None
        self._position = 0

    def add(self, logits: torch.Tensor, start: Shape3) -> None:
        """Add one tile's logits, shape (heads, *patch_size), or with a head its features; may change them.

        Logits that somebody else holds (a hook that collects them, a network that keeps its output) are multiplied by
        their weights in place: stock does that to all.

        Logits that come from another device are on their way while the next tile is computed, and are added then.

        Raises
        ------
        NetworkOutputError
            If they are of another shape, or no floating-point numbers: a kernel would read or write beside them.
        """
        is_held = isinstance(logits, torch.Tensor) and (logits._base is not None or storage_users(logits) != 1)
        logits = self._checked(logits, start)
        self._add_arrived()
        if logits.device == self.device:
            self._add_here(logits, start, is_held)
            return
        inbox = self._inbox = self._inbox or HostBuffer(logits.device)
        self._arriving = self.attempt(lambda: inbox.receive(logits)), start

    def _checked(self, logits: Any, start: Shape3) -> torch.Tensor:
        """Return the output for a tile with three axes behind the heads.

        Stock adds it by broadcasting: one without heads is added to all of them, which is done here, and told.
        """
        heads = self._buffer.shape[0] if self._head is None else self._head.weights.shape[1]
        shape, start = self._grid.tile_shape, self._grid.in_whole(start)
        due = (heads, *shape[1:]) if self._grid.flat else (heads, *shape)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            raise NetworkOutputError(
                f"the network's output for the tile at {start} is {_kind(logits)}; logits of shape {due} in floating "
                "point are needed"
            )
        given = tuple(logits.shape)
        if given != due:
            if self._head is not None or given not in (due[1:], (1, *due[1:])):
                raise NetworkOutputError(
                    f"the network's output for the tile at {start} has shape {given} without its batch axis, {due} is "
                    "needed: as many heads as the labels ask for, and the patch's size"
                )
            if not self._told_of_broadcast:
                logger.warning("the network's output has shape %s where %s is due: every head gets it", given, due)
                self._told_of_broadcast = True
            logits = logits.expand(due).clone()
        tile: torch.Tensor = logits[:, None] if self._grid.flat else logits
        return tile.detach()

    def _add_arrived(self) -> None:
        if self._arriving is not None and self._inbox is not None:
            self._inbox.wait()
            self._add_here(*self._arriving)
            self._arriving = None

    def _add_here(self, logits: torch.Tensor, start: Shape3, is_held: bool = False) -> None:
        """Add logits that are where the sums are.

        The dtype of the tile decides the rounding, as in stock: float32 tiles are multiplied and added in float32 and
        rounded once, half tiles are rounded after the product and after the sum.
        """
        head, origin = self._head, list(start)
        origin[self._axis] += 1 - self._position
        if start[:2] != self._touched:  # tiles beside each other share pages
            self._give_back()
            self._touched = start[:2]
        inside = zip(origin, self._grid.tile_shape, self._weight_sum.shape, strict=True)
        assert all(first >= 0 and first + size <= end for first, size, end in inside), "tile outside the window"
        if head is not None:
            features = logits.movedim(0, -1).contiguous()
            rounded = features.dtype == torch.bfloat16
            array = bits_of(features) if rounded else features.numpy()
            kernel = kernels.accumulate_head_of_bits if rounded else kernels.accumulate_head
            parts = array, head.weights, head.bias, self._importance_single
            self._threads.run(kernel, len(array), _bits(self._buffer), *parts, tuple(origin))
        elif logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous() and not is_held:
            planes, tile = logits.shape[0] * logits.shape[1], (logits.numpy(), self._importance_single)
            self._threads.run(kernels.accumulate, planes, _bits(self._buffer), *tile, tuple(origin))
        else:  # halves too: torch's two passes over them were measured to be faster than a kernel's one
            logits *= self._importance
            self._box(self._buffer, origin).add_(logits)
        self._box(self._weight_sum, origin).add_(self._importance)

    def skip(self, start: Shape3) -> None:
        """Leave out a tile that no voxel asks for; what it would have covered is divided all the same."""
        origin = list(start)
        origin[self._axis] += 1 - self._position
        self._box(self._weight_sum, origin).add_(self._importance)

    def _box(self, tensor: torch.Tensor, origin: Sequence[int]) -> torch.Tensor:
        first = tensor.ndim - 3
        for axis in range(3):
            tensor = tensor.narrow(axis + first, origin[axis], self._grid.tile_shape[axis])
        return tensor

    def finish(self, stop: int) -> LogitsSlab | None:
        """Divide the planes before `stop` by their weights and return those that are asked for, if any.

        Raises
        ------
        NonFiniteLogitsError
            If a logit is infinite or NaN.
        """
        self._add_arrived()
        start = self._position
        if not (self._divide_on_cpu(stop) if self.device.type == "cpu" else self._divide_on_device(stop)):
            position = next(position for position in range(start, stop) if not self._is_finite(position))
            raise NonFiniteLogitsError(where_not_finite(self._final_plane(position), self._grid, position))
        return self._slab(start, stop)

    def _divide_on_cpu(self, stop: int) -> bool:
        """Divide the planes before `stop`, and tell whether all their logits are finite."""
        origin, shape, all_finite = [0, 0, 0], list(self._weight_sum.shape), True
        for some in self._some(stop - self._position, 1):
            origin[self._axis], shape[self._axis] = some.start, len(some)
            planes = self._buffer.shape[0] * shape[0]
            finite = np.empty(planes, np.bool_)
            arguments = (_bits(self._buffer), _bits(self._weight_sum), tuple(origin), tuple(shape), finite)
            self._threads.run(kernels.divide, planes, *arguments)
            all_finite = all_finite and bool(finite.all())
        return all_finite

    def _divide_on_device(self, stop: int) -> bool:
        finite = []
        for position in range(self._position, stop):
            self._final_plane(position).div_(self._weight_sum.select(self._axis, position + 1 - self._position))
            finite.append(self.attempt(partial(self._is_finite, position)))
        # one answer for all planes: a device is waited for once
        return all(torch.stack([answer.to(self.device) for answer in finite]).tolist())

    def _final_plane(self, position: int) -> torch.Tensor:
        return self._buffer.select(self._axis + 1, position + 1 - self._position)

    def _is_finite(self, position: int) -> torch.Tensor:
        return torch.isfinite(self._final_plane(position)).all()

    def _slab(self, start: int, stop: int) -> LogitsSlab | None:
        """Cut off the padding, and what the tiles of a box hold around it."""
        grid, axis = self._grid, self._axis
        padding = grid.padding[axis]
        first, last = max(start, padding), min(stop, padding + grid.image_shape[axis])
        if first >= last:
            return None
        halo = 1 if first > padding else 0
        origin, shape = list(grid.padding), list(grid.image_shape)
        origin[axis], shape[axis] = first - halo - start + 1, last - first + halo
        self._slab_made = LogitsSlab(
            axis=axis,
            start=first - padding,
            stop=last - padding,
            first=first - halo - padding,
            buffer=self._buffer,
            origin=shape3(origin),
            shape=shape3(shape),
            give_back=self._give_back,
        )
        return self._slab_made

    def advance(self, stop: int) -> None:
        """Move the window so that it starts at plane `stop`."""
        shift = stop - self._position
        if shift == 0:
            return
        left = self._weight_sum.shape[self._axis] - shift
        for some in self._some(left):
            for plane in some:
                for tensor, axis in ((self._buffer, self._axis + 1), (self._weight_sum, self._axis)):
                    tensor.select(axis, plane).copy_(tensor.select(axis, plane + shift))
        self._empty(shift, left)
        self._position = stop


def _on_disk(shape: tuple[int, ...], folder: Path) -> NDArray[Any]:
    array = spilled_array(shape, np.dtype(np.float16), folder)
    touched_page_by_page(array)  # tiles go into it
    return array


def _bits(halves: torch.Tensor) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = halves.numpy().view(np.uint16)
    return bits


def _kind(output: Any) -> str:
    return f"of dtype {output.dtype}" if isinstance(output, torch.Tensor) else f"no tensor but {type(output).__name__}"


def roll(
    tiles: PredictedTiles, grid: TileGrid, window: RollingWindow, on_tile: Callable[[], object], head: Head | None
) -> Generator[LogitsSlab, None, None]:
    """Add all tiles of a pass and yield slabs of final logits; tiles are features where there is a `head`.

    A slab is valid until the next one is asked for; its planes may be changed in place.
    """
    window.restart(head)
    for row_start, final in grid.rows():
        with torch.inference_mode():
            for start in grid.row_tiles(row_start):
                if not grid.is_needed(start):
                    window.skip(start)
                    continue
                window.add(tiles.next(window.attempt), start)
                on_tile()
        if final > row_start:
            if (slab := window.finish(final)) is not None:
                yield slab
            window.advance(final)


def average_folds(
    passes: Iterable[Iterator[LogitsSlab]], folds: int, store: PlaneStore | None, first_plane: int = 0
) -> Generator[LogitsSlab, None, None]:
    """Yield the slabs of the mean over folds: each fold's final logits are added in half, then divided in float32.

    Parameters
    ----------
    passes : iterable of slab iterators
        One per fold; the next is started when the one before has ended.
    folds : int
    store : PlaneStore or None
        Holds the running sum between folds; None for a single fold.
    first_plane : int
        Of a box: where its first plane lies in the whole image.

    Raises
    ------
    NonFiniteLogitsError
        If a sum over folds is beyond half precision: nobody could tell its labels.
    """
    for fold, slabs in enumerate(passes):
        for slab in slabs:
            if store is not None:
                _join_sum(slab, store, fold, folds, first_plane)
            if fold == folds - 1:
                yield slab


def _join_sum(slab: LogitsSlab, store: PlaneStore, fold: int, folds: int, first_plane: int) -> None:
    logits = slab.logits
    finite = []
    for position in range(slab.start, slab.stop):
        plane = logits.select(slab.axis + 1, position - slab.start)
        if fold > 0:
            # the sum so far is the left operand, as in stock; half addition commutes, so the order does not matter
            plane.add_(store.read_plane(position).to(plane.device))
        if fold < folds - 1:
            store.write_plane(position, plane)
        else:
            plane.div_(folds)
            finite.append(torch.isfinite(plane).all())
        slab.give_back()
    # what was infinite once stays so, or becomes NaN: the last fold tells of all
    if finite and not all(answers := torch.stack(finite).tolist()):
        raise NonFiniteLogitsError(
            f"the half-precision sum of the logits of {folds} folds is infinite in plane "
            f"{first_plane + slab.start + answers.index(False)} of axis {slab.axis} (network space): it may not exceed "
            f"65504, so the mean over folds not {65504 // folds}. Predict the folds one by one, or check the image for "
            "values far out of the ordinary"
        )
