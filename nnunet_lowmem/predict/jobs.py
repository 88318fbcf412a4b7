"""Cases waiting to be predicted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from nnunet_lowmem.errors import LowMemError, UsageError, WriteError, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.system.placing import place_of
from nnunet_lowmem.types import PreprocessedCase

if TYPE_CHECKING:  # a prefetching worker imports this file and plans nothing
    from nnunet_lowmem.budget.arrays import CaseFacts
    from nnunet_lowmem.budget.case_plan import CasePlanner


@dataclass(frozen=True)
class Job:
    """One case to predict.

    Attributes
    ----------
    name : str
        As messages show it.
    output : str or None
        Where to write, without the file ending; None returns the arrays.
    load : callable
        Returns the preprocessed case.
    files : (image files, file of the previous stage or None), or None
        What `load` reads, if it reads files: a worker can do it instead.
    recipe : Recipe or None
        What a done-record of the case is about; None where nothing is recorded.
    array : (image, labels of the previous stage or None, properties), or None
        What `load` preprocesses, if it is given arrays.
    following : (image files, file of the previous stage or None), or None
        Files of the case after it, where these are known and `load` of that case waits for nobody.
    """

    name: str
    output: str | None
    load: Callable[[], PreprocessedCase]
    files: tuple[list[str], str | None] | None = None
    recipe: Recipe | None = None
    array: tuple[Any, Any, dict[str, Any]] | None = None
    following: tuple[list[str], str | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown(self.name))


def facts_of_job(planner: CasePlanner, job: Job, probabilities: bool) -> CaseFacts | None:
    """Return upper bounds of a case by its headers, or by its array; None where there is neither.

    Raises
    ------
    UsageError
        If a header cannot be read, or the array is no image.
    """
    if job.files is not None:
        return planner.facts_of_files(job.name, *job.files, probabilities)
    return None if job.array is None else planner.facts_of_array(job.name, *job.array, probabilities)


def in_a_row(jobs: Sequence[Job]) -> list[Job]:
    """Let each job know the files of the one after it."""
    return [replace(job, following=after.files) for job, after in pairwise(jobs)] + list(jobs[-1:])


def job_of_item(item: dict[str, Any]) -> Job:
    """Make a job of an item of one of stock's data iterators: 'data', 'ofile', 'data_properties'.

    The data may be the path of a .npy file, which is removed once it has been read.
    """

    def load() -> PreprocessedCase:
        data = item["data"]
        if isinstance(data, str):
            path, data = Path(data), np.load(data)
            path.unlink()
        image = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else data
        return PreprocessedCase(image, None, item["data_properties"])

    output = item["ofile"]
    return Job(os.path.basename(output) if output else "array", output, load)


def jobs_of_arrays(
    images: Any, stages: Any, properties: Any, outputs: Any, preprocess: Callable[..., PreprocessedCase]
) -> list[Job]:
    """Make jobs of arrays, each preprocessed by ``preprocess(image, stage, properties)``.

    Parameters
    ----------
    images, properties : list, or the only one
    stages, outputs : list, the only one, or None
    preprocess : callable
        Gets copies of the properties: stock sends them to other processes, so that the caller's stay as they are.

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
        Job(
            f"array {number}",
            output,
            partial(_with_a_copy, preprocess, image, stage, entry),
            array=(image, stage, entry),
        )
        for number, (image, stage, entry, output) in enumerate(zip(*columns, strict=True))
    ]


def _with_a_copy(
    preprocess: Callable[..., PreprocessedCase], image: Any, stage: Any, properties: dict[str, Any]
) -> PreprocessedCase:
    return preprocess(image, stage, dict(properties))


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
        model_files.check_numbers(job.files[0], file_ending)
    except UsageError as error:
        is_stray = not model_files.is_numbered(job.files[0][0], file_ending)
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
    kind, text = type(error), str(error)

    def refuse() -> NoReturn:
        raise kind(text)

    return replace(job, load=refuse, files=None)
