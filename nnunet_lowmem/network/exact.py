"""The network as stock runs it, bit for bit, without what costs time and changes nothing.

Denormal weights are zero, transposed convolutions put their channels first again in one pass, instance normalisation
behind a convolution is done in place, mirrored copies of what the network returns are added as they are, and of a
constant tile all mirrored copies are one pass. Nobody but torch and nnU-Net's own layers may take part: who watches the
network sees it run as stock does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import torch
from torch import nn

from nnunet_lowmem.network import kernels
from nnunet_lowmem.network.denormals import NormalWeights
from nnunet_lowmem.network.fast_layers import CONVOLUTIONS, LAST, NORMS, bits_of
from nnunet_lowmem.network.known import why_watched
from nnunet_lowmem.system.threads import RowThreads

logger = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class ExactNetwork:
    """How a network is run; `refresh` takes over the weights of a new fold that were loaded into `network`.

    Attributes
    ----------
    network : Module
        As it was given.
    body : Module
        A copy with the same weights.
    threads : RowThreads
        Of the kernels; whoever runs it opens and closes them.
    weights : NormalWeights
        Those that `body` shares with `network`.
    """

    network: nn.Module
    body: nn.Module
    threads: RowThreads
    weights: NormalWeights

    def refresh(self) -> None:
        """Take over the weights that `network` has now."""
        self.weights.refresh()

    @property
    def own_bytes(self) -> int:
        """Of the weights that are not the network's."""
        return self.weights.replaced_bytes

    def logits(self, tile: torch.Tensor, mirror_axes: Sequence[int], collapses: bool = True) -> torch.Tensor:
        """Return the mean of the network's output over all flips; axes count from 0. See `mirrored_mean`."""
        return mirrored_mean(self.body, tile, mirror_axes, self.threads, collapses)


def exact_network(network: nn.Module, threads: int) -> ExactNetwork | None:
    """Return how to run a network with stock's bits in less time; None where somebody would see it."""
    if why_watched(network):
        return None
    row_threads = RowThreads(threads)
    try:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        body = copy.deepcopy(network, shared).eval()
    except Exception as error:  # whatever a network holds that cannot be copied
        logger.debug("the network cannot be copied: %s: %s", type(error).__name__, error)
        return None
    weights = NormalWeights(network, body)  # which looks for layers where they are in the network
    for parent in list(body.modules()):
        _use_exact_layers(parent, row_threads)
    exact = ExactNetwork(network, body, row_threads, weights)
    exact.refresh()
    return exact


def _use_exact_layers(parent: nn.Module, threads: RowThreads) -> None:
    before: nn.Module | None = None
    for name, layer in list(parent.named_children()):
        if type(layer) in _TRANSPOSED:
            parent.add_module(name, _Transposed(layer, threads))
        elif type(layer) in NORMS and type(parent) is nn.Sequential and type(before) in CONVOLUTIONS:
            parent.add_module(name, _NormInPlace(layer))
        before = layer


class _Quick(nn.Module):
    """A layer that is run another way, with the same bits.

    The first time both ways are taken: where their bits differ, or where torch gives other strides, it is torch's from
    then on.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self._is_same: bool | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        is_usual = features.device.type == "cpu" and features.dtype == torch.float32 and len(features) == 1
        if self._is_same is False or not is_usual:
            return self.layer(features)  # type: ignore[no-any-return]  # torch's modules return anything
        if self._is_same is None:
            if constant_bits(features) is not None:  # of which all ways may make the same
                return self.layer(features)  # type: ignore[no-any-return]  # torch's modules return anything
            stocks: torch.Tensor = self.layer(features)
            ours = self._quickly(features) if stocks.is_contiguous() and stocks.dtype == torch.float32 else None
            self._is_same = ours is not None and torch.equal(ours.view(torch.int32), stocks.view(torch.int32))
            return stocks
        return self._quickly(features)

    def _quickly(self, features: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _NormInPlace(_Quick):
    """Instance normalisation of what a convolution in front of it returns and nobody else needs."""

    def _quickly(self, features: torch.Tensor) -> torch.Tensor:
        norm = self.layer
        if norm.track_running_stats or not features.is_contiguous():
            return norm(features)  # type: ignore[no-any-return]  # torch's modules return anything
        statistics = [torch.empty(0, dtype=features.dtype, device=features.device) for _ in range(2)]
        torch.ops.aten.native_batch_norm.out(
            features, norm.weight, norm.bias, None, None, True, 0.0, norm.eps,
            out=features, save_mean=statistics[0], save_invstd=statistics[1],
        )  # fmt: skip
        return features


class _Transposed(_Quick):
    """A transposed convolution whose output torch would put channels first element by element."""

    def __init__(self, layer: nn.Module, threads: RowThreads) -> None:
        super().__init__(layer)
        self._threads = threads

    def _quickly(self, features: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(features.contiguous(memory_format=LAST[features.ndim]))
        voxels = made.movedim(1, -1)[0]
        if not voxels.is_contiguous():
            return made.contiguous()
        out = torch.empty(made.shape, dtype=made.dtype, device=made.device)
        rows = voxels.flatten(0, -2).numpy()
        self._threads.run(kernels.channels_first, -(-len(rows) // kernels.BLOCK), rows, out[0].flatten(1).numpy())
        return out


def flips_of(mirror_axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the axes of each mirrored copy of a tile, in stock's order; `mirror_axes` count from the first spatial."""
    axes = [axis + 2 for axis in mirror_axes]
    return list(chain.from_iterable(combinations(axes, count) for count in range(1, len(axes) + 1)))


def mirrored_mean(
    run: Callable[[torch.Tensor], torch.Tensor],
    tile: torch.Tensor,
    mirror_axes: Sequence[int],
    threads: RowThreads,
    collapses: bool,
) -> torch.Tensor:
    """Return the mean of what a network returns over all flips of a tile, summed in float32 and in stock's order.

    Unmirrored, the type is the network's.

    Parameters
    ----------
    run : callable
        The network.
    tile : float32 or bfloat16, shape (1, channels, *patch_size)
    mirror_axes : sequence of int
        Counted from the first spatial axis.
    threads : RowThreads
    collapses : bool
        A constant tile is the same however it is mirrored: one pass tells of all. False where every pass counts.
    """
    output, flips = run(tile), flips_of(mirror_axes)
    if not flips:
        return output
    total = output.float() if output.dtype == torch.bfloat16 else output
    same: torch.Tensor | None = None
    if collapses and constant_bits(tile) is not None:
        same = output.clone() if total is output else output
    del output
    for axes in flips:
        add_flipped(total, run(tile.flip(axes)) if same is None else same, axes, threads)
    return total.div_(len(flips) + 1)


def constant_bits(tile: torch.Tensor) -> bytes | None:
    """Return the bits of each channel of a tile on the CPU of which all voxels are the same; else None."""
    if tile.device.type != "cpu" or tile.dtype not in _BITS:
        return None
    bits = tile[0].movedim(0, -1).flatten(0, -2).view(_BITS[tile.dtype])
    if not torch.equal(bits[0], bits[-1]) or not bool((bits == bits[:1]).all()):
        return None
    return bits[0].numpy().tobytes()


def add_flipped(total: torch.Tensor, added: torch.Tensor, axes: Sequence[int], threads: RowThreads) -> None:
    """Add a tensor of shape (1, channels, *patch), read backwards along some axes, to one of float32.

    Both have the same memory format; the bits are those of ``total += added.flip(axes)``.
    """
    rows, flips = _in_memory(total, axes)
    others, _ = _in_memory(added, axes)
    if rows is None or others is None or rows.shape != others.shape or rows.stride() != others.stride():
        total += added.flip(tuple(axes))
        return
    count = rows.shape[0] * rows.shape[1]
    if others.dtype == torch.bfloat16:
        threads.run(kernels.add_flipped_bits, count, rows.numpy(), bits_of(others), flips)
    else:
        threads.run(kernels.add_flipped, count, rows.numpy(), others.numpy(), flips)


def _in_memory(tensor: torch.Tensor, axes: Sequence[int]) -> tuple[torch.Tensor | None, tuple[bool, bool, bool, bool]]:
    """Return the only sample, its four axes as they lie in memory, and which of them are flipped; None if strewn."""
    is_simple = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16) and len(tensor) == 1
    sample, flips = tensor.detach()[0], [axis in axes for axis in range(1, tensor.ndim)]
    if not sample.is_contiguous():
        sample, flips = sample.movedim(0, -1), [*flips[1:], flips[0]]
    if sample.ndim == 3:
        sample, flips = sample[None], [False, *flips]
    first, second, third, fourth = flips
    return sample if is_simple and sample.is_contiguous() else None, (first, second, third, fourth)
