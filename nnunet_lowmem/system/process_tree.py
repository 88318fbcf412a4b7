"""What the system tells about other processes: their state, CPU time, memory, descendants and end.

Read are only files of ``/proc`` that need no lock of the process itself, since a process that hangs in the kernel may
hold it: hence resident size and not PSS.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.memory_limits import cgroup_folders, counter
from nnunet_lowmem.system.platform import by_psutil, process_exists

_STATE_WORDS = {
    psutil.STATUS_RUNNING: "running",
    psutil.STATUS_SLEEPING: "sleeping (waiting for a lock, a pipe or a timer)",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk or network file system",
    psutil.STATUS_STOPPED: "stopped (by SIGSTOP, or by its terminal)",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_ZOMBIE: "at its end",
}


class ProcessTree:
    """A process and its descendants; what has ended counts nothing.

    Parameters
    ----------
    pid : int
        Root of the tree. Another process that gets the same number later is not mistaken for it.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descendants: list[psutil.Process] = []
        self._root = by_psutil(lambda: psutil.Process(pid))
        # without /proc there may be one of which nothing is told
        self._untold = self._root is None and process_exists(pid)

    def alive(self) -> bool:
        """Return whether the root still exists, be it as a process that nobody has waited for."""
        if self._root is None:
            return self._untold and process_exists(self._pid)
        told = by_psutil(self._root.is_running)
        return process_exists(self._pid) if told is None else told

    def state(self) -> str:
        """Return the state of the root in words."""
        status = None if self._root is None else by_psutil(self._root.status)
        if status is None:
            return "in a state that is not told" if self.alive() else "gone"
        return _STATE_WORDS.get(status, str(status))

    def cpu_s(self) -> float | None:
        """Return the CPU seconds of all; it shrinks when a descendant ends that nobody waits for.

        None where they are not told: then nobody can tell work from waiting.
        """
        if self._untold:
            return time.process_time() if self._pid == os.getpid() else None
        self.note_descendants()
        # user and system, then the same of children that were waited for
        return float(sum(sum(times[:4]) for times in self._each(psutil.Process.cpu_times)))

    def holds(self) -> str:
        """Return the resident size of all in words, shared pages counted by each."""
        sizes = [memory.rss for memory in self._each(psutil.Process.memory_info)]
        return format_gib(sum(sizes)) if sizes or not self.alive() else "memory that is not told"

    def note_descendants(self) -> None:
        """Remember the descendants there are now: they can no longer be found once the root has ended."""
        if self._root is not None:
            root = self._root
            self._descendants = by_psutil(lambda: root.children(recursive=True)) or self._descendants

    def end_descendants(self, grace_s: float) -> None:
        """Send SIGKILL to the remembered descendants that have not ended within `grace_s` seconds."""
        _, alive = psutil.wait_procs(self._descendants, timeout=grace_s)
        for process in alive:
            by_psutil(process.kill)

    def ended(self) -> bool:
        """Return whether nothing of the tree runs any more, be it that nobody has waited for it."""
        return all(status == psutil.STATUS_ZOMBIE for status in self._each(psutil.Process.status))

    def _each(self, ask: Callable[[psutil.Process], Any]) -> Iterator[Any]:
        for process in filter(None, (self._root, *self._descendants)):
            told = by_psutil(partial(ask, process))
            if told is not None:
                yield told


def exit_words(code: int | None) -> str:
    """Return an exit code of `multiprocessing` in words: ``SIGSEGV`` for -11, ``exit code 3``."""
    if code is None:
        return "exit code unknown, somebody else has waited for the process"
    if code >= 0:
        # Windows reports crashes as large numbers that are known by their hexadecimal form
        return f"exit code {code if code < 256 else hex(code)}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def oom_kills(root: Path = Path("/")) -> int | None:
    """Return how many processes the kernel has ended for want of memory, where it counts them nearest to this one.

    Parameters
    ----------
    root : Path
        Folder that holds ``proc`` and ``sys``.

    Returns
    -------
    int or None
        ``oom_kill`` of this process's memory cgroup (v2 ``memory.events``, v1 ``memory.oom_control``), else that of the
        whole machine (``proc/vmstat``), else None.
    """
    files = [*(folder / names.kills for folder, names in cgroup_folders(root)), root / "proc/vmstat"]
    counts = (counter(path, "oom_kill") for path in files)
    return next((count for count in counts if count is not None), None)
