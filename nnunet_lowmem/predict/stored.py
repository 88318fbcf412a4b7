"""A preprocessed case in files: whoever finds them need not preprocess it again."""

from __future__ import annotations

import logging
import pickle
import shutil
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.system.atomic_files import require_free_bytes
from nnunet_lowmem.types import PreprocessedCase
from nnunet_lowmem.volumes.mapped import give_back

logger = logging.getLogger(__name__)

_IMAGE, _STAGE, _MASK = ".image.npy", ".stage.npy", ".mask.npy"


def store(case: PreprocessedCase, folder: Path) -> Path | None:
    """Keep a case in a folder; None where its image is read as it is needed, and is nowhere.

    Raises
    ------
    OSError, WriteError
        If it cannot be written, for want of room among others; nothing is left then.
    """
    if not isinstance(case.image, np.ndarray):
        return None
    mask = None if case.wanted is None else case.wanted.mask
    arrays = {_IMAGE: case.image, _STAGE: case.previous_stage, _MASK: mask}
    needed_bytes = sum(array.nbytes for array in arrays.values() if array is not None)
    require_free_bytes(folder, needed_bytes, "make room there, or leave cases whole with --split never")
    file = folder / f"case-{uuid.uuid4().hex}"
    wanted = None if case.wanted is None else replace(case.wanted, mask=None)
    has = case.previous_stage is not None, mask is not None
    try:
        for ending, array in arrays.items():
            if array is not None:
                _write(file.with_suffix(ending), array)
        file.write_bytes(pickle.dumps((case.properties, wanted, *has)))
    except BaseException:
        forget_stored(file)
        raise
    return file


def _write(path: Path, array: NDArray[Any]) -> None:
    """Write an array plane by plane: all of one that is mapped would be resident, which no budget knows."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for plane in np.ndindex(array.shape[:-2]):
            file.write(array[plane].tobytes())
            give_back(array)


def stored(file: Path, scratch: Path | None) -> PreprocessedCase:
    """Return a case that was kept. Its image is never mapped where it is: others may remove it, which ends a process.

    Parameters
    ----------
    file : Path
        Of `store`.
    scratch : Path or None
        A folder of this process, to which the image is copied to be mapped; None reads it into RAM.

    Raises
    ------
    OSError
        If something of it is gone.
    """
    properties, wanted, has_stage, has_mask = pickle.loads(file.read_bytes())
    stage = np.load(file.with_suffix(_STAGE)) if has_stage else None
    if has_mask:
        wanted = replace(wanted, mask=np.load(file.with_suffix(_MASK)))
    image = file.with_suffix(_IMAGE)
    copied = None if scratch is None else _copied(image, scratch)
    array = np.load(image) if copied is None else np.load(copied, mmap_mode="r")
    return PreprocessedCase(array, stage, properties, wanted=wanted)


def _copied(image: Path, scratch: Path) -> Path | None:
    """Return a copy; None where there is no room for it after all."""
    own = scratch / image.name
    try:
        shutil.copyfile(image, own)
    except OSError as error:
        with suppress(OSError):
            own.unlink(missing_ok=True)
        logger.warning("%s is read into RAM, since it cannot be copied: %s", image.name, error)
        return None
    return own


def image_bytes(file: Path) -> int:
    """Return the size of the image of a case that was kept."""
    return file.with_suffix(_IMAGE).stat().st_size


def forget_stored(file: Path) -> None:
    """Remove what is kept of a case."""
    for path in (file, *(file.with_suffix(ending) for ending in (_IMAGE, _STAGE, _MASK))):
        with suppress(OSError):
            path.unlink()
