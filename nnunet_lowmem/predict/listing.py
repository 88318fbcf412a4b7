"""Which cases a call about files is about, and where the outputs of each go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import UsageError, WriteError, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import adapter, model_files
from nnunet_lowmem.predict.jobs import Files, Job, Refused, refused
from nnunet_lowmem.predict.listeners import logging_prints
from nnunet_lowmem.predict.parts import mask_file
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.predict.setup import Setup, checksum
from nnunet_lowmem.predict.volume_jobs import check_spacing, named, volume_jobs, volumes_of
from nnunet_lowmem.system.atomic_files import try_output
from nnunet_lowmem.system.placing import place_of
from nnunet_lowmem.volumes.selection import ZARR, ending_of

_NO_NEW_FILES = (errno.EPERM, errno.EACCES, errno.EROFS)


def list_jobs(arguments: dict[str, Any], setup: Setup, manage: Callable[..., Any], is_listed: bool) -> list[Job]:
    """List the cases; beside the outputs is written what stock writes for a run as a whole.

    Parameters
    ----------
    arguments : dict
        Those of ``predict_from_files``, as stock records them, or of ``predict_from_files_sequential``.
    setup : Setup
    manage : callable
        The predictor's ``_manage_input_and_output_lists``.
    is_listed : bool
        That is somebody else's: it says by itself which cases there are.

    Raises
    ------
    UsageError
        If there is no such part, or segmentations of a cascade's first stage are missing.
    """
    overwrite, probabilities = arguments["overwrite"], arguments["save_probabilities"]
    part_id, parts = arguments.get("part_id", 0), arguments.get("num_parts", 1)
    if part_id > parts:
        raise twin(UsageError, AssertionError)(f"part_id counts from 0; {part_id} is above num_parts {parts}")
    check_spacing(setup)
    if is_listed and setup.on_network_grid:
        raise UsageError("somebody else's code names the outputs: the option output_grid does not reach it")
    source, ending = named(arguments["list_of_lists_or_source_folder"]), setup.file_ending
    target = adapter.outputs(arguments["output_folder_or_list_of_truncated_output_files"])
    volumes = volumes_of(source, target, setup.options, ending)
    arguments = {**arguments, "list_of_lists_or_source_folder": source}
    stage_folder = arguments["folder_with_segs_from_prev_stage"]
    previous_stage = setup.configuration_manager.previous_stage_name
    if previous_stage is not None and stage_folder is None:
        raise twin(UsageError, AssertionError)(
            f"this configuration is the second stage of a cascade and needs the segmentations of "
            f"{previous_stage!r}: give their folder with -prev_stage_predictions"
        )
    if volumes is not None:
        jobs = volume_jobs(volumes, arguments, setup)  # which may refuse all of them
    adapter.write_run_files(target, arguments, setup.dataset_json, setup.plans_manager.plans)
    if volumes is not None:
        return jobs
    folder = source if isinstance(source, str) else None
    if folder is not None:
        model_files.tell_skipped(folder, ending)
        source = source if is_listed else model_files.list_cases(folder, ending)
    with logging_prints():
        cases, outputs, stages = manage(
            source, target, stage_folder, overwrite or not is_listed, part_id, parts, probabilities
        )
    stages = stages or [None] * len(cases)
    if outputs is not None and isinstance(target, str):
        outputs = [output + setup.name_suffix for output in outputs]
    if outputs is not None and len(outputs) > len(cases):  # nnU-Net 2.5 gives each part the names of all
        outputs = outputs[part_id::parts]
    model_files.check_previous_stage(cases, stages, ending)
    endings = [ending, ".npz", ".pkl"] if probabilities else [ending]
    made_with = "" if outputs is None else checksum(setup, probabilities)
    columns = zip(cases, outputs or [None] * len(cases), stages, strict=True)
    jobs = [_job_of_files(*column, endings, made_with, setup.options.roi) for column in columns]
    if folder is None:
        return jobs
    jobs = [_unless_misnumbered(job, ending) for job in jobs]
    return [_unless_among_images(job, folder) for job in jobs] if overwrite else jobs


def _job_of_files(
    files: Sequence[str | os.PathLike[str]],
    output: str | None,
    stage: str | None,
    endings: Sequence[str],
    made_with: str,
    roi: Any,
) -> Job:
    """Make a job of files; `endings` are those of what is written for a case, the label map first."""
    images, recipe, mask, refusal = [os.fspath(file) for file in files], None, None, None
    name = model_files.case_name(images, endings[0])
    try:
        mask = mask_file(roi, name, endings[0])
    except UsageError as error:
        refusal = error
    if output is not None:
        inputs = tuple(Path(file) for file in (*images, stage, mask) if file is not None)
        recipe = Recipe(tuple(Path(output + ending) for ending in endings), inputs, made_with)
    job = Job(name, output, Files(images, stage, mask), recipe)
    return job if refusal is None else refused(job, refusal)


def _unless_misnumbered(job: Job, file_ending: str) -> Job:
    """Let a case of a folder fail when its turn comes: a channel is missing, or there is no number at all.

    A file without a number has no output that could have been made before.
    """
    if job.files is None:  # it is refused
        return job
    try:
        model_files.check_numbers(job.files.images, file_ending)
    except UsageError as error:
        is_stray = not model_files.is_numbered(job.files.images[0], file_ending)
        return refused(replace(job, recipe=None) if is_stray else job, error)
    return job


def _unless_among_images(job: Job, folder: str) -> Job:
    """Let a case fail whose output would take the place of a file in the folder of images that nobody has recorded."""
    if job.recipe is None:
        return job
    output = job.recipe.outputs[0]
    if not output.is_file() or not os.path.samefile(output.parent, folder) or job.recipe.is_recorded():
        return job
    told = f"{shown(str(output))} is among the images, and no record says that it is an output"
    return refused(job, UsageError(f"{told}: move it, or give another folder with -o"))


def refuse_unwritable(jobs: Sequence[Job]) -> list[Job]:
    """Let a case fail when its turn comes, before it is computed, if one of its outputs cannot be written."""
    tried: dict[tuple[Path, bool], WriteError | None] = {}
    return [_unless_unwritable(job, tried) for job in jobs]


def _unless_unwritable(job: Job, tried: dict[tuple[Path, bool], WriteError | None]) -> Job:
    if isinstance(job.source, Refused):
        return job
    try:
        for output in () if job.recipe is None else job.recipe.outputs:
            place = place_of(output)
            refusal = _tried(place.parent, bool(ending_of(output, ZARR)), tried)
            # a file that is there may be written to where no other can be made
            if refusal is not None and not (place.exists() and refusal.errno in _NO_NEW_FILES):
                raise refusal
    except WriteError as error:
        return refused(job, error)
    return job


def _tried(folder: Path, is_folder: bool, tried: dict[tuple[Path, bool], WriteError | None]) -> WriteError | None:
    if (folder, is_folder) not in tried:
        try:
            try_output(folder, is_folder)
            tried[folder, is_folder] = None
        except WriteError as error:
            tried[folder, is_folder] = error
    return tried[folder, is_folder]
