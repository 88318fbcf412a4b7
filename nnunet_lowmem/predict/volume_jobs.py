"""Which volumes a call is about that are none of nnU-Net's folders of images, and where their label maps go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.nnunet.adapter import OutputFile
from nnunet_lowmem.options import Options
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.predict.jobs import Files, Job, refused
from nnunet_lowmem.predict.parts import mask_file
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.predict.setup import Setup, checksum
from nnunet_lowmem.volumes import selection as names
from nnunet_lowmem.volumes.selection import Selection
from nnunet_lowmem.volumes.zarr_stores import address_of, states_of

# of a store without an ending
_NAMELESS = names.ZARR[0]
_PLANES = ".ome.tif"


@dataclass(frozen=True)
class Volumes:
    """What is asked for.

    Attributes
    ----------
    cases : list of list of str
        Paths or addresses of each.
    outputs : str, list of str, or None
        A folder; the name of each output; or nothing is written.
    """

    cases: list[list[str]]
    outputs: str | list[str] | None


def selection_of(options: Options) -> Selection:
    """Return how volumes are to be read by the options.

    Raises
    ------
    UsageError
        If a value can be none.
    """
    return Selection.of(options.level, options.key, options.planes, options.spacing)


def named(source: Any) -> Any:
    """Return paths for paths of any kind, and for what is open of zarr; lists stay lists."""
    if isinstance(source, list | tuple):
        return [named(each) for each in source]
    if isinstance(source, str):
        return source
    return os.fspath(source) if isinstance(source, os.PathLike) else address_of(source) or source


def volumes_of(source: Any, target: Any, options: Options, ending: str) -> Volumes | None:
    """Return which volumes are meant; None where it is a folder, or are lists, as nnU-Net has them.

    Parameters
    ----------
    source : str, or list of lists of str
        As `named` gives it.
    target : str, list of str, or None
        As `adapter.outputs` gives it.
    options : Options
    ending : str
        Of the model's images.

    Raises
    ------
    UsageError
        If they cannot be what is meant.
    """
    selection, is_file = selection_of(options), isinstance(target, OutputFile)
    if isinstance(source, str):
        cases = _cases_of(source, selection, ending, is_file)
    else:
        cases = [[each] if isinstance(each, str) else each for each in source]
        own = (
            names.ending_of(each, names.OWN) not in ("", ending) or names.is_store(each)
            for case in cases
            for each in case
        )
        cases = cases if selection.spacing is not None or any(own) else None
    if cases is None:
        return None
    if is_file and len(cases) != 1:
        raise UsageError(f"-o {target[0]} is the name of one file, and there are {len(cases)} cases: give a folder")
    return Volumes(cases, target)


def _cases_of(source: str, selection: Selection, ending: str, is_file: bool) -> list[list[str]] | None:
    if selection.planes:
        if not os.path.isdir(source):
            raise UsageError(f"--planes: {source} is no folder; give the folder of the planes")
        return [[source]]
    if names.is_volume(source) or (os.path.isfile(source) and source.endswith(ending)):
        return [[source]]
    if not os.path.isdir(source):
        return None
    found = model_files.listing(source, ending)
    if found.cases or found.strays:  # nnU-Net's folder, though perhaps with names that are to be mended
        return model_files.list_cases(source, ending) if selection.spacing is not None or is_file else None
    grouped: dict[tuple[str, str], list[str]] = {}
    for path in names.volumes_in(source):
        grouped.setdefault((case_name([path]), _ending_of(path)), []).append(path)
    return list(grouped.values()) or None


def _ending_of(path: str) -> str:
    return names.ending_of(path) or _NAMELESS


def case_name(files: Sequence[str]) -> str:
    """Return the name of a case of volumes: without number and ending."""
    path = files[0].rstrip("/")
    return model_files.case_name([path], names.ending_of(path))


def volume_jobs(volumes: Volumes, arguments: dict[str, Any], setup: Setup) -> list[Job]:
    """Make jobs of volumes.

    Raises
    ------
    UsageError
        If somebody else's code is to read them, or there are not as many outputs.
    """
    if replaced := setup.steps.replaced(Step.FILES, Step.ITERATION, Step.READING, Step.PREPROCESSING, Step.EXPORT):
        raise UsageError(f"{', '.join(replaced)} reads or writes files its own way: give nnU-Net's folder of images")
    if isinstance(volumes.outputs, list) and len(volumes.outputs) != len(volumes.cases):
        raise twin(UsageError, AssertionError)(
            f"one output for each case is needed: {len(volumes.outputs)} for {len(volumes.cases)} cases"
        )
    part = slice(arguments.get("part_id", 0), None, arguments.get("num_parts", 1))
    made_with = "" if volumes.outputs is None else checksum(setup, arguments["save_probabilities"])
    return [_job(volumes, number, arguments, setup, made_with) for number in range(len(volumes.cases))[part]]


def _job(volumes: Volumes, number: int, arguments: dict[str, Any], setup: Setup, made_with: str) -> Job:
    case = volumes.cases[number]
    files, output = files_of(case, setup), None
    name, refusal = case_name(case), None
    if isinstance(volumes.outputs, list):
        output = volumes.outputs[number]
        if given := names.ending_of(output):
            output, files = output[: -len(given)], replace(files, ending=given)
    elif volumes.outputs is not None:
        output = os.path.join(volumes.outputs, name)
    stage = _stage_of(arguments["folder_with_segs_from_prev_stage"], name, files.ending, setup.file_ending)
    files = replace(files, stage=stage)
    try:
        files = replace(files, roi=mask_file(setup.options.roi, name, files.ending))
    except UsageError as error:
        refusal = error
    if output is None:
        job = Job(name, None, files)
    else:
        recipe = _recipe(files, output, arguments["save_probabilities"], made_with)
        job = Job(name, output, files, recipe)
        if arguments["overwrite"] and recipe.outputs[0].is_dir():
            there = f"{shown(str(recipe.outputs[0]))} is there"
            refusal = UsageError(f"{there}: remove it, choose another name, or go on with --continue_prediction")
    return job if refusal is None else refused(job, refusal)


def files_of(case: Sequence[str], setup: Setup) -> Files:
    """Return how the volumes of a case are read, and with which ending its label map is written: as they came."""
    first, model_ending, selection = case[0], setup.file_ending, selection_of(setup.options)
    is_own = selection.planes or names.is_store(first) or bool(names.ending_of(first, names.OWN))
    if not is_own and first.endswith(model_ending):
        return Files(list(case), selection=None if selection.spacing is None else selection, ending=model_ending)
    ending = _PLANES if selection.planes else names.ending_of(first) or _NAMELESS
    return Files(list(case), selection=selection, ending=ending)


def _recipe(files: Files, output: str, probabilities: bool, made_with: str) -> Recipe:
    endings = [files.ending, ".npz", ".pkl"] if probabilities else [files.ending]
    read = [file for file in (*files.images, files.stage, files.roi) if file is not None and not names.is_remote(file)]
    # of a store, its folders tell by their times that it is another
    inputs = [path for file in read for path in (states_of(Path(file)) if os.path.isdir(file) else [Path(file)])]
    is_plain = files.selection is None or files.selection == Selection()
    told = made_with if is_plain else f"{made_with} {files.selection}"
    return Recipe(tuple(Path(output + ending) for ending in endings), tuple(inputs), told)


def _stage_of(folder: str | None, name: str, *endings: str) -> str | None:
    if folder is None:
        return None
    found = (os.path.join(folder, name + ending) for ending in endings)
    return next((file for file in found if os.path.exists(file)), os.path.join(folder, name + endings[0]))
