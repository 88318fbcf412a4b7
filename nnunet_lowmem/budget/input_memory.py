"""What reading and preprocessing a case take, from headers and plans alone: upper bounds.

Counted here are the arrays of `preprocessing` (reading, case, spline), and those of nnU-Net's readers and
functions where they are called as they are. Each rule was checked against measured peaks
(``tests/promises/test_projection.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nnunet_lowmem.budget.arrays import SINGLE_BYTES
from nnunet_lowmem.budget.facts import InputFacts
from nnunet_lowmem.preprocessing.case import bounded_resampling, is_copied, is_own, is_read_by_planes
from nnunet_lowmem.preprocessing.crop import SLAB_VOXELS
from nnunet_lowmem.preprocessing.grids import Grid
from nnunet_lowmem.preprocessing.normalisation import VOXELWISE, is_one_of, needs_mask, normalisers
from nnunet_lowmem.preprocessing.reading import is_read_here
from nnunet_lowmem.preprocessing.sources import is_streamed
from nnunet_lowmem.preprocessing.spline import working_bytes
from nnunet_lowmem.volumes.chunked_volume import Passes, decoding_bytes, kept_bytes
from nnunet_lowmem.volumes.file_volume import is_readable_by_parts
from nnunet_lowmem.volumes.headers import Header

_PLANES_BYTES = 2**25
# masked values, their difference from the mean and its quotient
_MASKED_BYTES = 12
# of a masked normalisation of a whole channel: the mask as numbers, the masked values and their deviation
_MASKED_BYTES_WHOLE = 16
# of a voxel of the planes of a mask that are filled at a time: labels, what is unset, and what leads out
_FILLING_BYTES = 12
# DefaultPreprocessor and what derives from it: float32 copies, float64 for order 3, the segmentation beside the image
STOCK_VOXEL_BYTES, STOCK_NETWORK_BYTES = 28, 24
# a previous stage: read as float32, cast, cropped; resampled label by label in float64
_STAGE_VOXEL_BYTES, _STAGE_NETWORK_BYTES = 20, 24


class InputBytes(NamedTuple):
    """What reading and preprocessing take.

    Attributes
    ----------
    reading, preprocessing : int
        Bytes beside the input: while files are read, and of working arrays.
    facts : InputFacts
        Of the input itself.
    """

    reading: int
    preprocessing: int
    facts: InputFacts = InputFacts()


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
    spilled_bytes : int or None
        Of the files that cannot be read part by part, and of the chunks that are kept of those that are in chunks; None
        where one has values that only a library makes.
    decoding_bytes : int
        Held while chunks are decoded.
    in_chunks : bool
        All files are, so that parts may be asked for in the order of any axis.
    """

    files: int
    dtype: np.dtype[Any]
    stored_bytes: int
    beside_bytes: int
    spilled_bytes: int | None = None

    decoding_bytes: int = 0
    in_chunks: bool = False

    @staticmethod
    def of(headers: Sequence[Header], passes: Passes = ()) -> Source:
        """Return that of files, through which one goes in such passes."""
        sizes = [header.voxels * header.dtype.itemsize for header in headers]
        in_place = all(header.is_taken_as_stored for header in headers)
        whole = [size for header, size in zip(headers, sizes, strict=True) if not is_readable_by_parts(header)]
        arrays = [header.layout.chunked for header in headers if header.layout is not None]
        chunked = [array for array in arrays if array is not None]
        whole += [kept_bytes(array, passes) for array in chunked]
        decoding = max(map(decoding_bytes, chunked), default=0)
        return Source(
            len(headers),
            min((header.dtype for header in headers), key=lambda dtype: dtype.itemsize),
            sum(sizes),
            max(*(header.beside_bytes for header in headers), decoding),
            sum(whole) if in_place else None,
            decoding,
            len(chunked) == len(headers),
        )


def input_bytes(
    source: Source,
    grid: Grid,
    has_previous_stage: bool,
    plans_manager: Any,
    configuration_manager: Any,
) -> InputBytes:
    """Bound what reading and preprocessing take, but for the preprocessed image.

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
        own = len(rules) * (STOCK_VOXEL_BYTES * voxels + STOCK_NETWORK_BYTES * network_voxels)
        return InputBytes(0, own + stage)
    reader = plans_manager.image_reader_writer_class
    is_ours = bool(source.files) and is_read_here(reader)
    reading, kept = _reading(is_ours, source, voxels, len(rules))
    kept_bytes = min(source.dtype.itemsize, kept // max(1, len(rules) * voxels))
    work = max(_normalising(rule, kept_bytes, is_ours) for rule in rules) * voxels
    work += _resampling(grid, configuration_manager, len(rules))
    mask = 0
    if any(needs_mask(rule) and is_ours and is_streamed(rule) for rule in rules):
        mask = voxels
        work += _FILLING_BYTES * min(voxels, max(SLAB_VOXELS, voxels // min(grid.shape)))
    facts = InputFacts(kept, mask_bytes=mask)
    by_planes = source.in_chunks or is_read_by_planes(plans_manager.transpose_forward, grid, configuration_manager)
    if is_ours and by_planes and all(map(is_streamed, rules)):
        facts = _on_disk(source, kept, mask, grid, is_copied(grid, configuration_manager), len(rules))
    return InputBytes(reading, work + stage, facts)


def _on_disk(source: Source, kept: int, mask: int, grid: Grid, is_image: bool, channels: int) -> InputFacts:
    """Return the facts of an input that need not be kept in RAM."""
    plane = math.prod(grid.shape) // max(1, min(grid.shape))
    stored_bytes = 2 * source.dtype.itemsize  # once more in the byte order of this machine, perhaps
    block = min(kept, max(_PLANES_BYTES, plane * (stored_bytes + SINGLE_BYTES + 1))) + source.decoding_bytes
    tile = SINGLE_BYTES * (channels + 1) + stored_bytes + bool(mask) * _MASKED_BYTES
    return InputFacts(kept, source.spilled_bytes, block, is_image, mask, tile)


def _reading(is_ours: bool, source: Source, voxels: int, channels: int) -> tuple[int, int]:
    """Return what reading takes beside the input, and that itself: all channels."""
    if is_ours:
        return source.beside_bytes, source.stored_bytes
    whole = channels * voxels * SINGLE_BYTES
    if not source.files:
        return 0, whole
    return max(0, voxels * (8 * channels + SINGLE_BYTES) + source.stored_bytes - whole), whole


def _normalising(rule: Any, stored_voxel_bytes: int, is_ours: bool) -> int:
    """Bytes per voxel beside the stored channels.

    Where a whole channel is normalised at once it is float32, and numpy's deviation holds a copy.
    """
    if is_one_of(rule, VOXELWISE) or (is_ours and is_streamed(rule)):
        return 0
    masked = _MASKED_BYTES_WHOLE if needs_mask(rule) else 0
    return masked + (4 if stored_voxel_bytes == SINGLE_BYTES else max(4, 8 - stored_voxel_bytes))


def _resampling(grid: Grid, configuration: Any, channels: int) -> int:
    if bounded_resampling(configuration.resampling_fn_data, grid) is not None:
        return 0 if grid.shape == grid.new_shape else working_bytes(grid.shape)
    voxels, network_voxels = math.prod(grid.shape), math.prod(grid.new_shape)
    return channels * SINGLE_BYTES * (voxels + network_voxels) + 16 * max(voxels, network_voxels)
