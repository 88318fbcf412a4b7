"""How a process gets its memory from the system, and gives it back; no result depends on it."""

from __future__ import annotations

import os

from nnunet_lowmem.system import platform

_MAPPED_BYTES = 8 * 2**20


def own_process() -> None:
    """Set the allocators of a process that runs for this package.

    A command, whoever asked for the start-up hook, or a worker of a cluster that was asked whether it takes cases.

    Both last for the process; torch's takes effect if torch has not allocated anything yet.

    Torch is told to ask for huge pages (Linux): a network on the CPU allocates its activations anew for every tile, and
    getting them in pages of 4 KiB takes as long as computing. glibc is told to map every large block: by default it
    raises that size to 32 MiB as it sees such blocks freed, and keeps those below.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    platform.map_large_blocks(_MAPPED_BYTES)


def return_freed_memory() -> None:
    """Give the blocks that are free back to the system, where the C library can (glibc)."""
    platform.trim_heap()
