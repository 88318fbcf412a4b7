"""What the system tells when it is asked; None where it does not tell, which is never the same as 0.

What is usually there may be missing: all of ``/proc`` in a chroot, single files and fields of it in gVisor and in old
kernels, the processes of others under ``hidepid``. psutil reads the same files and then raises whatever it stumbles on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

_NOT_TOLD = (psutil.Error, OSError, LookupError, ValueError, AttributeError, NotImplementedError)


def by_psutil(ask: Callable[[], T]) -> T | None:
    """Return what psutil answers, None where it has no answer; a process that has ended is no answer either."""
    try:
        return ask()
    except _NOT_TOLD:
        return None


def process_exists(pid: int) -> bool:
    """Whether there is a process of that number, be it one that has ended and that nobody has waited for."""
    if _signal_0_is_a_key():
        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def sysconf_bytes(pages: str) -> int | None:
    """Return a number of pages that ``sysconf`` tells, in bytes; it asks the kernel where ``/proc`` is missing."""
    try:
        count = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, a name that is not known here
        return None
    return count if count > 0 else None


def most_resident_bytes() -> int | None:
    """Return the most that this process has held so far; never less than what it holds.

    Linux hands it on when a process starts another, so that it may be what the parent held.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _maxrss_unit_bytes() or None


def _signal_0_is_a_key() -> bool:  # -> platform.py
    """Windows: signal 0 is Ctrl+C."""
    return os.name == "nt"


def _maxrss_unit_bytes() -> int:  # -> platform.py
    """Bytes on macOS, KiB elsewhere."""
    return 1 if os.uname().sysname == "Darwin" else 1024
