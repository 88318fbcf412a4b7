"""From image files to the array that the network takes, in bounded memory and bit-equal to stock nnU-Net's.

Stock's ``DefaultPreprocessor`` casts everything to float32, makes a −1/0 segmentation beside the image, normalises,
casts to float64 and resamples image and segmentation. Here the image stays in its own type, is cast and normalised
block by block while `spline` resamples it, and a segmentation exists only where the model needs one. Peak memory: the
image in the file's type, the result, and about ``2 * sqrt(planes)`` planes of float64. Where that is too much, the
image stays in its file, or in one of raw voxels; and where nothing is resampled, the result is what is read of it.

A stage that is not nnU-Net's own is called as it is: another preprocessor class (then all of it), a normalisation other
than nnU-Net's five (with the whole channel, as stock calls it), another resampling function or other arguments than
order 3 (with all channels, as stock calls it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import DEFAULT_PREPROCESSOR, Step
from nnunet_lowmem.overrides.lookup import is_class
from nnunet_lowmem.preprocessing import spline
from nnunet_lowmem.preprocessing.checks import check_headers
from nnunet_lowmem.preprocessing.crop import nonzero_box, nonzero_mask
from nnunet_lowmem.preprocessing.finite_voxels import check_values
from nnunet_lowmem.preprocessing.grids import Grid, network_grid, passes_over
from nnunet_lowmem.preprocessing.normalisation import VOXELWISE, is_one_of, needs_mask, normalisers
from nnunet_lowmem.preprocessing.reading import check_stored, read_by, read_channels, selection_of
from nnunet_lowmem.preprocessing.refusals import check_names, telling_colours
from nnunet_lowmem.preprocessing.sources import (
    AsRead,
    Source,
    Volume,
    depth_of_blocks,
    is_streamed,
    keeps_order,
    source_of,
    view,
    whole_source,
)
from nnunet_lowmem.preprocessing.volume_io import reader_of_labels
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Allocate, NetworkImage, PreprocessedCase, Shape3
from nnunet_lowmem.volumes.chunked_volume import Passes
from nnunet_lowmem.volumes.file_volume import StoredVolume
from nnunet_lowmem.volumes.formats import read_header

_OUTSIDE = -1  # label outside the nonzero mask, as in nnU-Net's crop_to_nonzero
_logger = logging.getLogger(__name__)


def preprocess_case(
    image_files: Sequence[str],
    previous_stage_file: str | None,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
    *,
    threads: int = 1,
    allocate: Allocate = np.empty,
    spill: Allocate | None = None,
    keeps_image: bool = True,
    verbose: bool = False,
    accept_nan: bool = False,
    spacing: Sequence[float] | None = None,
) -> PreprocessedCase:
    """Read and preprocess one case, as ``DefaultPreprocessor.run_case`` does.

    Parameters
    ----------
    image_files : sequence of str
        One file per channel.
    previous_stage_file : str or None
        Segmentation of the previous stage of a cascade.
    plans_manager, configuration_manager, dataset_json
        nnU-Net's description of the model.
    threads : int
        Threads for reading blocks and resampling.
    allocate : callable
        ``allocate(shape, dtype)`` makes the preprocessed image, float32 of shape (channels, z, y, x); in a file, say.
    spill : callable or None
        As `allocate`, for the voxels of files that cannot be read part by part: nothing of the input is kept in RAM.
    keeps_image : bool
        False lets the image be normalised whenever it is read, where nothing is resampled.
    verbose : bool
        Handed to a preprocessor that is not nnU-Net's own.
    accept_nan : bool
        Set NaN and infinity to 0 instead of refusing them; a preprocessor that is not nnU-Net's own reads by itself.
    spacing : (float, float, float), optional
        mm, in the place of what the reader gives.

    Returns
    -------
    PreprocessedCase
        Its properties lack ``class_locations``, which stock samples from the previous stage and only training reads.

    Raises
    ------
    UsageError
        If the files cannot be read, do not fit each other or have another number of channels than the model.
    """
    reader = plans_manager.image_reader_writer_class
    check_headers(image_files, plans_manager, configuration_manager, spacing)
    if previous_stage_file is not None:
        check_names([previous_stage_file], reader)
        check_stored(previous_stage_file, reader_of_labels(reader), accept_nan)
    if not is_own(configuration_manager.preprocessor_class):
        for file in image_files if not is_class(configuration_manager.preprocessor_class, DEFAULT_PREPROCESSOR) else ():
            check_stored(file, reader, accept_nan)
        preprocessor = configuration_manager.preprocessor_class(verbose=verbose)
        result = preprocessor.run_case(
            list(image_files), previous_stage_file, plans_manager, configuration_manager, dataset_json
        )
        return _from_preprocessor(result, result[2], previous_stage_file is not None, allocate)
    with telling_colours(image_files, reader, len(configuration_manager.normalization_schemes)) as read:
        passes: Passes = ()
        if (selection := selection_of(reader)) is not None:
            shape, steps = read_header(image_files[0], selection).grid()
            passes = passes_over(shape, spacing or steps, plans_manager.transpose_forward, configuration_manager)
        channels, properties = read_channels(reader, image_files, accept_nan, spill, passes)
        read.append(len(channels))
    if spacing is not None:
        properties["spacing"] = list(spacing)
    previous_stage = (
        None if previous_stage_file is None else reader_of_labels(reader)().read_seg(previous_stage_file)[0]
    )
    with read_by(reader):
        given = channels, True, previous_stage, properties, plans_manager, configuration_manager
        return _Case(*given, spill or np.empty).preprocess(threads, allocate, keeps_image)


def is_own(preprocessor: type) -> bool:
    """Whether what a preprocessor does is known here."""
    return is_class(preprocessor, DEFAULT_PREPROCESSOR) and not lookup.found(Step.PREPROCESSING, preprocessor)


def preprocess_array(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
    *,
    threads: int = 1,
    allocate: Allocate = np.empty,
    verbose: bool = False,
    accept_nan: bool = False,
) -> PreprocessedCase:
    """Preprocess an image in memory, as ``DefaultPreprocessor.run_case_npy`` does.

    Parameters
    ----------
    image : ndarray, shape (channels, x, y, z)
        Any real type; not modified.
    previous_stage : ndarray, shape (1, x, y, z), or None
        Labels of the previous stage of a cascade; not modified.
    properties : dict
        Needs ``spacing`` in mm, axes as in `image`; receives what nnU-Net's export reads (crop and shapes).
    plans_manager, configuration_manager, dataset_json, threads, allocate, verbose, \
    accept_nan
        As for `preprocess_case`.

    Returns
    -------
    PreprocessedCase
        With `properties` itself.

    Raises
    ------
    UsageError
        If the arrays do not fit each other or the model.
    """
    if not is_own(configuration_manager.preprocessor_class) or isinstance(image, np.ma.MaskedArray):
        preprocessor = configuration_manager.preprocessor_class(verbose=verbose)
        result = preprocessor.run_case_npy(
            image, previous_stage, properties, plans_manager, configuration_manager, dataset_json
        )
        return _from_preprocessor(result, properties, previous_stage is not None, allocate)
    if image.ndim != 4:
        raise twin(UsageError, ValueError)(
            f"The image has the shape {image.shape}; four axes are needed: channels, and three of space."
        )
    if accept_nan and image.dtype.kind == "f" and not all(map(_is_finite, image)):
        image = image.copy(order="K")
    for number, channel in enumerate(image):
        check_values(channel, f"channel {number}", accept_nan)
    interleaved = len(image) > 1 and not image.flags.c_contiguous
    # float32 sums depend on strides; the copy keeps what stock's cast of the whole array makes of them
    channels: list[Volume] = list(image.astype(np.float32) if interleaved else image)
    case = _Case(channels, interleaved, previous_stage, properties, plans_manager, configuration_manager)
    return case.preprocess(threads, allocate)


def _is_finite(channel: NDArray[Any]) -> bool:
    """Whether all values are numbers as float32, which nnU-Net takes them for."""
    with np.errstate(over="ignore"):
        return all(np.isfinite(plane.astype(np.float32, copy=False)).all() for plane in channel)


def _from_preprocessor(
    result: Sequence[Any], properties: dict[str, Any], has_previous_stage: bool, allocate: Allocate
) -> PreprocessedCase:
    """Take over what a preprocessor of another class returned: image, segmentation and perhaps more."""
    image = allocate(result[0].shape, np.dtype(np.float32))
    image[...] = result[0]
    return PreprocessedCase(image, result[1][0] if has_previous_stage else None, properties)


class _Case:
    """One case on its way through nnU-Net's default preprocessing."""

    def __init__(
        self,
        channels: list[Volume],
        own_channels: bool,
        previous_stage: NDArray[Any] | None,
        properties: dict[str, Any],
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        make_mask: Allocate = np.empty,
    ) -> None:
        # emptied on the way, so that a channel's memory is free once it is normalised
        self.channels = channels
        self.own_channels = own_channels  # whether they may be overwritten
        self.configuration = configuration_manager
        self.properties = properties
        self.order = plans_manager.transpose_forward
        self.normalisers = normalisers(plans_manager, configuration_manager)
        self._check(previous_stage)
        self.grid = self._crop()
        self.mask: NDArray[np.bool_] | None = None
        self.previous_stage: NDArray[Any] | None = None
        is_masked = any(map(needs_mask, self.normalisers))
        if is_masked or previous_stage is not None:
            views = [self._view(channel) for channel in self.channels]
            mask = self.mask = nonzero_mask(views, make_mask if is_masked else np.empty)
        if previous_stage is not None:
            self.previous_stage = self._with_outside(previous_stage, mask)
            self.mask = np.greater_equal(self.previous_stage[0], 0, out=mask) if is_masked else None

    def preprocess(self, threads: int, allocate: Allocate, keeps_image: bool = True) -> PreprocessedCase:
        _logger.debug("preprocessing %s", self.grid)
        with RowThreads(threads) as pool:
            image = self._resample_image(pool, allocate, keeps_image)
        return PreprocessedCase(image, self._resample_previous_stage(), self.properties)

    def _check(self, previous_stage: NDArray[Any] | None) -> None:
        if len(self.channels) != len(self.normalisers):
            raise twin(UsageError, RuntimeError if 0 < len(self.channels) < len(self.normalisers) else IndexError)(
                f"The image has {len(self.channels)} channels, the model takes {len(self.normalisers)}: "
                f"give one file per channel, _0000 to _{len(self.normalisers) - 1:04d}."
            )
        shape = self.channels[0].shape
        if previous_stage is not None and previous_stage.shape != (1, *shape):
            raise twin(UsageError, AssertionError)(
                f"The previous stage has shape {previous_stage.shape[1:]}, the image has {shape}. "
                "Predict the previous stage from this image."
            )

    def _view(self, volume: Volume) -> Volume:
        """Axes in network order, cropped to the nonzero box."""
        return view(volume, self.order, self.crop)

    def _crop(self) -> Grid:
        box = nonzero_box(self.channels)
        self.crop = tuple(slice(*box[axis]) for axis in self.order)
        shape: Shape3 = self._view(self.channels[0]).shape
        self.properties["shape_before_cropping"] = tuple(self.channels[0].shape[axis] for axis in self.order)
        self.properties["bbox_used_for_cropping"] = [box[axis] for axis in self.order]
        self.properties["shape_after_cropping_and_before_resampling"] = shape
        spacing = [self.properties["spacing"][axis] for axis in self.order]
        grid = network_grid(shape, spacing, self.configuration)
        if 0 in grid.new_shape:
            raise twin(UsageError, ValueError)(
                f"Resampling {shape} voxels from {np.array(spacing).tolist()} to {grid.new_spacing} mm leaves "
                f"{grid.new_shape}: the spacing in the file's header or in the plans is wrong."
            )
        return grid

    def _with_outside(self, previous_stage: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Return the previous stage, −1 where neither it nor the filled nonzero mask is set, shape (1, z, y, x)."""
        segmentation = self._view(previous_stage[0]).astype(np.promote_types(previous_stage.dtype, np.int8))
        segmentation[(segmentation == 0) & ~mask] = _OUTSIDE
        return segmentation[None]

    @cached_property
    def _segmentation(self) -> NDArray[Any] | None:
        """What nnU-Net's rules are given, the same array to all, shape (z, y, x); None where none needs it."""
        if self.previous_stage is not None:
            return self.previous_stage[0]  # type: ignore[no-any-return]  # an array's part is one
        return None if self.mask is None else np.where(self.mask, np.int8(0), np.int8(_OUTSIDE))

    def _next_source(self, normaliser: ImageNormalization) -> Source:
        """Take the first channel off the list."""
        if self._is_streamed(normaliser, self.channels[0]):
            return source_of(self.channels.pop(0), self.order, self.crop, normaliser, self.mask)
        channel = self.channels.pop(0)
        is_ours = self.own_channels and not isinstance(channel, StoredVolume) and channel.flags.writeable
        whole: Volume = channel.astype(np.float32, copy=not is_ours)
        del channel
        return whole_source(normaliser.run(self._view(whole), self._segmentation))

    @staticmethod
    def _is_streamed(normaliser: ImageNormalization, channel: Volume) -> bool:
        return is_streamed(normaliser) and (is_one_of(normaliser, VOXELWISE) or keeps_order(channel))

    def _resample_image(self, pool: RowThreads, allocate: Allocate, keeps_image: bool) -> NetworkImage:
        function = self.configuration.resampling_fn_data
        all_streamed = all(map(self._is_streamed, self.normalisers, self.channels))
        if all_streamed and not keeps_image and is_copied(self.grid, self.configuration):
            return AsRead([self._next_source(normaliser) for normaliser in self.normalisers])
        own = bounded_resampling(function, self.grid)
        if own is not None:
            image = allocate((len(self.normalisers), *self.grid.new_shape), np.dtype(np.float32))
            for normaliser, target in zip(self.normalisers, image, strict=True):
                own(self._next_source(normaliser), target, pool)
            return image
        whole = np.empty((len(self.normalisers), *self.grid.shape), np.float32)
        for normaliser, target in zip(self.normalisers, whole, strict=True):
            _copy(self._next_source(normaliser), target, pool)
        result = function(whole, np.array(self.grid.new_shape), self.grid.spacing, self.grid.new_spacing)
        image = allocate(result.shape, np.dtype(np.float32))
        image[...] = result
        return image

    def _resample_previous_stage(self) -> NDArray[np.integer[Any]] | None:
        if self.previous_stage is None:
            return None
        grid = self.grid
        function = self.configuration.resampling_fn_seg
        labels = function(self.previous_stage, np.array(grid.new_shape), grid.spacing, grid.new_spacing)[0]
        integers: NDArray[np.integer[Any]] = labels.astype(np.int16 if labels.max() > 127 else np.int8)
        return integers


def bounded_resampling(
    function: partial[Any], grid: Grid
) -> Callable[[Source, NDArray[np.float32], RowThreads], None] | None:
    """Our own way to the result of nnU-Net's resampling `function`, or None where there is none."""
    if function.func is not default_resampling.resample_data_or_seg_to_shape or lookup.found(Step.RESAMPLING):
        return None
    if grid.new_shape == grid.shape:
        return _copy
    arguments = {"order": 3, "order_z": 0, "force_separate_z": False, **function.keywords}
    if arguments.get("is_seg") or arguments["order"] != 3 or not spline.matches_scipy():
        return None
    threshold = [arguments[key] for key in ("separate_z_anisotropy_threshold",) if key in arguments]
    separate, axis = default_resampling.determine_do_sep_z_and_axis(
        arguments["force_separate_z"], grid.spacing, grid.new_spacing, *threshold
    )
    if not separate:
        return _zoom
    if arguments["order_z"] != 0 and grid.shape[axis] != grid.new_shape[axis]:
        return None
    return partial(_zoom_slices, axis)


def is_copied(grid: Grid, configuration: ConfigurationManager) -> bool:
    """Whether an image is resampled by nnU-Net's function, to the voxels that it has."""
    return bounded_resampling(configuration.resampling_fn_data, grid) is _copy


def is_read_by_planes(order: Sequence[int], grid: Grid, configuration: ConfigurationManager) -> bool:
    """Whether blocks that are read on the way lie together in a file, whose fastest axis is the last of `order`."""
    own = bounded_resampling(configuration.resampling_fn_data, grid)
    across = isinstance(own, partial) and own.args[0] == 2  # slice after slice along the last axis
    return order[2] == 2 and not across


def _zoom(source: Source, target: NDArray[np.float32], pool: RowThreads) -> None:
    spline.zoom_cubic(source.read, source.shape, target, pool)


def _zoom_slices(axis: int, source: Source, target: NDArray[np.float32], pool: RowThreads) -> None:
    along = np.moveaxis(target, axis, 0)
    rows, columns = (size for other, size in enumerate(source.shape) if other != axis)
    spline.zoom_cubic_slices(partial(source.read_along, axis), (source.shape[axis], rows, columns), along, pool)


def _copy(source: Source, target: NDArray[np.float32], pool: RowThreads) -> None:
    planes, depth = len(target), depth_of_blocks(target.shape)

    def copy(begin: int, end: int) -> None:
        for block in range(begin, end):
            part = slice(block * depth, (block + 1) * depth)
            target[part] = source.read(part, slice(None))

    pool.run(copy, -(-planes // depth))
