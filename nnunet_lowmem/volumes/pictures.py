"""Whether a picture (.png, .bmp, .jpg) is whole; its decoders notice what is missing, each with errors of its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from nnunet_lowmem.errors import DamagedFileError
from nnunet_lowmem.volumes.stored_parts import Contents, check_promise


def read_whole(path: Path) -> Contents:
    """Decode a picture.

    Raises
    ------
    DamagedFileError
        If something is missing or changed.
    """
    from skimage import io

    try:
        _verify_promise(path)
        if path.name.lower().endswith(".png"):
            _verify_chunks(path)
        array = np.asarray(io.imread(path))
    except (DamagedFileError, MemoryError):
        raise
    except Exception as error:
        raise DamagedFileError(f"{path.name}: {error}") from error
    return Contents(array.shape, array.dtype)


def _verify_promise(path: Path) -> None:
    """Refuse a size that the file cannot hold: without the memory for it, libjpeg ends the process."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            promised_bytes = math.prod(picture.size) * len(picture.getbands())
    except UnidentifiedImageError:  # other decoders may know it
        return
    check_promise(path.name, promised_bytes, path.stat().st_size)


def _verify_chunks(path: Path) -> None:
    """Check every chunk of a PNG, the last included; a decoder is content once it has all rows."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.verify()
