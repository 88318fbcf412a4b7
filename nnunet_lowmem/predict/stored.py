"""A preprocessed case in files: whoever finds them need not preprocess it again."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import numpy as np

from nnunet_lowmem.system.atomic_files import require_free_bytes
from nnunet_lowmem.types import PreprocessedCase


def store(case: PreprocessedCase, folder: Path) -> Path | None:
    """Keep a case in a folder; None where its image is read as it is needed, and is nowhere.

    Raises
    ------
    OSError
        If there is too little room, among others.
    """
    if not isinstance(case.image, np.ndarray):
        return None
    require_free_bytes(folder, case.image.nbytes, "make room there, or leave the case whole with --split never")
    file = folder / f"case-{uuid.uuid4().hex}.pkl"
    np.save(file.with_suffix(".npy"), case.image)
    file.write_bytes(pickle.dumps((case.previous_stage, case.properties, case.wanted)))
    return file


def stored(file: Path) -> PreprocessedCase:
    """Return a case that was kept; its image is mapped.

    Raises
    ------
    OSError
        If it is gone.
    """
    previous_stage, properties, wanted = pickle.loads(file.read_bytes())
    image = np.load(file.with_suffix(".npy"), mmap_mode="r")
    return PreprocessedCase(image, previous_stage, properties, wanted=wanted)
