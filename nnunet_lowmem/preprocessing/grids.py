"""Which grid an image gets for the network: nnU-Net's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_lowmem.types import Shape3, shape3

# of a slab that is resampled at a time, at most where it matters
_SLAB_PLANES = 64


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


def passes_over(
    shape: Sequence[int], spacing: Sequence[float], order: Sequence[int], configuration: ConfigurationManager
) -> list[tuple[int, int]]:
    """Return along which axes of a file a volume is gone through, and how many planes at a time.

    Parameters
    ----------
    shape, spacing
        Of the file, slowest axis first; mm.
    order : int, 3
        nnU-Net's ``transpose_forward``.
    configuration : ConfigurationManager
    """
    patch = (1, *configuration.configuration.get("patch_size", (1, 1)))[-3:]
    # rows of tiles follow each other along the first axis that has several, as in `window/tiling`
    rolls = 0 if shape[order[0]] > patch[0] else 1
    found = [(0, 1), (order[0], 1), (order[rolls], int(patch[rolls]))]
    grid = network_grid([shape[axis] for axis in order], [spacing[axis] for axis in order], configuration)
    if grid.shape != grid.new_shape:  # lines are filtered along the first axis, some rows at a time, and then slabs
        found += [(order[1], 1), (order[0], _SLAB_PLANES)]
    return found
