"""Whether a picture (.png, .bmp, .jpg) is whole; its decoders notice what is missing, each with errors of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.stored_parts import Contents


def read_whole(path: Path) -> Contents:
    """Decode a picture.

    Raises
    ------
    DamagedFileError
        If something is missing or changed.
    """
    from skimage import io

    try:
        if path.name.lower().endswith(".png"):
            _verify_chunks(path)
        array = np.asarray(io.imread(path))
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedFileError(f"{path.name}: {error}") from error
    return Contents(array.shape, array.dtype)


def _verify_chunks(path: Path) -> None:
    """Check every chunk of a PNG, the last included; a decoder is content once it has all rows."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.verify()
