"""A preprocessed case in files: whoever finds them need not preprocess it again."""

from __future__ import annotations

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
    try:
        for ending, array in arrays.items():
            if array is not None:
                _write(file.with_suffix(ending), array)
        file.write_bytes(pickle.dumps((case.properties, wanted)))
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


def stored(file: Path, scratch: Path) -> PreprocessedCase:
    """Return a case that was kept. Its image is copied, since a mapped file that others remove may end a process.

    Parameters
    ----------
    file : Path
        Of `store`.
    scratch : Path
        A folder of this process, for the image.

    Raises
    ------
    OSError
        If it is gone.
    WriteError
        If there is no room for the image.
    """
    properties, wanted = pickle.loads(file.read_bytes())
    image, previous_stage = file.with_suffix(_IMAGE), file.with_suffix(_STAGE)
    require_free_bytes(scratch, image.stat().st_size, "make room there or choose another folder with --tmp_dir")
    own = scratch / image.name
    shutil.copyfile(image, own)
    if wanted is not None and file.with_suffix(_MASK).exists():
        wanted = replace(wanted, mask=np.load(file.with_suffix(_MASK)))
    stage = np.load(previous_stage) if previous_stage.exists() else None
    return PreprocessedCase(np.load(own, mmap_mode="r"), stage, properties, wanted=wanted)


def forget_stored(file: Path) -> None:
    """Remove what is kept of a case."""
    for path in (file, *(file.with_suffix(ending) for ending in (_IMAGE, _STAGE, _MASK))):
        with suppress(OSError):
            path.unlink()
