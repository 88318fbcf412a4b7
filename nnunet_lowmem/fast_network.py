"""``fast``: another order of the network's sums on the CPU, for less time and less memory.

Channels are kept last, which convolutions are faster with; instance normalisation becomes group normalisation with
one channel in each group, which leaves them there. A last convolution of one voxel is taken off the network (the *head*):
the window applies it while it adds a tile, so that the logits of a tile never exist, and mirrored copies are averaged
before.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from nnunet_lowmem.network_memory import meta_copy

logger = logging.getLogger(__name__)

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
    """

    network: nn.Module
    body: nn.Module
    channels: int
    head_layer: nn.Module | None

    def features(self, tile: torch.Tensor, mirror_axes: Sequence[int]) -> torch.Tensor:
        """Return the mean of the body's output over all flips; axes count from 0, channels come last in memory."""
        tile = tile.contiguous(memory_format=_LAST[tile.ndim])
        axes = [axis + 2 for axis in mirror_axes]
        flips = list(chain.from_iterable(combinations(axes, count) for count in range(1, len(axes) + 1)))
        total: torch.Tensor = self.body(tile)
        for flip in flips:
            total += self.body(tile.flip(flip)).flip(flip)
        return total.div_(len(flips) + 1) if flips else total

    def head(self) -> Head | None:
        """Return the head with the weights of now."""
        layer: Any = self.head_layer
        if layer is None:
            return None
        weights = layer.weight.detach().flatten(1).contiguous().numpy()
        bias = np.zeros(len(weights), np.float32) if layer.bias is None else layer.bias.detach().numpy()
        return Head(weights, bias)


def fast_network(network: nn.Module, tile_shape: tuple[int, ...]) -> FastNetwork | None:
    """Rearrange a network's memory and return how to run it; None, and a line in the log, where that does not work.

    Parameters
    ----------
    network : Module
        Its weights keep their values, and get their channels last.
    tile_shape : int
        (1, channels, *patch_size); nothing is computed.
    """
    try:
        name = _head_name(network, tile_shape)
        network.to(memory_format=_LAST[len(tile_shape)])
        shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        body = copy.deepcopy(network, dict(shared)).eval()
        changed: dict[nn.Module, nn.Module] = {
            module: _ChannelsLastNorm(module)
            for module in body.modules()
            if isinstance(module, _NORMS) and not module.track_running_stats
        }
        if name is not None:
            changed[body.get_submodule(name)] = nn.Identity()
        _replace(body, changed)
        with torch.inference_mode():
            made = meta_copy(body)(torch.empty(tile_shape, device="meta", memory_format=_LAST[len(tile_shape)]))
    except Exception as error:  # whatever a stranger's network meets there
        logger.warning("fast: the network runs as it does without, since it cannot be rearranged: %s", error)
        return None
    return FastNetwork(network, body, made.shape[1], None if name is None else network.get_submodule(name))


def _head_name(network: nn.Module, tile_shape: tuple[int, ...]) -> str | None:
    """Name the convolution of one voxel that makes the network's output, if there is one."""
    shadow = meta_copy(network)
    made: dict[str, list[tuple[torch.Tensor, int]]] = {}
    for name, module in shadow.named_modules():
        if isinstance(module, _CONVOLUTIONS) and _sees_one_voxel(module):
            outputs = made.setdefault(name, [])
            module.register_forward_hook(lambda _module, _inputs, out, to=outputs: to.append((out, out._version)))
    with torch.no_grad():
        result = shadow(torch.empty(tile_shape, device="meta"))
    for name, outputs in made.items():
        # an output that was changed in place afterwards is not the last layer's any more
        if len(outputs) == 1 and outputs[0][0] is result and result._version == outputs[0][1]:
            return name
    return None


def _sees_one_voxel(layer: nn.Module) -> bool:
    given: Any = layer
    return set(given.kernel_size) == {1} and set(given.stride) == {1} and given.groups == 1 and not any(given.padding)


def _replace(network: nn.Module, changed: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they are referred to."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in changed:
                parent._modules[name] = changed[child]


class _ChannelsLastNorm(nn.Module):
    """Instance normalisation that keeps channels last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm: Any = norm

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise every channel of every sample."""
        norm = self.norm
        return functional.group_norm(features, features.shape[1], norm.weight, norm.bias, norm.eps)
