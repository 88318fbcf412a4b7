"""Files that appear whole or not at all, and folders that do not outlive their process.

An output is written under its own name into a hidden folder beside its target, verified, flushed to the disk and only
then renamed: whoever looks, at any moment, sees nothing, the old file, or the new one (`placing` has the exceptions).
The folder keeps the name (and so every ending a writer may ask for) intact, and keeps the unfinished file out of
listings of cases. Where the output is a symbolic link, the folder is beside the file that it leads to.

The name of such a folder tells who owns it. Folders of processes that have ended are removed by the next run; where
the owner is on another machine or in another container, which cannot be asked, once nothing in them changed for a day.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import psutil

from nnunet_lowmem.errors import DamagedFileError, LowMemError, UsageError, WriteError, because
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.placing import flush, place_of, put
from nnunet_lowmem.system.told import process_exists

#: Age after which a folder is taken for abandoned although its owner cannot be asked.
UNKNOWN_OWNER_S = 24 * 3600

# the second where names that begin with a dot are forbidden
_PARTIAL = (".partial", "lowmem_partial")
_TEMPORARY = "nnunet_lowmem"
_OWNED = re.compile(r"(.+)-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
_NO_FOLDER = (errno.EPERM, errno.EACCES, errno.EROFS, errno.EINVAL)
_ALMOST_FULL_BYTES = 2**20

# names of folders this process has made and not yet removed
_live: set[str] = set()


@contextlib.contextmanager
def atomic_output(
    final: Path, verify: Callable[[Path], object] | None = None, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Give a path to write to; what is there at the end of the block becomes `final`, or the file that it links to.

    What the writer leaves beside that path (a header, a sidecar) is moved along, before the file itself.

    Parameters
    ----------
    final : Path
        The file to be; its folder must exist. An older file stays until the new one is complete.
    verify : callable, optional
        Called with the written path before it gets its name; see `volumes.verifying`.
    needed_bytes : int, optional
        Free bytes without which it need not be tried.

    Yields
    ------
    Path
        A path of the same name in a private folder beside `final`.

    Raises
    ------
    WriteError
        If the disk is full, the file cannot be written, is missing or damaged, or cannot be flushed or renamed; or if
        what is there is no file or write-protected. Errors of the block that concern neither the disk nor that file
        pass through. In every case, KeyboardInterrupt included, what was written is removed.
    """
    place = place_of(final)
    if needed_bytes is not None:
        require_free_bytes(place, needed_bytes)
    folder = _partial_folder(final, place)
    try:
        try:
            yield folder / final.name
        except Exception as error:
            if isinstance(error, LowMemError) or not _is_about_writing(error, folder):
                raise
            raise _write_error(final, error, folder, needed_bytes) from error
        try:
            _publish(folder, final, place, verify)
        except WriteError:
            raise
        except (OSError, DamagedFileError) as error:
            raise _write_error(final, error, folder, needed_bytes) from error
    finally:
        _remove_owned_folder(folder)


def require_free_bytes(path: Path, needed_bytes: int, remedy: str = "make room or choose another folder") -> None:
    """Refuse where the disk of `path`, a file to be or its folder, has less than `needed_bytes` free.

    Raises
    ------
    WriteError
        With both numbers.
    """
    folder = path if path.is_dir() else path.parent
    free_bytes = _free_bytes(folder)
    if free_bytes is not None and free_bytes < needed_bytes:
        raise WriteError(
            f"{path}: needs {format_gib(needed_bytes)}, but {folder} has only {format_gib(free_bytes)} free; {remedy}"
        )


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
        folder = _make_owned_folder(parent, _TEMPORARY)
    except OSError as error:
        text = f"--tmp_dir {tmp_dir or ''}: cannot make a folder there: {error.strerror or error}"
        raise because(UsageError, text, error) from error
    try:
        remove_stale(parent)
        yield folder
    finally:
        _remove_owned_folder(folder)


def remove_stale(folder: Path) -> list[Path]:
    """Remove what `atomic_output` and `temporary_folder` of ended processes have left directly in `folder`.

    Returns
    -------
    list of Path
        What was removed. Folders of living processes, of other users, and links are left alone.
    """
    try:
        folders = [path for path in sorted(folder.iterdir()) if path.name not in _live and path.is_dir()]
    except OSError:
        return []
    paths = [path for path in folders if is_left_over(path, path.name, (*_PARTIAL, _TEMPORARY))]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in paths if not path.exists()]


def _make_owned_folder(parent: Path, kind: str) -> Path:
    folder = parent / owned_name(kind, secrets.token_hex(4))
    # registered first: another thread may be removing stale folders right now
    _live.add(folder.name)
    try:
        folder.mkdir(mode=0o700)
    except BaseException:
        _live.discard(folder.name)
        raise
    return folder


def _remove_owned_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        _live.discard(folder.name)


@cache
def _host() -> str:
    """Return eight digits for the machine and the container, within which a process id means one process."""
    try:
        # Linux: containers on one machine may share its name, but not the space of process ids
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def owned_name(kind: str, unique: str) -> str:
    """Return a name that no other process has, and that tells which one it belongs to."""
    return f"{kind}-{_host()}-{os.getpid()}-{unique}"


def is_left_over(path: Path, name: str, kinds: Collection[str]) -> bool:
    """Whether `path`, a file or folder of this user, has an `owned_name` of one of `kinds`, and its owner has ended."""
    match = _OWNED.fullmatch(name)
    if match is None or match[1] not in kinds or not _is_own(path):
        return False
    host, pid = match[2], int(match[3])
    if host != _host():
        return _age_s(path) > UNKNOWN_OWNER_S
    # in a container that was started again the predecessor had the same process id
    return pid == os.getpid() or not _is_running(pid)


def _is_own(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())


def _age_s(owned: Path) -> float:
    try:
        newest: float = max(path.stat().st_mtime for path in (owned, *(owned.iterdir() if owned.is_dir() else ())))
    except OSError:  # somebody works in it
        return 0.0
    return time.time() - newest


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # or there is no /proc
        return process_exists(pid)
    except psutil.Error:
        return True


def _partial_folder(final: Path, place: Path) -> Path:
    """Make a folder on the disk of `place`, or beside `final`: a file may be written to where no other may be made."""
    parents = list(dict.fromkeys((place.parent, final.parent)))
    for parent, kind in product(parents, _PARTIAL):
        try:
            folder = _make_owned_folder(parent, kind)
        except OSError as error:
            failed = error
            if error.errno in _NO_FOLDER:
                continue
            break
        if parent != final.parent:  # which no run looks through when it begins
            remove_stale(parent)
        return folder
    raise _write_error(final, failed) from failed


def _publish(folder: Path, final: Path, place: Path, verify: Callable[[Path], object] | None) -> None:
    partial = folder / final.name
    if not partial.is_file():
        raise DamagedFileError("the writer left no such file")
    if verify is not None:
        verify(partial)
    # the file itself last: who sees it finds what belongs to it
    sidecars = sorted(path for path in folder.iterdir() if path != partial)
    places = {path: place_of(final.parent / path.name) for path in sidecars} | {partial: place}
    for path in places:
        flush(path)
    for path, its_place in places.items():
        put(path, its_place)
    try:
        for parent in {its_place.parent for its_place in places.values()}:
            flush(parent)
    except OSError as error:
        raise WriteError(f"{final}: is complete, but its name may not survive a power cut: {error}") from error


def _is_about_writing(error: Exception, folder: Path) -> bool:
    if getattr(error, "errno", None) in _DISK_FULL or str(folder) in str(error):
        return True
    if not isinstance(error, OSError) or error.errno is not None:
        return False
    # libraries that notice a short write themselves (numpy's tofile) give no number
    free_bytes = _free_bytes(folder)
    return free_bytes is not None and free_bytes < _ALMOST_FULL_BYTES


def _write_error(
    final: Path, error: Exception, folder: Path | None = None, needed_bytes: int | None = None
) -> WriteError:
    # ITK tells its errors in many lines
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    disk, written_bytes = (final.parent, 0) if folder is None else (folder.parent, _size_bytes(folder))
    free_bytes = _free_bytes(disk)
    of_needed = "" if needed_bytes is None else f" of {format_gib(needed_bytes)}"
    told = f"{final}: could not be written whole: {reason}; {format_gib(written_bytes)}{of_needed} written"
    if free_bytes is not None:
        told += f", {format_gib(free_bytes)} free in {disk}"
    result = because(WriteError, f"{told}; the unfinished file is removed", error)
    result.errno = getattr(error, "errno", None)
    return result


def _size_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
