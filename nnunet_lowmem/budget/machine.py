"""The budget of one case: what was asked for, else what the machine has left."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.sizes import asked_bytes, format_gib
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.memory_held import process_bytes, process_tree_bytes
from nnunet_lowmem.system.memory_limits import available_ram, free_disk_bytes, less_headroom, total_ram_bytes

_IN_MEMORY = ("tmpfs", "ramfs")

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
    ram, reserved_ram = ram_limit(max_ram, with_children)
    vram, reserved_vram = _vram(max_vram, device)
    return Budget(ram, vram, reserved_ram, reserved_vram, spill_bytes(tmp_dir))


def ram_limit(max_ram: int | str | None, with_children: bool = True) -> tuple[int, int]:
    """Return the limit of RAM and what is in use, both as in `machine_budget`.

    Raises
    ------
    UsageError
        If the wish is no size above zero.
    """
    return_freed_memory()
    in_use = process_tree_bytes() if with_children else process_bytes()
    machine = available_ram()
    limit = asked_bytes("--max_ram", max_ram, total_ram_bytes())
    return _within("--max_ram", limit, machine.free_bytes, in_use, machine.source), in_use


def spill_bytes(tmp_dir: str | os.PathLike[str] | None) -> int:
    """Return what can be spilled: the free space of the folder, or nothing where the folder is itself kept in RAM."""
    folder = spill_folder(tmp_dir)
    return 0 if _file_system(folder) in _IN_MEMORY else free_disk_bytes(folder)


def spill_folder(tmp_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder where arrays are spilled; the system's for temporary files if none is given."""
    return Path(tmp_dir or tempfile.gettempdir())


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder; empty where the system does not tell."""
    path = folder.resolve()
    try:
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:
        return ""
    return next((str(mounts[parent]) for parent in (path, *path.parents) if parent in mounts), "")


def _vram(max_vram: int | str | None, device: torch.device) -> tuple[int | None, int]:
    if device.type != "cuda":
        return None, 0
    torch.cuda.empty_cache()  # what torch keeps for the next tensors is not in use
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    asked = asked_bytes("--max_vram", max_vram, total)
    return _within("--max_vram", asked, free, reserved, "the device"), reserved


@contextmanager
def vram_limit(max_vram: int | str | None, device: torch.device) -> Iterator[None]:
    """Let torch's allocator refuse what is beyond `max_vram`, if that was asked for; afterwards its limit is as before.

    The plan adds up tensors; the allocator takes whole blocks, and keeps what has been freed until it meets its limit.
    """
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    asked = asked_bytes("--max_vram", max_vram, total) if total else None
    if asked is None:
        yield
        return
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
