"""How a process gets its memory from the system, and gives it back; no result depends on it."""

from __future__ import annotations

import contextlib
import ctypes
import os

# glibc's number for the size from which a block is mapped on its own, and the size
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 8 * 2**20
# on Windows, which has no library without a name, ctypes raises TypeError; other C libraries lack the functions
_NO_GLIBC = (OSError, AttributeError, TypeError)


def own_process() -> None:
    """Set the allocators of a process that runs for this package: a command, or whoever asked for the start-up hook.

    Both last for the process; torch's takes effect if torch has not allocated anything yet.

    Torch is told to ask for huge pages (Linux): a network on the CPU allocates its activations anew for every tile, and
    getting them in pages of 4 KiB takes as long as computing. glibc is told to map every large block: by default it
    raises that size to 32 MiB as it sees such blocks freed, and keeps those below.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(*_NO_GLIBC):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def return_freed_memory() -> None:
    """Give the blocks that are free back to the system, where the C library can (glibc)."""
    with contextlib.suppress(*_NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)
