"""``fast``: another order of the network's sums on the CPU, or other numbers, for less time and less memory.

Channels are kept last, which convolutions are faster with; instance normalisation and the leaky ReLU behind it are one
kernel that leaves them there. A last convolution of one voxel (the *head*) is taken off the network: the window applies
it while it adds a tile, so that the logits of a tile never exist, and mirrored copies are averaged before it.

In bfloat16 the weights of convolutions and all that lies between layers have 8 binary digits; convolutions add up in
float32, as oneDNN does, and so do normalisation, the mean over mirrored copies, and the head. Nothing is converted from
one layer to the next.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nnunet_lowmem.errors import ModelError
from nnunet_lowmem.network import denormals
from nnunet_lowmem.network.denormals import NormalWeights
from nnunet_lowmem.network.exact import mirrored_mean
from nnunet_lowmem.network.fast_layers import CONVOLUTIONS, LAST, has_few_channels, use_fast_layers
from nnunet_lowmem.network.known import is_known_layer, why_watched
from nnunet_lowmem.network.tile_memory import meta_copy
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.system.threads import RowThreads

logger = logging.getLogger(__name__)

_PUT_LAST = "_nnunet_lowmem_put_last"
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    """How a network is run; `refresh` takes over the weights of a new fold that were loaded into `network`.

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
    arithmetic : Arithmetic
    weights : NormalWeights
        Those that `body` shares with `network`.
    rounded : tuple of (Parameter, Parameter)
        Weights of `network`, and what `body` has in their place.
    last : torch.memory_format
        Of the weights of both.
    input_dtype : dtype
        Of the tile that `body` takes.
    """

    network: nn.Module
    body: nn.Module
    channels: int
    head_layer: nn.Module | None
    threads: RowThreads
    arithmetic: Arithmetic
    weights: NormalWeights
    rounded: tuple[tuple[nn.Parameter, nn.Parameter], ...]
    last: torch.memory_format
    input_dtype: torch.dtype

    def refresh(self) -> None:
        """Take over the weights that `network` has now; denormal ones, which only cost time, are zero here."""
        put_last(self.network, self.last)
        self.weights.refresh()
        with torch.no_grad():
            for source, own in self.rounded:
                own.copy_(denormals.without(source) if denormals.count(source) else source)

    @property
    def own_bytes(self) -> int:
        """Of the weights that are not the network's."""
        return self.weights.replaced_bytes + sum(own.numel() * own.element_size() for _, own in self.rounded)

    def features(self, tile: torch.Tensor, mirror_axes: Sequence[int], collapses: bool = True) -> torch.Tensor:
        """Return the mean of the body's output over all flips; axes count from 0, channels come last in memory.

        Float32, but for bfloat16 features that are not mirrored and go to a head. For `collapses` see `mirrored_mean`.
        """
        # a single channel counts as last only where its stride says so, which `contiguous` leaves as it is
        tile = torch.empty_like(tile, dtype=self.input_dtype, memory_format=LAST[tile.ndim]).copy_(tile)
        made = mirrored_mean(self._run, tile, mirror_axes, self.threads, collapses)
        return made.float() if self.head_layer is None else made

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


def parts_of(network: Any) -> list[tuple[Any, ...]]:
    """Tell networks apart by modules, their plain attributes and weights, and by who watches or replaces calls."""
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
            *_plain_attributes(module),
        )
        for module in network.modules()
    ]


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the numbers and texts that a layer goes by; those of strangers' layers may count what these do."""
    for name, value in vars(module).items() if is_known_layer(module) else ():
        values = value if isinstance(value, tuple) else (value,)
        if name[0] != "_" and name != "training" and all(isinstance(one, bool | int | float | str) for one in values):
            yield name, value


def put_last(network: nn.Module, last: torch.memory_format) -> None:
    """Give the weights their channels last, and let the network, and its copies, know that this was done to them."""
    axes = 5 if last is torch.channels_last_3d else 4
    if any(weights.ndim == axes and not weights.is_contiguous(memory_format=last) for weights in network.parameters()):
        network.to(memory_format=last)
        vars(network)[_PUT_LAST] = True


def put_back(network: nn.Module) -> None:
    """Undo `put_last`: the order in memory decides about the order of sums."""
    if vars(network).pop(_PUT_LAST, False):
        network.to(memory_format=torch.contiguous_format)


def dtype_of(arithmetic: Arithmetic) -> torch.dtype:
    """Return the type of what lies between the layers."""
    return torch.bfloat16 if arithmetic is Arithmetic.BFLOAT16 else torch.float32


def fast_network(
    network: nn.Module, tile_shape: tuple[int, ...], threads: int, arithmetic: Arithmetic = Arithmetic.FLOAT32
) -> FastNetwork | None:
    """Rearrange a network's memory and return how to run it; None, and a line in the log, where that does not work.

    Parameters
    ----------
    network : Module
        Its weights keep their values, and get their channels last.
    tile_shape : int
        (1, channels, *patch_size); nothing is computed.
    threads : int
        Of the kernels.
    arithmetic : Arithmetic
        FLOAT32, or BFLOAT16: that only where nobody watches the network.
    """
    last, row_threads = LAST[len(tile_shape)], RowThreads(threads)
    told = "fast bfloat16" if arithmetic is Arithmetic.BFLOAT16 else "fast"
    if arithmetic is Arithmetic.BFLOAT16 and (watched := why_watched(network)):
        logger.warning("%s: the network runs as it does without: %s", told, watched)
        return None
    try:
        name = _head_name(network, tile_shape)
        put_last(network, last)
        rounded = _rounded(network, name) if arithmetic is Arithmetic.BFLOAT16 else {}
        body = _rearranged(network, name, row_threads, rounded, dtype_of(arithmetic))
        input_dtype = _input_of(body, tile_shape, dtype_of(arithmetic))
        made = output_of(body, tile_shape, input_dtype)
        if made.dtype != dtype_of(arithmetic):
            raise ModelError(f"it computes in {made.dtype} what it should in {dtype_of(arithmetic)}")
    except Exception as error:  # whatever a stranger's network meets there
        put_back(network)
        logger.warning("%s: the network runs as it does without, since it cannot be rearranged: %s", told, error)
        return None
    head = None if name is None else network.get_submodule(name)
    weights = NormalWeights(network, body)
    fast = FastNetwork(
        network, body, made.shape[1], head, row_threads, arithmetic, weights, tuple(rounded.values()), last, input_dtype
    )
    fast.refresh()
    return fast


def output_of(body: nn.Module, tile_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what a body makes of a tile, without data; what it raises says that it takes no such tile."""
    tile = torch.empty(tile_shape, dtype=dtype, device="meta", memory_format=LAST[len(tile_shape)])
    with torch.inference_mode():
        made: torch.Tensor = meta_copy(body, with_hooks=True)(tile)
    return made


def _input_of(body: nn.Module, tile_shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tile for a body: float32 where its first layer takes that."""
    try:
        output_of(body, tile_shape, torch.float32)
    except RuntimeError:
        return dtype
    return torch.float32


def _rounded(network: nn.Module, head: str | None) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """Return, by the id of each weight of a convolution but for the head's and those of few channels, both versions."""
    sequences = [module for module in network.modules() if type(module) is nn.Sequential]
    single = {id(layer) for sequence in sequences for layer in sequence if has_few_channels(layer)}
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, (*CONVOLUTIONS, *_TRANSPOSED)) and name != head and id(layer) not in single
    ]
    return {
        id(weights): (weights, nn.Parameter(torch.empty_like(weights, dtype=torch.bfloat16), requires_grad=False))
        for layer in layers
        for weights in layer.parameters(recurse=False)
    }


def _rearranged(
    network: nn.Module,
    head: str | None,
    threads: RowThreads,
    rounded: dict[int, tuple[nn.Parameter, nn.Parameter]],
    dtype: torch.dtype,
) -> nn.Module:
    """Return a copy with the same weights, but for some, fast normalisation, and without its head."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    shared.update({key: own for key, (_, own) in rounded.items()})
    body = copy.deepcopy(network, shared).eval()
    for sequence in [module for module in body.modules() if type(module) is nn.Sequential]:
        use_fast_layers(sequence, threads, dtype)
    if head is not None:
        layer = body.get_submodule(head)
        for parent in list(body.modules()):
            for name in [name for name, child in parent.named_children() if child is layer]:
                setattr(parent, name, nn.Identity())
    return body


def _head_name(network: nn.Module, tile_shape: tuple[int, ...]) -> str | None:
    """Name the convolution of one voxel that makes the network's output, if there is one."""
    made: dict[str, list[tuple[torch.Tensor, int]]] = {}
    # outside of inference mode, where tensors count how often they are changed in place
    with torch.inference_mode(False), torch.no_grad():
        shadow = meta_copy(network, with_hooks=True)
        for name, module in shadow.named_modules():
            if isinstance(module, CONVOLUTIONS) and _sees_one_voxel(module):
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
