"""Weights below 1.2e-38, which float32 holds with fewer digits and processors multiply many times slower.

Weight decay leaves them in layers that learn nothing more. In any sum of ordinary size their products are lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_lowmem.network import kernels

#: More than one weight in so many is worth a word.
WORTH_A_WORD = 1000


def count(weights: torch.Tensor) -> int:
    """Count the denormal numbers of a float32 tensor; 0 of any other, and of one that has no data here."""
    if weights.dtype != torch.float32 or weights.device.type != "cpu" or not weights.numel():
        return 0
    # `Tensor.numpy` would fix the memory where it is for good
    values: Any = np.from_dlpack(weights.detach().reshape(-1))
    return int(kernels.count_denormals(values.view(np.uint32)))


def without(weights: torch.Tensor) -> torch.Tensor:
    """Return a copy in which they are zero, of the same memory format."""
    return torch.where(weights.abs() < torch.finfo(weights.dtype).tiny, torch.zeros_like(weights), weights)


class NormalWeights:
    """Gives a copy of a network the weights of the network itself or, where these hold denormal numbers, others.

    Parameters
    ----------
    network, body : Module
        `body` has the network's weights under the same names, but for those that are its own.

    Attributes
    ----------
    denormals : int
        Among the weights as they were when they were looked through.
    replaced_bytes : int
        Of the weights that the copy does not share.
    checksum : int
        Of these.
    """

    def __init__(self, network: nn.Module, body: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for path, owner in network.named_modules():
            for name, weights in owner.named_parameters(recurse=False):
                module = _submodule(body, path)
                if module is not None and id(module._parameters.get(name)) == id(weights):
                    self._places.append((module, name, weights))
        self.denormals = self.replaced_bytes = self.checksum = 0

    def refresh(self) -> None:
        """Look through the weights that the network has now."""
        denormals = replaced_bytes = checksum = 0
        for module, name, weights in self._places:
            own = weights
            if found := count(weights):
                own = nn.Parameter(without(weights.detach()), requires_grad=False)
                denormals += found
                replaced_bytes += weights.numel() * weights.element_size()
                checksum += int(weights.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64))
            module._parameters[name] = own
        self.denormals, self.replaced_bytes, self.checksum = denormals, replaced_bytes, checksum


def _submodule(body: nn.Module, path: str) -> nn.Module | None:
    try:
        return body.get_submodule(path)
    except AttributeError:
        return None
