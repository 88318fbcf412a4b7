"""Files that appear whole or not at all.

An output is written under its own name into a hidden folder beside its target, verified, flushed to the disk and only
then renamed: whoever looks, at any moment, sees nothing, the old file, or the new one (`placing` has the exceptions).
The folder keeps the name (and so every ending a writer may ask for) intact, and keeps the unfinished file out of
listings of cases. Where the output is a symbolic link, the folder is beside the file that it leads to; where no folder
can be made or listed there, it is the system's for temporary files, and the output a verified copy.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from nnunet_lowmem.errors import DamagedFileError, LowMemError, WriteError, because
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system import platform
from nnunet_lowmem.system.owned_folders import (
    PARTIAL,
    SIGN_FILE,
    make_owned_folder,
    remove_owned_folder,
    remove_stale,
    trial_file,
)
from nnunet_lowmem.system.placing import flush, place_of, put

logger = logging.getLogger(__name__)

_NO_FOLDER = (errno.EPERM, errno.EACCES, errno.EROFS, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_ALMOST_FULL_BYTES = 2**20


def try_output(folder: Path, is_folder: bool = False) -> None:
    """Publish a small file in `folder` as every output will be, and remove it: what cannot be done shows before work.

    Where outputs are folders, a folder with a file in it.

    Raises
    ------
    WriteError
        If outputs could not be written there.
    """
    with trial_file(folder) as final:
        try:
            with atomic_output(final) as path:
                if is_folder:
                    path.mkdir()
                (path / "file" if is_folder else path).write_bytes(b"written to see whether it can be\n")
        except OSError as failure:
            error = failure if isinstance(failure, WriteError) else _write_error(final, failure)
            text = f"outputs cannot be written to {folder}, nothing was computed: {error}; choose another folder"
            refusal = because(WriteError, text, failure)
            refusal.errno = error.errno
            raise refusal from failure
        try:
            (shutil.rmtree if is_folder else os.unlink)(final)
        except OSError as error:
            logger.warning(
                "%s: what is written there cannot be removed (%s); unfinished files will stay", folder, error.strerror
            )


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
        if needed_bytes is not None and folder.parent != place.parent:
            require_free_bytes(folder.parent, needed_bytes)
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
        remove_owned_folder(folder)


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


def _partial_folder(final: Path, place: Path) -> Path:
    """Make a folder on the disk of `place`, or elsewhere: a file may be written to where no other may be made."""
    for parent, kind in product(dict.fromkeys((place.parent, final.parent, None)), PARTIAL):
        try:
            folder = make_owned_folder(parent or Path(tempfile.gettempdir()), kind)
        except OSError as error:
            failed = error
            if error.errno in _NO_FOLDER:
                continue
            break
        if parent != final.parent:  # which no run looks through when it begins
            remove_stale(folder.parent)
        return folder
    raise _write_error(final, failed) from failed


def _publish(folder: Path, final: Path, place: Path, verify: Callable[[Path], object] | None) -> None:
    partial = folder / final.name
    if not partial.exists():
        raise DamagedFileError("the writer left no such file")
    if verify is not None:
        verify(partial)
    # the file itself last: who sees it finds what belongs to it
    sidecars = sorted(path for path in folder.iterdir() if path not in (partial, folder / SIGN_FILE))
    places = {path: place_of(final.parent / path.name) for path in sidecars} | {partial: place}
    for path in places:
        for inside in path.rglob("*") if path.is_dir() else ():
            flush(inside)
        flush(path)
    for path, its_place in places.items():
        put(path, its_place)
    try:
        for parent in {its_place.parent for its_place in places.values()}:
            flush(parent)
    except OSError as error:
        raise WriteError(f"{final}: is complete, but its name may not survive a power cut: {error}") from error


def _is_about_writing(error: Exception, folder: Path) -> bool:
    if getattr(error, "errno", None) in platform.DISK_FULL or str(folder) in str(error):
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
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
