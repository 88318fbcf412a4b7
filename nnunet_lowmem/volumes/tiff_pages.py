"""Whether a TIFF is whole, and how one is written, page by page.

The pages of a TIFF are a chain: each says where the next one is, and the last one says 0. Where a file is cut between
two pages, libtiff and tifffile take the pages before for all there are; where a series of files lacks one, tifffile
makes zeros of its planes.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.mapped import give_back
from nnunet_lowmem.volumes.stored_parts import Contents, check_promise

_UNCOMPRESSED = 1
# samples of a colour: tifffile takes an axis of so many for them
_MOST_SAMPLES = 4


@dataclass(frozen=True)
class Pages:
    """How a map is written page by page.

    Attributes
    ----------
    dtype : numpy dtype
    compression : int
        The number that TIFF has for it.
    """

    dtype: np.dtype[Any]
    compression: int

    @staticmethod
    def of(file: Path) -> Pages:
        """Return how a library has written a map of a few voxels.

        Raises
        ------
        Exception
            Of tifffile, if it is none.
        """
        import tifffile

        with silence(), tifffile.TiffFile(file) as tiff:
            return Pages(np.dtype(tiff.pages.first.dtype), int(tiff.pages.first.compression))

    def write(self, labels: NDArray[Any], path: Path) -> None:
        """Write a map of shape (z, y, x) with the bytes that tifffile writes of the whole array.

        Raises
        ------
        OSError
            If the disk is full, or there can be no such file.
        """
        import tifffile

        planes, one = self._planes(labels), 1  # in threads it would compress half a GiB at a time
        tifffile.imwrite(
            path, planes, shape=labels.shape, dtype=self.dtype, compression=self.compression, maxworkers=one
        )

    def _planes(self, labels: NDArray[Any]) -> Iterator[NDArray[Any]]:
        for plane in labels:
            yield np.ascontiguousarray(plane, self.dtype)
            give_back(labels)


def may_be_pages(shape: Sequence[int]) -> bool:
    """Whether planes of a shape (z, y, x) are pages, and no axis may be taken for colours."""
    return shape[0] > _MOST_SAMPLES and shape[-1] > _MOST_SAMPLES


def read_whole(path: Path) -> Contents:
    """Decode what tifffile gives of a file, a page at a time.

    Raises
    ------
    DamagedFileError
        If pages are missing, or what is in them.
    OSError
        If it cannot be read.
    """
    import tifffile

    try:
        with silence(), tifffile.TiffFile(path) as tiff:
            verify_chain(tiff, path.name)
            series = tiff.series[0]
            verify_series(series, path.name)
            for page in series.pages:
                _verify_page(page)
            return Contents(tuple(series.shape), np.dtype(series.dtype))
    except (DamagedFileError, OSError, MemoryError):
        raise
    except Exception as error:  # each of its decoders has its own
        raise DamagedFileError(f"{path.name}: {error}") from error


def verify_chain(tiff: Any, name: str) -> None:
    """Follow the chain to its end; tifffile takes for an offset what it finds where a file is cut within a page."""
    file, layout = tiff.filehandle, tiff.tiff
    offset, seen = tiff.pages.first.offset, set[int]()
    while offset and offset not in seen:
        try:
            file.seek(offset)
            (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
            file.seek(offset + layout.tagnosize + tags * layout.tagsize)
            (following,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
        except (struct.error, OSError) as error:
            raise DamagedFileError(
                f"{name} ends within its chain of pages: {len(seen)} are there, the next should be at byte {offset:,}, "
                f"and the file has {file.size:,}"
            ) from error
        seen.add(offset)
        offset = following
    if offset:
        raise DamagedFileError(f"{name}: page {len(seen)} of its chain is one of those before it")


def verify_series(series: Any, name: str) -> None:
    """Refuse an image of which pages are missing, or the end of its voxels."""
    missing = sum(page is None for page in series.pages)
    if missing:
        raise DamagedFileError(
            f"{name}: {missing} of the {len(series.pages)} pages that its header promises are missing"
        )
    if series.dataoffset is not None:  # voxels in one piece, of which the pages may describe the first plane only
        needed_bytes = math.prod(series.shape) * series.dtype.itemsize
        held_bytes = series.parent.filehandle.size - series.dataoffset
        if held_bytes < needed_bytes:
            raise DamagedFileError(f"{name} ends after {max(0, held_bytes):,} of {needed_bytes:,} bytes of voxels")


def _verify_page(page: Any) -> None:
    """Decode a page; of a piece that is cut some decoders give what they can, so its end is compared first."""
    file = page.parent.filehandle
    piece_bytes = math.prod(page.keyframe.chunks) * page.keyframe.dtype.itemsize
    check_promise(f"a piece of page {page.index} of {file.name}", piece_bytes, file.size)
    if page.keyframe.compression != _UNCOMPRESSED:
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if start + count > file.size:
                raise DamagedFileError(
                    f"page {page.index} of {file.name} has data up to byte {start + count:,}, and the file ends at "
                    f"{file.size:,}"
                )
    elif max(page.databytecounts, default=0) > file.size:
        # as many are read as a page needs; a buffer for all that are promised may be more than there is
        needed_bytes = page.keyframe.nbytes
        if page.dataoffsets[0] + needed_bytes > file.size:
            raise DamagedFileError(f"page {page.index} of {file.name} lacks some of its {needed_bytes:,} bytes")
        return
    for _ in page.segments(maxworkers=1):
        pass


@contextmanager
def silence() -> Iterator[None]:
    """Keep tifffile from logging what is told as an error."""
    logger = logging.getLogger("tifffile")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
