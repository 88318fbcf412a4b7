"""The budget of one case: what was asked for, else what the machine has left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from nnunet_lowmem.budget.arrays import Budget, Origins
from nnunet_lowmem.sizes import asked_bytes, format_gib
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.memory_held import process_bytes, process_tree_bytes
from nnunet_lowmem.system.memory_limits import (
    RamLimit,
    available_ram,
    free_disk_bytes,
    less_headroom,
    total_ram_bytes,
)
from nnunet_lowmem.volumes.spilling import spill_folder, why_nothing_is_spilled

_logger = logging.getLogger(__name__)


def machine_budget(
    max_ram: int | str | None,
    max_vram: int | str | None,
    device: torch.device,
    tmp_dir: str | os.PathLike[str] | None = None,
    with_children: bool = True,
) -> Budget:
    """Read the machine and apply the wishes of the user; what is in use now becomes the reserved part.

    Parameters
    ----------
    max_ram, max_vram : int or str, optional
        Bytes, or text as on the command line; None takes the environment variables ``nnUNet_lowmem_max_ram`` and
        ``nnUNet_lowmem_max_vram``, and without them what is free now, less some headroom.
    device : torch.device
        The network's.
    tmp_dir : path, optional
        Where arrays are spilled; the system's folder for temporary files if not given.
    with_children : bool
        Whether what child processes hold is reserved; False where it is planned.

    Raises
    ------
    UsageError
        If a wish is no size above zero.
    """
    ram = _ram(max_ram, with_children)
    vram, reserved_vram = _vram(max_vram, device)
    folder = spill_folder(tmp_dir)
    unspilled = why_nothing_is_spilled(folder)
    origins = Origins(
        ram_asked=ram.asked,
        vram_asked=_asked_vram(max_vram, device) is not None,
        machine=ram.machine,
        in_use_bytes=ram.in_use_bytes,
        folder=str(folder),
        nothing_spilled_because=unspilled,
    )
    disk = 0 if unspilled else free_disk_bytes(folder)
    return Budget(ram.limit_bytes, vram, ram.in_use_bytes, reserved_vram, disk, origins)


@dataclass(frozen=True)
class _Ram:
    limit_bytes: int | None
    in_use_bytes: int
    asked: bool
    machine: RamLimit | None


def _ram(max_ram: int | str | None, with_children: bool) -> _Ram:
    return_freed_memory()
    in_use = process_tree_bytes() if with_children else process_bytes()
    machine = available_ram()
    asked = asked_bytes("--max_ram", max_ram, total_ram_bytes())
    if machine is None:
        known = "nobody knows whether --max_ram is there" if asked else "plans have no limit; name one with --max_ram"
        _warn_once(f"how much memory the machine has is not told here (by /proc, psutil or sysconf): {known}")
        return _Ram(asked, in_use, asked is not None, None)
    limit = _within("--max_ram", asked, machine.free_bytes, in_use, machine.in_words())
    return _Ram(limit, in_use, asked is not None, machine)


def ram_limit(max_ram: int | str | None) -> tuple[int | None, int]:
    """Return the limit of RAM, None where none is known, and what is in use, both as in `machine_budget`.

    Raises
    ------
    UsageError
        If the wish is no size above zero.
    """
    ram = _ram(max_ram, with_children=True)
    return ram.limit_bytes, ram.in_use_bytes


def _vram(max_vram: int | str | None, device: torch.device) -> tuple[int | None, int]:
    if device.type != "cuda":
        return None, 0
    torch.cuda.empty_cache()  # what torch keeps for the next tensors is not in use
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return _within("--max_vram", _asked_vram(max_vram, device), free, reserved, "the device"), reserved


def _asked_vram(max_vram: int | str | None, device: torch.device) -> int | None:
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    return asked_bytes("--max_vram", max_vram, total) if total else None


@contextmanager
def vram_limit(max_vram: int | str | None, device: torch.device) -> Iterator[None]:
    """Let torch's allocator refuse what is beyond `max_vram`, if that was asked for; afterwards its limit is as before.

    The plan adds up tensors; the allocator takes whole blocks, and keeps what has been freed until it meets its limit.
    """
    asked = _asked_vram(max_vram, device)
    if asked is None:
        yield
        return
    total = torch.cuda.mem_get_info(device)[1]
    # torch before 2.6 does not tell its limit; it is the whole device unless somebody has set one
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    number = torch.cuda.current_device() if device.index is None else device.index
    before = float(tell(number))
    torch.cuda.set_per_process_memory_fraction(min(before, asked / total), number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, number)


@cache
def _warn_once(text: str) -> None:
    _logger.warning(text)


def _within(flag: str, asked_bytes: int | None, free_bytes: int, in_use_bytes: int, who: str) -> int:
    """Return what was asked for, with a warning where `who` leaves less; else what is free, less some headroom."""
    if asked_bytes is None:
        return less_headroom(free_bytes) + in_use_bytes
    there_bytes = free_bytes + in_use_bytes
    if asked_bytes > there_bytes:
        # in whole GiB, so that what is free may vary from case to case without a new warning
        _warn_once(
            f"{flag} {format_gib(asked_bytes)} is more than there is: {who} leaves about "
            f"{there_bytes / 2**30:.0f} GiB; the run may be ended by the system"
        )
    return asked_bytes
