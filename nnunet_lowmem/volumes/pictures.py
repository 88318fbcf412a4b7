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
        _verify(path)
        array = np.asarray(io.imread(path))
    except (DamagedFileError, MemoryError):
        raise
    except Exception as error:
        raise DamagedFileError(f"{path.name}: {error}") from error
    return Contents(array.shape, array.dtype)


def _verify(path: Path) -> None:
    """Refuse a size that the file cannot hold: without the memory for it, libjpeg ends the process.

    Of a PNG every chunk is checked, the last included; a decoder is content once it has all rows.
    """
    from PIL import Image, UnidentifiedImageError

    is_png = path.name.lower().endswith(".png")
    try:
        with Image.open(path) as picture:
            promised_bytes = math.prod(picture.size) * len(picture.getbands())
            check_promise(path.name, promised_bytes, path.stat().st_size)
            if is_png:
                picture.verify()
    except UnidentifiedImageError:  # other decoders may know it
        if is_png:
            raise
