"""How a finished file comes to its place, where that is the user's: a link, a file with a mode, a disk without rename.

Plain writers follow symbolic links, write through hard links, keep the mode of a file that is there, and refuse one
that may not be written to. The same here, only that a new file takes the place of the old one at once where it can.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import shutil
import stat
from pathlib import Path

from nnunet_lowmem.errors import DamagedFileError, WriteError
from nnunet_lowmem.system import platform

# what file systems without rename say, and others of a file that cannot be replaced: it is mounted there, only its
# owner may, or it lies on another disk than what was written
_NO_RENAME = (
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL),
    *(errno.EPERM, errno.EACCES, errno.EBUSY, errno.EXDEV),
)
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS)
_CHUNK_BYTES = 2**20


def place_of(final: Path) -> Path:
    """Return the file that is written where `final` is asked for: the one at the end of its symbolic links.

    Raises
    ------
    WriteError
        If there can be no such file, or it may not be written to.
    """
    place, named = final, f"{final}:"
    if os.path.islink(final):
        place = Path(os.path.realpath(final))
        named = f"{final}: is a symbolic link to {place}, which"
        if not place.parent.is_dir():
            raise WriteError(f"{named} lies in no folder; make {place.parent} or remove the link")
    try:
        status = place.stat()
    except FileNotFoundError:
        return place
    except OSError as error:
        raise WriteError(f"{named} cannot be reached: {error.strerror}; remove it or choose another output") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "device or pipe"
        raise WriteError(f"{named} is a {kind} and no file; remove it or choose another output")
    if not os.access(place, os.W_OK):
        mode = stat.S_IMODE(status.st_mode)
        raise WriteError(f"{named} may not be written to, its mode is {mode:04o}; change that or remove it")
    return place


def put(written: Path, place: Path) -> None:
    """Let the finished file `written` become the file `place` by its name; of an older file owner and mode are kept.

    Where `place` has other hard links, or cannot be renamed to, it becomes a verified copy.

    Raises
    ------
    WriteError
        If the copy failed and the older content is lost: an empty file is left, or none if it had one name only.
    OSError, DamagedFileError
        If `place` is as it was.
    """
    older = place.stat() if place.exists() else None
    if older is not None and older.st_nlink > 1:
        _copy(written, place, older)
        return
    if older is not None:
        _keep_owner_and_mode(written, older)
    try:
        platform.replace(written, place)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        _copy(written, place, older)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk, where it can."""
    try:
        descriptor = platform.open_to_flush(path)
        if descriptor is None:
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # some network file systems cannot, and keep what they hold safe in their own way; a folder may be write-only
        if error.errno not in _NO_FSYNC:
            raise


def _keep_owner_and_mode(written: Path, older: os.stat_result) -> None:
    mine = written.stat()
    if (mine.st_uid, mine.st_gid) != (older.st_uid, older.st_gid):
        platform.give(written, older)
    with contextlib.suppress(OSError):  # a file system without modes
        written.chmod(stat.S_IMODE(older.st_mode))


def _copy(written: Path, place: Path, older: os.stat_result | None) -> None:
    """Copy in place; whatever ends it, even the process, no part of the new file passes for a file."""
    old_bytes = 0 if older is None else older.st_size
    if shutil.disk_usage(place.parent).free + old_bytes < written.stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with written.open("rb") as source:
        # emptied as it is opened: a part then ends too early, where one that ends like the old file might look whole
        target = place.open("wb")
        try:
            with target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            flush(place)
            if not filecmp.cmp(written, place, shallow=False):
                raise DamagedFileError("what was copied reads otherwise than what was written")
        except BaseException as error:
            _leave_no_part(place, older)
            if older is None or not isinstance(error, Exception):
                raise
            raise _lost(place, older, error) from error


def _leave_no_part(place: Path, older: os.stat_result | None) -> None:
    with contextlib.suppress(OSError):
        os.truncate(place, 0)
    if older is None or older.st_nlink <= 1:
        with contextlib.suppress(OSError):
            place.unlink()


def _lost(place: Path, older: os.stat_result, error: Exception) -> WriteError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    why, left = "it cannot be renamed to", "it is removed"
    if older.st_nlink > 1:
        why, left = f"it has {older.st_nlink} names (hard links)", "all are empty now"
    told = WriteError(
        f"{place}: the old file and the new one are lost: copying in place, since {why}, failed: {reason}; {left}"
    )
    told.errno = getattr(error, "errno", None)
    return told
