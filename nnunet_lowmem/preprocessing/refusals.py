"""Words for cases that a reader of nnU-Net does not take: names that end the process, pictures of other colours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nnunet_lowmem.errors import UsageError, because, twin
from nnunet_lowmem.names import check_utf8, shown
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step

_ALPHA = "red, green, blue and alpha (transparency)"
_COLOURS = {1: "gray", 2: "gray and alpha (transparency)", 3: "red, green and blue", 4: _ALPHA}
# ends with four channels otherwise, too: those of print
_ONLY_ALPHA = (".png", ".bmp")


def check_names(files: Sequence[str | os.PathLike[str]], reader: type) -> None:
    """Refuse what would end the process, before a header is read.

    Raises
    ------
    UsageError
        With the file whose name SimpleITK does not take, if that is the reader.
    """
    if is_of(reader, "SimpleITKIO") and not lookup.found(Step.READING, reader):
        for file in files:
            check_utf8(file)


def is_of(reader: type, name: str) -> bool:
    """Whether a reader is nnU-Net's of that name, or made of it."""
    return any(cls.__name__ == name and cls.__module__.startswith("nnunetv2.imageio.") for cls in reader.__mro__)


@contextmanager
def telling_colours(files: Sequence[str], reader: type, channels: int) -> Iterator[list[int]]:
    """Tell which channels a picture has and which the model takes, where they are not as many.

    Parameters
    ----------
    files : sequence of str
    reader : type
        The model's; only nnU-Net's for pictures is spoken of.
    channels : int
        How many the model takes.

    Yields
    ------
    list
        Gets the number of channels that were read in the block.

    Raises
    ------
    UsageError
    """
    read: list[int] = []
    is_picture = is_of(reader, "NaturalImage2DIO") and len(files) == 1
    try:
        yield read
    except UsageError as error:
        if is_picture and isinstance(error.__cause__, AssertionError) and "shape here is" in str(error):
            raise because(UsageError, _of_colours(files[0], 2, channels), error.__cause__) from error.__cause__
        raise
    if is_picture and read[0] != channels:
        raise twin(UsageError, RuntimeError if read[0] < channels else IndexError)(
            _of_colours(files[0], read[0], channels)
        )


def _of_colours(file: str, held: int, channels: int) -> str:
    colours = _COLOURS.get(held, "")
    if held == len(_COLOURS) and not file.lower().endswith(_ONLY_ALPHA):
        colours += ", or those of print"
    has = f"{held} channel{'s' if held > 1 else ''}" + (f": {colours}" if colours else "")
    takes = f"{channels}" + (f", {_COLOURS[channels]}" if channels in (1, 3, 4) else "")
    ways = {1: "save it as gray, without alpha", 3: "save it as RGB, without alpha", 4: "save it as RGB with alpha"}
    if held == 1 and channels == 3:
        ways = {3: "save it as RGB, where a gray has three equal channels"}
    way = ways.get(channels, f"give one file per channel, _0000 to _{channels - 1:04d}")
    return f"{shown(file)}: the picture has {has}; the model takes {takes}: {way}"
