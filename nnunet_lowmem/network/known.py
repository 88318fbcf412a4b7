"""Who might see a network run, or change what it computes: code that is nobody's here, hooks, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# whose layers do nothing but compute
_KNOWN_CODE = ("torch.nn.", "dynamic_network_architectures.", "nnunet_lowmem.")


def is_known(network: Any) -> bool:
    """Whether all code that a forward pass runs is torch's, of nnU-Net's architectures, or ours."""
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        return False
    return not _global_hooks() and all(
        f"{place}.".startswith(_KNOWN_CODE) and "forward" not in vars(module)
        for module in network.modules()
        for place in (type(module).__module__, type(module).forward.__module__)
    )


def is_known_layer(module: nn.Module) -> bool:
    """Whether the class of a layer is torch's, of nnU-Net's architectures, or ours."""
    return f"{type(module).__module__}.".startswith(_KNOWN_CODE)


def why_watched(network: Any) -> str:
    """Say who would see the network run another way, or a tile less often; empty where nobody would.

    A network with dropout may give other numbers each time that it is run.
    """
    if not is_known(network):
        return "it is not made of torch's and nnU-Net's layers alone"
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook is registered on {name or 'the network'}"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"{name or 'the network'} is compiled"
        if isinstance(module, _DropoutNd):
            return f"{name or 'the network'} drops out"
    return ""


def is_autocasting() -> bool:
    """Whether a client lets torch compute in other numbers on the CPU."""
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # before torch 2.4
        return bool(torch.is_autocast_cpu_enabled())


def _global_hooks() -> bool:
    held = vars(nn.modules.module).items()
    return any(hooks for name, hooks in held if name.endswith("_hooks") and "_global_" in name)
