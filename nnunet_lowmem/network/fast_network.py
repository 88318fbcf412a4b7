"""``fast``: another order of the network's sums on the CPU, for less time and less memory.

Channels are kept last, which convolutions are faster with; instance normalisation and the leaky ReLU behind it are one
kernel that leaves them there. A last convolution of one voxel (the *head*) is taken off the network: the window applies
it while it adds a tile, so that the logits of a tile never exist, and mirrored copies are averaged before it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nnunet_lowmem.errors import ModelError
from nnunet_lowmem.network import kernels
from nnunet_lowmem.network.tile_memory import meta_copy
from nnunet_lowmem.system.threads import RowThreads

logger = logging.getLogger(__name__)

# sums are made of so many partial ones, whatever the number of threads: the result does not depend on it
_PARTS = 64
_FEW = 8
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class Head:
    """A convolution of one voxel: logits are ``weights @ features + bias``.

    Attributes
    ----------
    weights : float32, shape (heads, channels)
    bias : float32, shape (heads,)
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class FastNetwork:
    """How a network is run; its weights are shared, so that a new fold may be loaded into `network`.

    Attributes
    ----------
    network : Module
        As it was given.
    body : Module
        Makes features, or logits where there is no head.
    channels : int
        Of what `body` makes.
    head_layer : Module or None
        The convolution that makes logits of features.
    threads : RowThreads
        Of the kernels in `body`; whoever runs it opens and closes them.
    """

    network: nn.Module
    body: nn.Module
    channels: int
    head_layer: nn.Module | None
    threads: RowThreads

    def features(self, tile: torch.Tensor, mirror_axes: Sequence[int]) -> torch.Tensor:
        """Return the mean of the body's output over all flips; axes count from 0, channels come last in memory."""
        # a single channel counts as last only where its stride says so, which `contiguous` leaves as it is
        tile = torch.empty_like(tile, memory_format=_LAST[tile.ndim]).copy_(tile)
        axes = [axis + 2 for axis in mirror_axes]
        flips = list(chain.from_iterable(combinations(axes, count) for count in range(1, len(axes) + 1)))
        total = self._run(tile)
        for flip in flips:
            total += self._run(tile.flip(flip)).flip(flip)
        return total.div_(len(flips) + 1) if flips else total

    def _run(self, tile: torch.Tensor) -> torch.Tensor:
        try:
            return self.body(tile)  # type: ignore[no-any-return]  # torch's modules return anything
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            raise ModelError(
                f"fast: this network needs its channels first in memory; run it without: {error}"
            ) from error

    def head(self) -> Head | None:
        """Return the head with the weights of now."""
        layer: Any = self.head_layer
        if layer is None:
            return None
        weights = layer.weight.detach().flatten(1).contiguous().numpy()
        bias = np.zeros(len(weights), np.float32) if layer.bias is None else layer.bias.detach().numpy()
        return Head(weights, bias)


def parts_of(network: Any) -> list[tuple[int, ...]]:
    """Tell networks apart by the modules and weights that they are made of, and by who watches or replaces calls."""
    if not isinstance(network, nn.Module):
        return [(id(network),)]
    return [
        (
            id(module),
            *map(id, module._parameters.values()),
            *map(id, module._buffers.values()),
            *module._forward_hooks,
            *module._forward_pre_hooks,
            id(vars(module).get("forward")),
        )
        for module in network.modules()
    ]


def fast_network(network: nn.Module, tile_shape: tuple[int, ...], threads: int) -> FastNetwork | None:
    """Rearrange a network's memory and return how to run it; None, and a line in the log, where that does not work.

    Parameters
    ----------
    network : Module
        Its weights keep their values, and get their channels last.
    tile_shape : int
        (1, channels, *patch_size); nothing is computed.
    threads : int
        Of the kernels.
    """
    last, row_threads = _LAST[len(tile_shape)], RowThreads(threads)
    try:
        name = _head_name(network, tile_shape)
        network.to(memory_format=last)
        body = _rearranged(network, name, row_threads)
        with torch.inference_mode():
            made = meta_copy(body, with_hooks=True)(
                torch.empty(tile_shape, dtype=torch.float32, device="meta", memory_format=last)
            )
    except Exception as error:  # whatever a stranger's network meets there
        network.to(memory_format=torch.contiguous_format)
        logger.warning("fast: the network runs as it does without, since it cannot be rearranged: %s", error)
        return None
    head = None if name is None else network.get_submodule(name)
    return FastNetwork(network, body, made.shape[1], head, row_threads)


def _rearranged(network: nn.Module, head: str | None, threads: RowThreads) -> nn.Module:
    """Return a copy with the same weights, fast normalisation, and without its head."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    body = copy.deepcopy(network, shared).eval()
    for sequence in [module for module in body.modules() if type(module) is nn.Sequential]:
        _use_fast_layers(sequence, threads)
    if head is not None:
        layer = body.get_submodule(head)
        for parent in list(body.modules()):
            for name in [name for name, child in parent.named_children() if child is layer]:
                setattr(parent, name, nn.Identity())
    return body


def _use_fast_layers(sequence: nn.Sequential, threads: RowThreads) -> None:
    """Replace normalisations with the leaky ReLUs right behind them, and convolutions of few channels.

    In a sequence nobody else sees what is in between.
    """
    layers = [None, *sequence, None]
    for number, (before, layer, after) in enumerate(zip(layers, layers[1:], layers[2:], strict=False)):
        if isinstance(layer, _NORMS) and not layer.track_running_stats:
            slope = 1.0
            if isinstance(after, nn.LeakyReLU):
                slope, sequence[number + 1] = after.negative_slope, nn.Identity()
            sequence[number] = FastNorm(layer, slope, isinstance(before, _CONVOLUTIONS), threads)
        elif isinstance(layer, _CONVOLUTIONS) and layer.in_channels < _FEW and layer.padding_mode == "zeros":
            sequence[number] = _FewChannels(layer)


def _head_name(network: nn.Module, tile_shape: tuple[int, ...]) -> str | None:
    """Name the convolution of one voxel that makes the network's output, if there is one."""
    made: dict[str, list[tuple[torch.Tensor, int]]] = {}
    # outside of inference mode, where tensors count how often they are changed in place
    with torch.inference_mode(False), torch.no_grad():
        shadow = meta_copy(network, with_hooks=True)
        for name, module in shadow.named_modules():
            if isinstance(module, _CONVOLUTIONS) and _sees_one_voxel(module):
                outputs = made.setdefault(name, [])
                module.register_forward_hook(lambda _module, _inputs, out, to=outputs: to.append((out, out._version)))
        result = shadow(torch.empty(tile_shape, dtype=torch.float32, device="meta"))
    for name, outputs in made.items():
        # an output that was changed in place afterwards is not the last layer's any more
        if len(outputs) == 1 and outputs[0][0] is result and result._version == outputs[0][1]:
            return name
    return None


def _sees_one_voxel(layer: nn.Module) -> bool:
    given: Any = layer
    return set(given.kernel_size) == {1} and set(given.stride) == {1} and given.groups == 1 and not any(given.padding)


class _FewChannels(nn.Module):
    """A convolution by oneDNN, where torch would take a slower path and put the channels first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if tile.is_meta or isinstance(layer.padding, str) or not _HAS_ONEDNN:
            return layer(tile)  # type: ignore[no-any-return]  # torch's modules return anything
        shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
        convolved: torch.Tensor = torch.ops.aten.mkldnn_convolution(tile, layer.weight, layer.bias, *shape)
        return convolved


class FastNorm(nn.Module):
    """Instance normalisation and what bends its output, channels last, with sums in double precision.

    Parameters
    ----------
    norm : InstanceNorm
    slope : float
        What negative values are multiplied with.
    in_place : bool
        Nobody else needs the input.
    threads : RowThreads
    """

    def __init__(self, norm: nn.Module, slope: float, in_place: bool, threads: RowThreads) -> None:
        super().__init__()
        self.norm: Any = norm
        self._slope = np.float32(slope)
        self._in_place = in_place
        self._threads = threads

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise every channel of every sample."""
        last = _LAST[features.ndim]
        out = features.contiguous(memory_format=last) if self._in_place else features.clone(memory_format=last)
        if not out.is_meta:
            for sample in out.movedim(1, -1).detach():
                self._normalise(sample.flatten(0, -2).numpy())
        return out

    def _normalise(self, features: NDArray[np.float32]) -> None:
        sums = np.empty((_PARTS, 2, features.shape[1]))
        self._threads.run(kernels.channel_sums, _PARTS, features, sums)
        mean, square = sums.sum(axis=0) / len(features)
        scale = 1 / np.sqrt(square - mean * mean + self.norm.eps)
        shift = -mean * scale
        if self.norm.affine:
            weight, bias = self.norm.weight.detach().numpy(), self.norm.bias.detach().numpy()
            scale, shift = scale * weight, shift * weight + bias
        arguments = (features, scale.astype(np.float32), shift.astype(np.float32), self._slope)
        self._threads.run(kernels.scale_and_bend, len(features), *arguments)
