"""Numbers of a model folder that are refused before anything of their size is made.

The limits are far beyond any network that can be trained; they catch damaged and malicious files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnunet_lowmem.errors import ModelError

PATCH_VOXELS = 2**30
HEADS = 2**16 - 1  # what a label map of two bytes can tell apart
CHANNELS = 2**16
#: Any whole number in the architecture: features, kernel sizes, strides, heads of an attention.
WHOLE_NUMBER = 2**16
#: Numbers of stages, blocks and convolutions, whose names begin with ``n_``.
DEPTH = 2**8
#: The network may have this many times the weights that the checkpoint holds, and some.
WEIGHTS_FACTOR = 2
WEIGHTS_EXTRA = 2**20


def check_raw_plans(plans: Mapping[str, Any]) -> None:
    """Check what nnU-Net computes with as soon as it is given plans: the depth of networks in old formats."""
    for name, configuration in plans["configurations"].items():
        for entry in ("n_conv_per_stage_encoder", "n_conv_per_stage_decoder"):
            stages = len(configuration.get(entry, ()))
            _limit(f"plans.json: {entry!r} of {name!r}", "stages", stages, DEPTH)


def check_configuration(configuration: Mapping[str, Any], transpose_forward: Sequence[Any]) -> None:
    """Check patch size, spacing, order of axes and every number of the architecture.

    Raises
    ------
    ModelError
        With the entry and its number.
    """
    patch, spacing = configuration["patch_size"], configuration["spacing"]
    if len(patch) not in (2, 3) or not all(isinstance(size, int) and size > 0 for size in patch):
        raise ModelError(f"plans.json: 'patch_size' is {patch}, not two or three positive whole numbers")
    _limit(f"plans.json: 'patch_size' {patch}", "voxels", math.prod(patch), PATCH_VOXELS)
    if len(spacing) != len(patch) or not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in spacing):
        raise ModelError(f"plans.json: 'spacing' is {spacing}, not {len(patch)} positive numbers of millimetres")
    if sorted(transpose_forward) != [0, 1, 2]:
        raise ModelError(f"plans.json: 'transpose_forward' is {transpose_forward}, not an order of the axes 0, 1, 2")
    for entry, number in _whole_numbers("arch_kwargs", configuration["architecture"]["arch_kwargs"]):
        limit = DEPTH if entry.rpartition(".")[2].startswith("n_") else WHOLE_NUMBER
        _limit(f"plans.json: {entry!r}", "", abs(number), limit)


def check_channels_and_heads(channels: int, heads: int) -> None:
    """Check what dataset.json asks of the first and the last layer."""
    _limit("dataset.json: the network", "input channels", channels, CHANNELS)
    _limit("dataset.json: the network", "heads", heads, HEADS)


def check_weights(needed: int, held: int, checkpoint: Any) -> None:
    """Refuse plans that describe a network far larger than the checkpoint beside them can fill."""
    if needed > WEIGHTS_FACTOR * held + WEIGHTS_EXTRA:
        raise ModelError(
            f"plans.json describes a network of {needed:,} weights, but {checkpoint} holds {held:,}: "
            "they do not belong together, and the network is not built"
        )


def _whole_numbers(entry: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _whole_numbers(f"{entry}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _whole_numbers(entry, item)
    elif isinstance(value, int):
        yield entry, value


def _limit(what: str, unit: str, number: int, limit: int) -> None:
    if number > limit:
        raise ModelError(
            f"{what} asks for {number:,} {unit}".rstrip() + f", more than the {limit:,} that any model needs"
        )
