"""Arrays in files of the folder for temporary ones: mapped, so that their pages are the system's."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import WriteError
from nnunet_lowmem.system import platform
from nnunet_lowmem.system.atomic_files import require_free_bytes

# of a mapping, at a time
_MAPPED_BYTES = 2**25


@contextmanager
def told_of_spilling(folder: Path | None) -> Iterator[None]:
    """Say of an error what to do about the folder."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"arrays cannot be spilled to {folder}: {error.strerror or error}; make room there or choose another "
            "folder with --tmp_dir"
        ) from error


def spilled_array(shape: tuple[int, ...], dtype: np.dtype[np.generic], folder: Path) -> NDArray[np.generic]:
    """Return an array of zeros backed by a file in `folder`; the file has no name where the system allows it.

    Its pages are the system's cache: it writes them out and takes them back when memory is short.

    Raises
    ------
    WriteError
        If the folder has too little room.
    """
    size_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    require_free_bytes(folder, size_bytes, "make room there or choose another folder with --tmp_dir")
    with told_of_spilling(folder), tempfile.TemporaryFile(dir=folder) as file:
        platform.reserve(file.fileno(), size_bytes)
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def touched_page_by_page(array: NDArray[Any]) -> None:
    """Fill a new spilled array with zeros so that each of its pages stands alone in the system's cache.

    A system that sees pages come into being in their order makes blocks of many of them, and who touches one page of a
    block has all of it mapped: of an array that is read in small boxes, far more than is in them.
    """
    mapping = _mapping_of(array)
    if mapping is None:
        return
    platform.expect_random(mapping, is_random=True)
    try:
        pages = np.frombuffer(mapping, np.uint8)
        for start in range(0, len(pages), _MAPPED_BYTES):
            pages[start : start + _MAPPED_BYTES] = 0
            platform.give_back(mapping)
    finally:
        platform.expect_random(mapping, is_random=False)


def give_back(array: NDArray[Any]) -> None:
    """Let the pages of a mapped file go that this process has touched, as far as the system knows how.

    What was written stays: in the system's cache, then in the file. Pages that are mapped count for whoever goes by the
    resident set of a process (Slurm, Dask), though no budget here and no kernel that is short of memory counts them.
    """
    mapping = _mapping_of(array)
    if mapping is not None:
        platform.give_back(mapping)


def _mapping_of(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the file's mapping that an array is a view of; None for one's own pages, of which nothing would stay."""
    base, is_shared = cast(Any, array), False
    while isinstance(base, np.ndarray):
        is_shared = is_shared or (isinstance(base, np.memmap) and base.mode != "c")
        base = base.base
    return base if is_shared and isinstance(base, mmap.mmap) else None


def why_unspillable(folder: Path) -> str:
    """Return what a folder does not do that `spilled_array` needs; empty if it does, or is not there or full."""
    try:
        if folder.is_dir():
            spilled_array((1,), np.dtype(np.uint8), folder)[:] = 1
    except WriteError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno not in platform.DISK_FULL:
            return f"takes no mapped files ({cause.strerror or cause})"
    return ""
