"""What reading and preprocessing a case take, from headers and plans alone: upper bounds.

Counted here are the arrays of `preprocessing` (reading, case, spline), and those of nnU-Net's readers and
functions where they are called as they are. Each rule was checked against measured peaks
(``tests/promises/test_projection.py``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lowmem.budget.arrays import SINGLE_BYTES
from nnunet_lowmem.preprocessing.case import bounded_resampling, is_own
from nnunet_lowmem.preprocessing.grids import Grid
from nnunet_lowmem.preprocessing.normalisation import VOXELWISE, is_one_of, needs_mask, normalisers
from nnunet_lowmem.preprocessing.spline import working_bytes

# of a masked normalisation: masks, their filled copy, the masked values and their deviation
_MASK_BYTES = 16
# DefaultPreprocessor and what derives from it: float32 copies, float64 for order 3, the segmentation beside the image
_STOCK_VOXEL_BYTES, _STOCK_NETWORK_BYTES = 28, 24
# a previous stage: read as float32, cast, cropped; resampled label by label in float64
_STAGE_VOXEL_BYTES, _STAGE_NETWORK_BYTES = 20, 24


class InputBytes(NamedTuple):
    """Peaks in bytes: while files are read, and of the input and the working arrays of preprocessing."""

    reading: int
    preprocessing: int


class Source(NamedTuple):
    """What the image of a case is read from.

    Attributes
    ----------
    files : int
        How many; 0 for an array in memory.
    dtype : numpy dtype
        Of the values that reading gives; of several, the narrowest.
    stored_bytes : int
        Of all values that reading gives.
    beside_bytes : int
        Held beside these while a file is read.
    """

    files: int
    dtype: np.dtype[Any]
    stored_bytes: int
    beside_bytes: int


def input_bytes(
    source: Source,
    grid: Grid,
    has_previous_stage: bool,
    plans_manager: Any,
    configuration_manager: Any,
) -> InputBytes:
    """Bound what reading and preprocessing take beside the preprocessed image.

    Parameters
    ----------
    source : Source
    grid : Grid
        Uncropped.
    has_previous_stage : bool
    plans_manager, configuration_manager
        nnU-Net's description of the model.
    """
    rules = normalisers(plans_manager, configuration_manager)
    voxels, network_voxels = math.prod(grid.shape), math.prod(grid.new_shape)
    stage = has_previous_stage * (_STAGE_VOXEL_BYTES * voxels + _STAGE_NETWORK_BYTES * network_voxels)
    if not is_own(configuration_manager.preprocessor_class):
        own = len(rules) * (_STOCK_VOXEL_BYTES * voxels + _STOCK_NETWORK_BYTES * network_voxels)
        return InputBytes(0, own + stage)
    reader = plans_manager.image_reader_writer_class
    reading, stored = _reading(reader, source, voxels, len(rules))
    kept_bytes = min(source.dtype.itemsize, stored // max(1, len(rules) * voxels))
    work = max(_normalising(rule, kept_bytes) for rule in rules) * voxels
    work += _resampling(grid, configuration_manager, len(rules))
    return InputBytes(reading, stored + work + stage)


def _reading(reader: type, source: Source, voxels: int, channels: int) -> tuple[int, int]:
    """Peak while reading, and what stays: all channels."""
    if not source.files:
        return 0, channels * voxels * SINGLE_BYTES
    if reader in (SimpleITKIO, NibabelIO):
        stored = source.stored_bytes
        return stored + source.beside_bytes, stored
    whole = channels * voxels * SINGLE_BYTES
    return voxels * (8 * channels + SINGLE_BYTES) + source.stored_bytes, whole


def _normalising(rule: Any, stored_voxel_bytes: int) -> int:
    """Bytes per voxel beside the stored channels.

    Rules that look at a whole channel take it as float32, and numpy's deviation holds a copy.
    """
    if is_one_of(rule, VOXELWISE):
        return 0
    masks = _MASK_BYTES if needs_mask(rule) else 0
    return masks + (4 if stored_voxel_bytes == SINGLE_BYTES else max(4, 8 - stored_voxel_bytes))


def _resampling(grid: Grid, configuration: Any, channels: int) -> int:
    if bounded_resampling(configuration.resampling_fn_data, grid) is not None:
        return 0 if grid.shape == grid.new_shape else working_bytes(grid.shape)
    voxels, network_voxels = math.prod(grid.shape), math.prod(grid.new_shape)
    return channels * SINGLE_BYTES * (voxels + network_voxels) + 16 * max(voxels, network_voxels)
