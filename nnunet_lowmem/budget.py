"""The budget of one run: what was asked for, else what the machine has left."""

from __future__ import annotations

import torch

from nnunet_lowmem.measuring import process_tree_bytes
from nnunet_lowmem.memory import available_ram, parse_size, total_ram_bytes
from nnunet_lowmem.planner import Budget


def machine_budget(max_ram: int | str | None, max_vram: int | str | None, device: torch.device) -> Budget:
    """Read the machine and apply the wishes of the user.

    Parameters
    ----------
    max_ram, max_vram : int or str, optional
        Bytes, or text as on the command line; None takes what is free now.
    device : torch.device
        The network's.
    """
    reserved_ram = process_tree_bytes()
    ram = _asked(max_ram, total_ram_bytes())
    vram = reserved_vram = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved_vram = torch.cuda.memory_reserved(device)
        vram = _asked(max_vram, total) or free + reserved_vram
    return Budget(
        ram_bytes=ram or available_ram().free_bytes + reserved_ram,
        vram_bytes=vram,
        reserved_ram_bytes=reserved_ram,
        reserved_vram_bytes=reserved_vram or 0,
        binding=max_ram is not None or max_vram is not None,
    )


def _asked(size: int | str | None, total_bytes: int) -> int | None:
    return None if size is None else parse_size(str(size), total_bytes)
