"""Which grid an image gets for the network: nnU-Net's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_lowmem.types import Shape3, shape3


class Grid(NamedTuple):
    """The cropped image's grid and the network's, axes in network order, spacing in mm."""

    shape: Shape3
    spacing: list[float]
    new_shape: Shape3
    new_spacing: list[float]


def network_spacing(spacing: Sequence[float], configuration: ConfigurationManager) -> list[float]:
    """Return the spacing that an image gets; a two-dimensional configuration keeps the one between slices."""
    return [*spacing[: 3 - len(configuration.spacing)], *configuration.spacing]


def network_grid(shape: Sequence[int], spacing: Sequence[float], configuration: ConfigurationManager) -> Grid:
    """Return the grids of an image of this shape and spacing, axes in network order."""
    new_spacing = network_spacing(spacing, configuration)
    new_shape = default_preprocessor.compute_new_shape(shape, spacing, new_spacing)
    return Grid(shape3(shape), list(spacing), shape3(new_shape), new_spacing)
