"""What is asked for of a case, by the options `bbox` and `roi`, and what the case is for the files of that part."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.boxes import box_within, check_mask_shape, moved, parse_box, whole
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.nnunet import frames
from nnunet_lowmem.options import Options, on_network_grid
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.predict.jobs import Array, Files, Job, Refused, Stored
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.preprocessing.finite_voxels import check_values
from nnunet_lowmem.preprocessing.reading import counted_by, read_channels
from nnunet_lowmem.preprocessing.sources import AsRead
from nnunet_lowmem.preprocessing.volume_io import reader_of_labels
from nnunet_lowmem.types import Box, PreprocessedCase, Wanted
from nnunet_lowmem.volumes.formats import read_header
from nnunet_lowmem.volumes.selection import is_store

logger = logging.getLogger(__name__)


def refuse_if_asked_for(options: Options, replaced: Sequence[str]) -> None:
    """Refuse a part where somebody else's code makes files of whole cases.

    Raises
    ------
    UsageError
        With what is replaced.
    """
    if replaced and (parse_box(options.bbox) is not None or options.roi is not None or on_network_grid(options)):
        names = "bbox, roi and output_grid"
        raise UsageError(f"{', '.join(replaced)} makes whole cases: the options {names} do not reach it")


def mask_file(roi: Any, case: str, file_ending: str) -> str | None:
    """Return the file of the mask of a case: that of the option, or in its folder the one of the case's name.

    Raises
    ------
    UsageError
        If the folder holds none, or the option is no path.
    """
    if roi is None:
        return None
    if not isinstance(roi, str | os.PathLike):
        raise UsageError(
            f"for files the option roi is a file or a folder of masks, and not of type {type(roi).__name__}"
        )
    if not os.path.isdir(roi) or is_store(roi):
        return str(os.fspath(roi))
    file = Path(roi) / (case + file_ending)
    if not file.exists():
        raise UsageError(f"the folder of the option roi, {os.fspath(roi)}, holds no mask {file.name} of case {case}")
    return str(file)


def check(setup: Setup, job: Job) -> None:
    """Refuse a part that a case cannot have, by the headers of its files.

    Raises
    ------
    UsageError
    """
    if setup.bbox is None and setup.options.roi is None and not setup.on_network_grid:
        return
    if isinstance(job.source, Stored):
        raise UsageError("a validation compares whole cases: the options bbox, roi and output_grid are for predictions")
    if job.output is not None:
        refuse_if_asked_for(setup.options, setup.steps.replaced(Step.EXPORT))
    if job.files is None or setup.steps.replaced(Step.READING, Step.PREPROCESSING):
        return
    library = counted_by(setup.plans_manager.image_reader_writer_class)
    shape, _ = read_header(job.files.images[0], library).grid()
    if setup.bbox is not None:
        box_within(setup.bbox, shape)
    if job.files.roi is not None:
        reader = reader_of_labels(setup.plans_manager.image_reader_writer_class)
        found, _ = read_header(job.files.roi, counted_by(reader)).grid()
        check_mask_shape(found, shape, of_headers=True)


@dataclass(frozen=True)
class Mask:
    """A mask as nnU-Net reads it.

    Attributes
    ----------
    inside : bool, shape (x, y, z)
        Where it is not zero.
    properties : dict
        nnU-Net's; empty of an array.
    file : str
        Empty of an array.
    """

    inside: NDArray[np.bool_]
    properties: dict[str, Any]
    file: str = ""


def read_mask(setup: Setup, job: Job) -> Mask | None:
    """Return the mask of a case, if one is given; of one that is stored it is there.

    Raises
    ------
    UsageError
        If it cannot be read, or holds what is no number.
    """
    roi, source = setup.options.roi, job.source
    is_stored = job.piece is not None and job.piece.stored is not None
    if roi is None or is_stored or isinstance(source, Refused):
        return None
    if isinstance(source, Array) and not isinstance(roi, str | os.PathLike):
        array = np.asarray(roi)
        check_values(array, "the mask of the option roi", accept_nan=False)
        return Mask(array != 0, {})
    name = job.name if job.output is None else os.path.basename(job.output)
    file = source.roi if isinstance(source, Files) else mask_file(roi, name, setup.file_ending)
    assert file is not None, "the option is a path"
    reader = reader_of_labels(setup.plans_manager.image_reader_writer_class)
    channels, properties = read_channels(reader, [file], setup.options.accept_nan)
    if len(channels) != 1:
        raise UsageError(f"{file} has {len(channels)} channels: a mask has one")
    return Mask(np.asarray(channels[0][:] != 0), properties, file)


def with_wanted(case: PreprocessedCase, mask: Mask | None, setup: Setup, of_file: bool) -> PreprocessedCase:
    """Return a case with what is asked for of it: a box, a region, or all of it on another grid.

    Parameters
    ----------
    case : PreprocessedCase
    mask : Mask or None
    setup : Setup
    of_file : bool
        The box is one of a file, whose axes its reader may have ordered anew.

    Raises
    ------
    UsageError
        If the case has no such box, or another shape than the mask.
    """
    case = _on_network_grid(case, setup) if setup.on_network_grid else case
    if case.wanted is not None or (setup.bbox is None and mask is None):
        return case
    forward, shape = setup.plans_manager.transpose_forward, array_shape(case, setup)
    box: Box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    if setup.bbox is not None and of_file:
        in_file = box_within(setup.bbox, frames.file_shape(shape, case.properties))
        box = frames.box_of_array(in_file, shape, case.properties)
    elif setup.bbox is not None:
        box = box_within(setup.bbox, shape)
    inside = None
    if mask is not None:
        check_mask_shape(mask.inside.shape, shape)
        _tell_if_elsewhere(mask, case)
        inside = mask.inside.transpose(forward)
    z, y, x = (box[axis] for axis in forward)
    return replace(case, wanted=Wanted((z, y, x), inside))


def narrowed(case: PreprocessedCase, box: Box | None) -> PreprocessedCase:
    """Return a case of which no more than a box of what is asked for of it is wanted, axes of the network."""
    if box is None:
        return case
    wanted = case.wanted or Wanted(whole(case.properties["shape_before_cropping"]))
    return replace(case, wanted=replace(wanted, box=moved(box, wanted.box)))


def _on_network_grid(case: PreprocessedCase, setup: Setup) -> PreprocessedCase:
    """Return a case of which the grid of the network is the one that labels are wanted on.

    Its voxels are those into which what was cropped has been resampled, so their edges end where that does.
    """
    backward, shape = setup.plans_manager.transpose_backward, [int(size) for size in case.image.shape[1:]]
    z, y, x = (slice(*map(int, case.properties["bbox_used_for_cropping"][axis])) for axis in backward)
    voxels = [shape[axis] for axis in backward]
    properties = frames.moved(case.properties, (z, y, x), array_shape(case, setup), voxels) | {
        "shape_before_cropping": tuple(shape),
        "bbox_used_for_cropping": [[0, size] for size in shape],
        "shape_after_cropping_and_before_resampling": tuple(shape),
    }
    return replace(case, properties=properties)


def _tell_if_elsewhere(mask: Mask, case: PreprocessedCase) -> None:
    """Warn of a mask that does not lie where the image lies, as of channels that do not."""
    for found, due in zip(frames.place_of(mask.properties), frames.place_of(case.properties), strict=False):
        if np.shape(found) != np.shape(due) or not np.allclose(found, due, atol=1e-3):
            logger.warning("%s does not lie in space where the image lies: %s and %s", mask.file, found, due)


def array_shape(case: PreprocessedCase, setup: Setup) -> list[int]:
    """Return the shape of a case in the order of nnU-Net's array."""
    before = case.properties["shape_before_cropping"]
    return [int(before[axis]) for axis in setup.plans_manager.transpose_backward]


def as_case(case: PreprocessedCase, part: Part, setup: Setup) -> PreprocessedCase:
    """Return the case that a part is by itself: a view of its image, and the properties that its writers need."""
    if case.wanted is None:
        return case
    z, y, x = (part.frame[axis] for axis in setup.plans_manager.transpose_backward)
    properties = frames.moved(case.properties, (z, y, x), array_shape(case, setup)) | {
        "shape_before_cropping": tuple(within.stop - within.start for within in part.frame),
        "bbox_used_for_cropping": [[within.start, within.stop] for within in part.crop],
        "shape_after_cropping_and_before_resampling": tuple(within.stop - within.start for within in part.crop),
    }
    image = case.image
    within = image.within(part.network) if isinstance(image, AsRead) else image[(slice(None), *part.network)]
    return replace(case, image=within, properties=properties, wanted=None)
