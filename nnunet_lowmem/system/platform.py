"""What differs between Linux, macOS and Windows: the one module that asks which of them this is.

Here are every call into the C library and every name that only POSIX has. Each function has an answer everywhere: the
next best thing, nothing, or None for what cannot be known, which is never the same as 0. What is usually there may be
missing: all of ``/proc`` in a chroot, single files and fields of it in gVisor and in old kernels, the processes of
others under ``hidepid``. No other module asks for the platform.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_LINUX = sys.platform == "linux"
_WINDOWS = sys.platform == "win32"

#: What a full disk, an exhausted quota and the size limit of a file system or of ``ulimit -f`` say.
DISK_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
#: What `multiprocessing` gives, negative, for a process that was ended at once.
KILLED = getattr(signal, "SIGKILL", 9)

# glibc's number for the size from which a block is mapped on its own, and Linux' for the signal of a parent's death
_M_MMAP_THRESHOLD = -3
_PR_SET_PDEATHSIG = 1
# Windows' words for a file that somebody else has open: access denied, sharing violation, lock violation
_OPEN_ELSEWHERE = (5, 32, 33)
_NO_RESERVING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_SCANNER_S = 5.0
_SCANNER_LOOK_S = 0.05


# -- memory ------------------------------------------------------------------------------------------------------------


def map_large_blocks(least_bytes: int) -> None:
    """Have the allocator map every block from this size on by itself, and give it back when freed (glibc)."""
    _call_c("mallopt", _M_MMAP_THRESHOLD, least_bytes)


def trim_heap() -> None:
    """Give the blocks of the heap that are free back to the system (glibc)."""
    _call_c("malloc_trim", 0)


def _call_c(name: str, *arguments: int) -> None:
    # Windows has no library without a name: ctypes raises TypeError; other C libraries lack the functions
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)


def by_psutil(ask: Callable[[], T]) -> T | None:
    """Return what psutil answers, None where it has no answer; a process that has ended is no answer either."""
    import psutil  # not for commands that only say how they are called

    try:
        return ask()
    except (psutil.Error, OSError, LookupError, ValueError, AttributeError, NotImplementedError):
        return None  # it reads /proc, too, and raises whatever it stumbles on


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
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes or None


def process_limits() -> dict[str, int]:
    """Return the soft limits of ``setrlimit`` on memory in bytes, by name, where there are any."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    names = [name for name in ("RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_RSS") if hasattr(resource, name)]
    soft_bytes = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
    return {name: limit for name, limit in soft_bytes.items() if limit != resource.RLIM_INFINITY}


# -- processes ---------------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def processor() -> str:
    """Name what computes here, and on Linux what it can; as little as the system tells."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = dict(line.partition(":")[::2] for line in lines)
    told = [value.strip() for name, value in fields.items() if name.strip() in ("model name", "flags", "Features")]
    return " ".join(told) or f"{platform.machine()} {platform.processor()}"


def process_exists(pid: int) -> bool:
    """Whether there is a process of that number, be it one that has ended and that nobody has waited for."""
    if _WINDOWS:  # where signal 0 is Ctrl+C
        import psutil

        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def end_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends; Linux alone can.

    It works where no Python code runs: in a stopped process, in a long call into C.
    """
    if _LINUX:
        _call_c("prctl", _PR_SET_PDEATHSIG, KILLED, 0, 0, 0)


def end_session(child: subprocess.Popen[Any]) -> None:
    """End at once the session that `child` has begun (``start_new_session``), or itself where there are none."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, KILLED)
    else:
        child.kill()


def become(program: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Let `program` take the place of this process; where the shell would not wait for it, return its exit code."""
    if not _WINDOWS:
        os.execve(program, arguments, environment)
    return subprocess.call([program, *arguments[1:]], env=environment)


def process_space() -> str:
    """Return what tells the place within which a process id means one process, besides the machine's name.

    On Linux the boot of its kernel and the space of process ids: containers on one machine share the former and may
    share a name, machines made from one image may share theirs. Elsewhere the address of its network card.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    try:
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return boot


# -- signals -----------------------------------------------------------------------------------------------------------


def signals_named(names: Sequence[str]) -> list[signal.Signals]:
    """Return those of the signals that this system has."""
    return [signal.Signals[name] for name in names if name in signal.Signals.__members__]


@contextlib.contextmanager
def blocked_signals(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Put signals off in this thread, and in processes that it starts in the block, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        # spawn starts it before the first process, and lets SIGINT through again
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def unblock_signals(numbers: Sequence[signal.Signals]) -> None:
    """Let signals through again that the process which started this one has put off."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def caught_signals() -> set[int] | None:
    """Return the signals that have a handler, None where the system does not tell: Python knows none set in C."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        mask = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
    except (OSError, ValueError, StopIteration):
        return None
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


# -- files -------------------------------------------------------------------------------------------------------------


def is_of_this_user(status: os.stat_result) -> bool:
    """Whether a file belongs to the user of this process; true where files have no such owner."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def give(path: Path, owner: os.stat_result) -> None:
    """Give a file the owner and the group of another, as far as this user may."""
    if hasattr(os, "chown"):
        try:
            os.chown(path, owner.st_uid, owner.st_gid)
        except OSError:  # only root gives files away
            with contextlib.suppress(OSError):
                os.chown(path, -1, owner.st_gid)


def file_system_number(path: Path) -> int:
    """Return Linux' number of the type of the file system that holds `path`, which must exist; 0 elsewhere."""
    if not _LINUX:
        return 0
    told = (ctypes.c_long * 64)()  # more than struct statfs, whose first word is the number
    failed = ctypes.CDLL(None).statfs(os.fsencode(path), ctypes.byref(told))
    return 0 if failed else int(told[0]) & 0xFFFFFFFF


def give_back(mapping: mmap.mmap) -> None:
    """Let the pages of a shared mapping go that this process has touched, if it is known how; what they hold stays."""
    if _LINUX:
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_DONTNEED)


def expect_random(mapping: mmap.mmap, *, is_random: bool) -> None:
    """Say whether the pages of a mapping are asked for in no order: then nothing is read ahead, nor in large blocks."""
    if _LINUX:
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_RANDOM if is_random else mmap.MADV_NORMAL)


def reserve(descriptor: int, size_bytes: int) -> None:
    """Give an empty open file its room on the disk: by asking for it, or else by writing zeros.

    Raises
    ------
    OSError
        If there is too little; a page of a sparse file that finds no room would end the process.
    """
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        return
    except AttributeError:  # macOS and Windows
        pass
    except OSError as error:
        if error.errno not in _NO_RESERVING:
            raise
    zeros = memoryview(bytes(2**20))
    while size_bytes > 0:
        size_bytes -= os.write(descriptor, zeros[:size_bytes])


def open_to_flush(path: Path) -> int | None:
    """Open a file or folder such that `os.fsync` takes it; None for a folder where folders cannot be opened."""
    if not _WINDOWS:
        # some file systems open nothing for both reading and writing
        return os.open(path, os.O_RDONLY)
    # flushed is only what is open for writing
    return None if path.is_dir() else os.open(path, os.O_RDWR)


def replace(source: Path, target: Path) -> None:
    """Rename a file over another; on Windows patiently, since scanners and indexers open what has just been written.

    Raises
    ------
    OSError
        As `os.replace`.
    """
    deadline_s = time.monotonic() + _SCANNER_S
    while True:
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if not _is_open_elsewhere(error) or time.monotonic() >= deadline_s:
                raise
        time.sleep(_SCANNER_LOOK_S)


def _is_open_elsewhere(error: OSError) -> bool:
    return _WINDOWS and getattr(error, "winerror", None) in _OPEN_ELSEWHERE


def users_cache() -> str:
    """Return the folder for what programs can make again; it may begin with ``~``."""
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    if sys.platform == "darwin":
        return "~/Library/Caches"
    stated = os.environ.get("XDG_CACHE_HOME", "")
    return stated if os.path.isabs(stated) else "~/.cache"  # relative ones are not valid, says the standard


def lock(descriptor: int) -> bool | None:
    """Lock an open file for this process, until it is closed or the process ends, however it does.

    Returns
    -------
    bool or None
        False if another has locked it; None where the file system has no locks.
    """
    try:
        _lock(descriptor)
    except _LOCKED_BY_ANOTHER:
        return False
    except OSError:
        return None
    return True


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BY_ANOTHER = PermissionError

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    _LOCKED_BY_ANOTHER = BlockingIOError

    def _lock(descriptor: int) -> None:
        # one of the open file, not of the process: it survives that somebody else in here opens and closes the file
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
