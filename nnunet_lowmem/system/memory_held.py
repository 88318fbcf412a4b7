"""How much memory a process tree really holds, now and at its peak.

Counted is what no one can take away and no one else pays for: anonymous pages and shared memory, each page divided by
the number of processes that map it (the kernel's PSS). Files that are mapped or cached are not counted, and libraries
are only with what they wrote. Where that is not told, the nearest that is more stands in: anonymous and shared pages in
full (Linux before 4.14), resident size with files (before 4.5, gVisor), what psutil offers (USS, else RSS), and without
``/proc`` the most that this process has held so far. What nobody tells is left out, and a warning says so once.

A `PeakSampler` samples: what comes and goes between two samples is missed, as is what happens while another thread
keeps the interpreter's lock. Children that outlive their parent leave the tree. Swapped-out pages are not counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import psutil

from nnunet_lowmem.system.platform import by_psutil, most_resident_bytes, process_exists

# the pause after a round, and after an exact reading, is so many times what it cost: below 1 % of a core for each
_PAUSE_PER_COST = 132
_TIMELINE_POINTS = 2048

_logger = logging.getLogger(__name__)


def process_tree_bytes(pid: int | None = None) -> int:
    """Return the bytes of anonymous and shared memory of a process and its descendants, shared pages counted once.

    Parameters
    ----------
    pid : int, optional
        Root of the tree; this process if not given.

    Returns
    -------
    int
        0 where the process does not exist (any more). Processes whose memory nobody tells are left out, with a
        warning.
    """
    return sum(_known(_proportional_bytes, _tree_pids(os.getpid() if pid is None else pid)).values())


def process_bytes() -> int:
    """Return the bytes of anonymous and shared memory of this process without its descendants."""
    return sum(_known(_proportional_bytes, [os.getpid()]).values())


def status_bytes(*names: bytes) -> int | None:
    """Return the sum of fields that the kernel tells of this process, such as ``VmData:``; None where it does not."""
    return _sum_of_fields(_read("/proc/self/status"), names)


class PeakSampler:
    """Watch the memory of a process tree from a thread, stage by stage.

    A context manager: the thread starts on entering and is joined on leaving. Reading PSS walks page tables (up to 5 ms
    per GiB), so each round first adds up the resident sizes, which the kernel keeps at hand and which are never less
    than the PSS. The PSS is read where that sum passes the stage's peak, as long as that costs no more than 1 % of a
    core, and whenever a process has come or gone, since a forked child at first shares all that its parent has.
    Otherwise the sum less what the last reading found to be counted twice stands in for it.

    Parameters
    ----------
    interval_s : float
        Seconds between rounds; stretched where a round costs more than 1 % of it.
    pid : int, optional
        Root of the tree; this process if not given.
    stage : str
        Name of the first stage.
    descendants : bool
        False watches the root alone.

    Attributes
    ----------
    cpu_s : float
        CPU seconds that sampling has taken so far.
    held_bytes : int
        The latest sample.
    """

    def __init__(
        self, interval_s: float = 0.05, *, pid: int | None = None, stage: str = "start", descendants: bool = True
    ) -> None:
        self.cpu_s = 0.0
        self.held_bytes = 0
        self._interval_s = interval_s
        self._pid = os.getpid() if pid is None else pid
        self._descendants = descendants
        self._stage = stage
        self._peaks: dict[str, int] = {stage: 0}
        self._timeline = Timeline()
        self._counted_twice_bytes = 0
        self._calibrated_pids: list[int] = []
        self._next_exact_s = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nnunet_lowmem peak sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._sample()

    def mark(self, stage: str) -> None:
        """End the present stage and begin, or come back to, the stage of this name."""
        if stage == self._stage:
            return
        self._sample()
        with self._lock:
            self._stage = stage
            self._peaks.setdefault(stage, 0)
        self._sample()

    def peak_bytes(self) -> int:
        """Return the peak of all stages."""
        return max(self.peaks_bytes().values())

    def peaks_bytes(self) -> dict[str, int]:
        """Return the peak of every stage, in the order in which they began."""
        with self._lock:
            return dict(self._peaks)

    def timeline(self) -> list[tuple[float, int]]:
        """Return (seconds since the epoch, bytes) over the run; where it is long, the higher of neighbours is kept."""
        with self._lock:
            return list(self._timeline.points)

    def _run(self) -> None:
        pause_s = self._interval_s
        while not self._stopped.wait(pause_s):
            pause_s = max(self._interval_s, _PAUSE_PER_COST * self._sample())

    def _sample(self) -> float:
        """Take one sample; return the CPU seconds of its cheap part."""
        with self._lock:
            start_s = time.thread_time()
            pids = _tree_pids(self._pid) if self._descendants else [self._pid]
            resident = _known(_resident_bytes, pids)
            resident_bytes = sum(resident.values())
            cost_s = time.thread_time() - start_s
            # kernels that count resident pages per CPU may show less than there is: then this is negative
            upper_bytes = resident_bytes - min(0, self._counted_twice_bytes)
            may_be_a_peak = upper_bytes > self._peaks[self._stage] and time.monotonic() >= self._next_exact_s
            if may_be_a_peak or pids != self._calibrated_pids:
                self._calibrate(resident)
            self.held_bytes = resident_bytes - self._counted_twice_bytes
            self._peaks[self._stage] = max(self._peaks[self._stage], self.held_bytes)
            self._timeline.add(time.time(), self.held_bytes)
            self.cpu_s += time.thread_time() - start_s
            return cost_s

    def _calibrate(self, resident: dict[int, int]) -> None:
        start_s = time.thread_time()
        pids, shares_bytes = list(resident), sum(_known(_proportional_bytes, resident).values())
        if any(held_bytes and not _resident_bytes(pid) for pid, held_bytes in resident.items()):
            # each of those that ended one after the other while they were read had a larger share of the same pages
            pids, shares_bytes = [], min(shares_bytes, self.held_bytes)
        self._counted_twice_bytes = sum(resident.values()) - shares_bytes
        self._calibrated_pids = pids
        self._next_exact_s = time.monotonic() + _PAUSE_PER_COST * (time.thread_time() - start_s)


class Timeline:
    """Points in time of bounded number: when there are too many, each pair gives way to its higher member."""

    def __init__(self) -> None:
        self.points: list[tuple[float, int]] = []

    def add(self, time_s: float, held_bytes: int) -> None:
        """Append a point; times grow."""
        self.points.append((time_s, held_bytes))
        if len(self.points) == _TIMELINE_POINTS:  # an even number
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [max(pair, key=lambda point: point[1]) for pair in pairs]


def _known(ask: Callable[[int], int | None], pids: Iterable[int]) -> dict[int, int]:
    """Ask for every process; 0 for one that nobody tells of, with a warning: what is left to plan by is arithmetic."""
    told = {pid: ask(pid) for pid in pids}
    if None in told.values():
        _warn_once(
            "how much memory this process, or one that it started, holds is not told here (by /proc, psutil or "
            "getrusage): --max_ram cannot be kept for it; plans count what they allocate, and nothing else as in use"
        )
    return {pid: held_bytes or 0 for pid, held_bytes in told.items()}


def _tree_pids(pid: int) -> list[int]:
    """Return the process and its descendants, as far as they can be seen."""
    pids = [pid]
    if not _kernel_lists_children():
        children = by_psutil(lambda: psutil.Process(pid).children(recursive=True))
        return pids + [child.pid for child in children or ()]
    for parent in pids:  # grows while it is walked
        pids.extend(child for child in _children(parent) if not _borrows_memory(child, parent))
    return pids


@cache
def _kernel_lists_children() -> bool:
    return os.path.exists("/proc/thread-self/children")


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, _read(f"/proc/{pid}/task/{thread}/children").split())


def _borrows_memory(child: int, parent: int) -> bool:
    """Tell a child between ``vfork`` and ``exec``: until then it runs in its parent's address space.

    It would be counted a second time in full. A child of ``fork`` differs in its mapped files, which are not copied.
    """
    before = _read(f"/proc/{child}/statm")
    of_parent = _read(f"/proc/{parent}/statm")
    return bool(of_parent) and of_parent in (before, _read(f"/proc/{child}/statm"))


# -- of one process: bytes, 0 for one that has ended, None where it is not told ----------------------------------------


def _proportional_bytes(pid: int) -> int | None:
    """Return the process's share of its anonymous and shared pages; what is nearest above it where that is not told."""
    if _way() is _by_psutil:
        unshared = by_psutil(lambda: int(psutil.Process(pid).memory_full_info().uss))
        return _resident_bytes(pid) if unshared is None else unshared
    rollup = _read(f"/proc/{pid}/smaps_rollup")
    exact = _sum_of_fields(rollup, (b"Pss_Anon:", b"Pss_Shmem:"))
    if exact is not None:
        return exact
    with_files, resident = _sum_of_fields(rollup, (b"Pss:",)), _resident_bytes(pid)  # Linux before 5.4: both are more
    return resident if with_files is None or resident is None else min(with_files, resident)


def _resident_bytes(pid: int) -> int | None:
    """Return the process's anonymous and shared pages, each counted in full."""
    held_bytes = _way()(pid)
    return 0 if held_bytes is None and not process_exists(pid) else held_bytes


@cache
def _way() -> Callable[[int], int | None]:
    """Choose, once, the nearest of what is told here: of this process, which is there and holds memory."""
    way = next((way for way in (_by_status, _by_psutil, _by_its_peak) if way(os.getpid())), _by_nobody)
    if way is _by_its_peak:
        _warn_once(
            "how much memory is in use is not told here (no /proc), only the most that was (getrusage): after the "
            "first case more counts as in use than is, and other processes are not seen; mount /proc to keep --max_ram"
        )
    return way


def _by_status(pid: int) -> int | None:
    text = _read(f"/proc/{pid}/status")
    if not text:
        return None
    held_bytes = _sum_of_fields(text, (b"RssAnon:", b"RssShmem:"))
    if held_bytes is None:  # Linux before 4.5, gVisor: mapped files are counted, too
        held_bytes = _sum_of_fields(text, (b"VmRSS:",))
    return held_bytes or 0  # one that nobody has waited for has no memory


def _by_psutil(pid: int) -> int | None:
    return by_psutil(lambda: int(psutil.Process(pid).memory_info().rss))


def _by_its_peak(pid: int) -> int | None:
    return most_resident_bytes() if pid == os.getpid() else None


def _by_nobody(_: int) -> int | None:
    return None


def _sum_of_fields(text: bytes, names: tuple[bytes, ...]) -> int | None:
    """Add up lines like ``RssAnon:  1234 kB``; None where there are none."""
    fields = [int(line.split()[1]) for line in text.splitlines() if line.startswith(names)]
    return 1024 * sum(fields) if fields else None


def _read(path: str) -> bytes:
    """Return what a file of ``/proc`` holds; nothing where its process ended, or is not ours to look into."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


@cache
def _warn_once(text: str) -> None:
    _logger.warning(text)
