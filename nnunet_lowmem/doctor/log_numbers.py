"""What the numbers in a line of a log are, in words."""

from __future__ import annotations

import math
import re

from nnunet_lowmem.sizes import format_gib

# an image has few channels, and hardly anybody predicts fewer classes than this with so many voxels
_FEWEST_CLASSES = 5
_ALL_AT_ONCE = "Stock resamples those of all classes at once, in float64 and in a second process, whatever the GPU has."
# no scan has more: its spacing is wrong
_MOST_VOXELS = 10**10


def nothing(match: re.Match[str]) -> str:
    """Say nothing."""
    return ""


def of_array(match: re.Match[str]) -> str:
    """Say what an array of numpy's message holds."""
    shape = [int(size) for size in re.findall(r"\d+", match["shape"])]
    what = f"The array has {' x '.join(map(str, shape))} numbers of {match['dtype']}, {match['size']}"
    if math.prod(shape[-3:]) > _MOST_VOXELS:
        return f"{what}. No scan is that large: look at the spacing in its header, in mm, and its unit."
    if len(shape) < 4 or shape[-4] < 2:
        volume = "a whole volume" if len(shape) >= 3 else "a part of one"
        return f"{what}: {volume}."
    classes, voxels = shape[-4], " x ".join(map(str, shape[-3:]))
    if classes >= _FEWEST_CLASSES:
        return f"{what}: the logits of {classes} classes on {voxels} voxels. {_ALL_AT_ONCE}"
    return f"{what}: the logits of {classes} classes, or an image of {classes} channels, on {voxels} voxels."


def of_bytes(match: re.Match[str]) -> str:
    """Say how much was asked for."""
    return f"It asked for {format_gib(int(match['bytes']))}." if match["bytes"] else ""


def of_device(match: re.Match[str]) -> str:
    """Say how much was asked for, and how much there was."""
    told = [f"{match['size']} more were asked for"] if match["size"] else []
    told += [f"{match['free']} were free"] if match["free"] else []
    told += [f"the card has {match['total']}"] if match["total"] else []
    return f"{', '.join(told)}." if told else ""


def of_channels(match: re.Match[str]) -> str:
    """Say how many there are and should be."""
    return f"The model takes {match['due']} channels and got {match['given']}." if match["due"] else ""
