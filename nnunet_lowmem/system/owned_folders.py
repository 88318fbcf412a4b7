"""Folders that do not outlive their process, whatever ends it, and whose owner shows that it lives.

The name of such a folder tells who owns it: the machine or container, and the process. Folders of processes that have
ended are removed by the next run that looks. Whether the owner has ended is never guessed from the age of what it
wrote: it keeps a file in the folder locked, which the system gives free however the process ends, and writes to it
every minute. The lock tells on the same machine, and on others where the file system passes it on. Where it does not,
an owner of another machine, which cannot be asked, has ended when that file has not changed for a day, measured by the
clock of the file system itself: clocks of machines may differ, where a server tells the time of a file.
"""

from __future__ import annotations

import contextlib
import os
import platform as machine
import re
import secrets
import shutil
import stat
import tempfile
import threading
import zlib
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import psutil

from nnunet_lowmem.errors import UsageError, because
from nnunet_lowmem.system import platform

#: Seconds without a beat after which an owner that cannot be asked has ended.
UNKNOWN_OWNER_S = 24 * 3600
BEAT_S = 60.0
# how long a server may take to answer before it is not waited for
_PATIENCE_S = 5.0
#: The file in an owned folder that shows that the owner lives.
SIGN_FILE = "owner_is_alive"

#: Kinds of folders for unfinished outputs; the second where names that begin with a dot are forbidden.
PARTIAL = (".partial", "lowmem_partial")
_TEMPORARY = "nnunet_lowmem"
#: Kind of files that are there for a moment, to see what the file system does.
TRIAL = "lowmem_trial"
_KINDS = (*PARTIAL, _TEMPORARY, TRIAL)
_OWNED = re.compile(r"(.+)-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}")

# names of folders this process has made and not yet removed, with the sign of life in each
_live: dict[str, _Sign | None] = {}


@contextlib.contextmanager
def temporary_folder(tmp_dir: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give an empty folder that is removed, with all it holds, however the block ends.

    Those that earlier processes had to leave behind are removed first.

    Parameters
    ----------
    tmp_dir : path, optional
        Where to make it; the system's folder for temporary files if not given.

    Yields
    ------
    Path
        ``nnunet_lowmem-<host>-<pid>-<random>``, readable by this user only.

    Raises
    ------
    UsageError
        If `tmp_dir` is missing, not a folder, or cannot be written to.
    """
    try:
        parent = Path(tempfile.gettempdir() if tmp_dir is None else tmp_dir)
        folder = make_owned_folder(parent, _TEMPORARY)
    except OSError as error:
        text = f"--tmp_dir {tmp_dir or ''}: cannot make a folder there: {error.strerror or error}"
        raise because(UsageError, text, error) from error
    try:
        remove_stale(parent)
        yield folder
    finally:
        remove_owned_folder(folder)


def remove_stale(folder: Path) -> list[Path]:
    """Remove what ended processes have left of their folders directly in `folder`.

    Returns
    -------
    list of Path
        What was removed. Folders of living processes, of other users, and links are left alone.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if path.name not in _live]
    except OSError:
        return []
    paths = [path for path in paths if is_left_over(path, path.name, _KINDS)]
    for path in paths:
        _remove(path)
    return [path for path in paths if not path.exists()]


def make_owned_folder(parent: Path, kind: str) -> Path:
    """Make a folder that shows that this process lives, until `remove_owned_folder`.

    Raises
    ------
    OSError
        If no folder can be made there, or what it holds cannot be listed.
    """
    folder = parent / owned_name(kind, secrets.token_hex(4))
    # registered first: another thread may be removing stale folders right now
    _live[folder.name] = None
    try:
        folder.mkdir(mode=0o700)
        _live[folder.name] = _Sign(folder)
        os.listdir(folder)
    except BaseException:
        remove_owned_folder(folder)
        raise
    return folder


def remove_owned_folder(folder: Path) -> None:
    """Remove a folder of `make_owned_folder` and all it holds, as far as the file system lets it."""
    try:
        sign = _live.get(folder.name)
        if sign is not None:
            sign.close()
    finally:
        try:
            _remove(folder)
        finally:
            _live.pop(folder.name, None)


@contextlib.contextmanager
def trial_file(folder: Path) -> Iterator[Path]:
    """Give the path of a file to be made and removed in `folder`, which nobody takes for left over meanwhile."""
    path = folder / owned_name(TRIAL, secrets.token_hex(4))
    _live[path.name] = None
    try:
        yield path
    finally:
        _live.pop(path.name, None)


def owned_name(kind: str, unique: str) -> str:
    """Return a name that no other process has, and that tells which one it belongs to."""
    return f"{kind}-{_host()}-{os.getpid()}-{unique}"


def is_left_over(path: Path, name: str, kinds: Collection[str]) -> bool:
    """Whether `path`, a file or folder of this user, has an `owned_name` of one of `kinds`, and its owner has ended."""
    match = _OWNED.fullmatch(name)
    if match is None or match[1] not in kinds or not _is_own(path) or _is_locked(path / SIGN_FILE):
        return False
    host, pid = match[2], int(match[3])
    if host != _host():
        return _since_last_beat_s(path) > UNKNOWN_OWNER_S
    # in a container that was started again the predecessor had the same process id
    return pid == os.getpid() or not _is_running(pid)


class _Sign:
    """Shows that the owner of a folder lives, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # then the beats are the folder's own
            # not for reading: some file systems open nothing for both
            self._descriptor = os.open(folder / SIGN_FILE, os.O_WRONLY | os.O_CREAT, 0o600)
        self._is_shown, self._closed = threading.Event(), threading.Event()
        # in a thread, since servers that do not answer hold up whoever asks for a lock, or writes
        self._thread = threading.Thread(target=self._run, name="nnunet_lowmem sign of life", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread to be had: a process of this machine is seen to run
            self._thread.start()
            self._is_shown.wait(_PATIENCE_S)

    def close(self) -> None:
        """End the beats, free the lock, and remove the file."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE_S)
        if self._descriptor is not None and not self._thread.is_alive():
            # closed first: Windows and network file systems keep a file as long as it is open
            os.close(self._descriptor)
            self._descriptor = None
        with contextlib.suppress(OSError):
            (self._folder / SIGN_FILE).unlink()

    def _run(self) -> None:
        self._lock()
        self._is_shown.set()
        while not self._closed.wait(BEAT_S):
            self._lock()  # again, in case somebody tried it in the moment when the file was made
            try:
                self._beat()
            except OSError:  # a full disk, a file system that writes files in one go
                with contextlib.suppress(OSError):
                    os.utime(self._folder)

    def _lock(self) -> None:
        if self._descriptor is not None:
            platform.lock(self._descriptor)

    def _beat(self) -> None:
        if self._descriptor is None:
            os.utime(self._folder)
            return
        os.write(self._descriptor, b"\n")
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        # only what has reached a server bears the time of its clock
        os.fsync(self._descriptor)


def _is_locked(sign: Path) -> bool:
    """Whether the owner has locked its sign; true, too, where the file system does not answer."""
    is_free = threading.Event()

    def look() -> None:
        try:
            descriptor = os.open(sign, os.O_WRONLY)
        except OSError:
            is_free.set()
            return
        try:
            if platform.lock(descriptor) is not False:
                is_free.set()
        finally:
            os.close(descriptor)

    looking = threading.Thread(target=look, name="nnunet_lowmem look for a sign of life", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread to be had
        looking.start()
        looking.join(_PATIENCE_S)
    return not is_free.is_set()


def _since_last_beat_s(owned: Path) -> float:
    """Return the seconds since anything in it was written, by the file system's clock; 0 if that cannot be told."""
    try:
        written = (owned, *(owned.iterdir() if owned.is_dir() else ()))
        last_beat: float = max(path.stat().st_mtime for path in written)
        with trial_file(owned.parent) as clock:
            descriptor = os.open(clock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                return os.fstat(descriptor).st_mtime - last_beat
            finally:
                os.close(descriptor)
                clock.unlink()
    except OSError:  # somebody works in it
        return 0.0


@cache
def _host() -> str:
    """Return eight digits for the machine and the container, within which a process id means one process."""
    return f"{zlib.crc32(f'{machine.node()} {platform.process_space()}'.encode()):08x}"


def _is_own(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and platform.is_of_this_user(status)


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # or there is no /proc
        return platform.process_exists(pid)
    except psutil.Error:
        return True


def _remove(path: Path) -> None:
    # an empty folder goes even where folders cannot be listed
    remove_one = path.rmdir if path.is_dir() else path.unlink
    try:
        remove_one()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
