"""Cases waiting to be predicted, as plain data: what there is to read, and where to write."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import LowMemError, UsageError, WriteError, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.system.placing import place_of


@dataclass(frozen=True)
class Files:
    """Images of all channels, and the segmentation of the previous stage of a cascade, if any."""

    images: list[str]
    stage: str | None = None


@dataclass(frozen=True)
class Array:
    """An image in memory, shape (channels, x, y, z), with nnU-Net's properties.

    Attributes
    ----------
    stage : array, shape (x, y, z), or None
        Labels of the previous stage.
    by_adapter : bool
        nnU-Net's adapter is somebody else's: it preprocesses the image.
    """

    image: Any
    stage: Any
    properties: Any
    by_adapter: bool = False


@dataclass(frozen=True)
class Item:
    """A preprocessed image of one of stock's data iterators: an array, a tensor, or the path of a .npy file."""

    data: Any
    properties: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A case of a preprocessed data set, by the name it has there."""

    name: str


@dataclass(frozen=True)
class Refused:
    """A case that cannot be right, and why."""

    kind: type[LowMemError]
    text: str


@dataclass(frozen=True)
class Job:
    """One case to predict.

    Attributes
    ----------
    name : str
        As messages show it.
    output : str or None
        Where to write, without the file ending; None returns the arrays.
    source : Files, Array, Item, Stored or Refused
        What it is made from.
    recipe : Recipe or None
        What a done-record of the case is about; None where nothing is recorded.
    """

    name: str
    output: str | None
    source: Files | Array | Item | Stored | Refused
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown(self.name))

    @property
    def files(self) -> Files | None:
        """What there is to read, if it is files."""
        return self.source if isinstance(self.source, Files) else None


def job_of_item(item: dict[str, Any]) -> Job:
    """Make a job of an item of one of stock's data iterators: 'data', 'ofile', 'data_properties'."""
    output = item["ofile"]
    name = os.path.basename(output) if output else "array"
    return Job(name, output, Item(item["data"], item["data_properties"]))


def jobs_of_arrays(images: Any, stages: Any, properties: Any, outputs: Any) -> list[Job]:
    """Make jobs of arrays.

    Properties are copied: stock sends them to other processes, so that the caller's stay as they are.

    Parameters
    ----------
    images, properties : list, or the only one
    stages, outputs : list, the only one, or None

    Raises
    ------
    UsageError
        If there are not as many of each.
    """
    count = len(images) if isinstance(images, list) else 1
    columns = [
        value if isinstance(value, list) else [None] * count if value is None else [value]
        for value in (images, stages, properties, outputs)
    ]
    if {*map(len, columns)} != {count}:
        numbers = "images {}, segmentations of the previous stage {}, properties {}, outputs {}"
        raise twin(UsageError, RuntimeError)(f"one of each is needed: {numbers.format(*map(len, columns))}")
    return [
        Job(f"array {number}", output, Array(image, stage, copy.copy(entry)))
        for number, (image, stage, entry, output) in enumerate(zip(*columns, strict=True))
    ]


def jobs_of_files(
    cases: Sequence[Sequence[str | os.PathLike[str]]],
    outputs: Sequence[str] | None,
    stages: Sequence[str | None],
    file_endings: Sequence[str],
    made_with: Callable[[], str],
) -> list[Job]:
    """Make jobs of files.

    Parameters
    ----------
    cases : sequence of image files each
    outputs : sequence of str, or None
        Without file endings.
    stages : sequence of str or None
        Segmentations of the previous stage.
    file_endings : sequence of str
        Of the files that are written for a case, the label map first.
    made_with : callable
        Returns the checksum of all that labels depend on beside the images; asked where files are written.
    """
    checksum = "" if outputs is None else made_with()
    targets: Sequence[str | None] = outputs or [None] * len(cases)
    jobs = []
    for files, output, stage in zip(cases, targets, stages, strict=True):
        images = [os.fspath(file) for file in files]
        recipe = None
        if output is not None:
            inputs = tuple(map(Path, images if stage is None else [*images, stage]))
            recipe = Recipe(tuple(Path(output + ending) for ending in file_endings), inputs, checksum)
        jobs.append(Job(model_files.case_name(images, file_endings[0]), output, Files(images, stage), recipe))
    return jobs


def of_folder(jobs: Sequence[Job], folder: str, file_ending: str, overwrites: bool) -> list[Job]:
    """Let those cases of a folder of images fail, when their turn comes, that cannot be right."""
    jobs = [_unless_misnumbered(job, file_ending) for job in jobs]
    return [_unless_among_images(job, folder) for job in jobs] if overwrites else jobs


def _unless_misnumbered(job: Job, file_ending: str) -> Job:
    """Let a case of a folder fail when its turn comes: a channel is missing, or there is no number at all.

    A file without a number has no output that could have been made before.
    """
    assert job.files is not None, "a case of a folder has files"
    try:
        model_files.check_numbers(job.files.images, file_ending)
    except UsageError as error:
        is_stray = not model_files.is_numbered(job.files.images[0], file_ending)
        return _refused(replace(job, recipe=None) if is_stray else job, error)
    return job


def _unless_among_images(job: Job, folder: str) -> Job:
    """Let a case fail whose output would take the place of a file in the folder of images that nobody has recorded."""
    output = None if job.recipe is None else job.recipe.outputs[0]
    if output is None or not output.is_file() or not os.path.samefile(output.parent, folder):
        return job
    if job.recipe is None or job.recipe.is_recorded():
        return job
    told = f"{shown(str(output))} is among the images, and no record says that it is an output"
    return _refused(job, UsageError(f"{told}: move it, or give another folder with -o"))


def unless_unwritable(job: Job) -> Job:
    """Let a case fail when its turn comes, before it is computed, if one of its outputs cannot be written."""
    try:
        for output in () if job.recipe is None else job.recipe.outputs:
            place_of(output)
    except WriteError as error:
        return _refused(job, error)
    return job


def _refused(job: Job, error: LowMemError) -> Job:
    return replace(job, source=Refused(type(error), str(error)))
