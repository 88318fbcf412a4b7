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
from nnunet_lowmem.nnunet.read_by import plans_read_by, turns
from nnunet_lowmem.options import Options
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.lookup import OF_FILES
from nnunet_lowmem.predict.jobs import Files, Job, refused
from nnunet_lowmem.predict.parts import mask_file
from nnunet_lowmem.predict.provenance import of_labels
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.predict.setup import Setup, checksum
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.volumes import selection as names
from nnunet_lowmem.volumes.selection import Selection
from nnunet_lowmem.volumes.zarr_stores import address_of

# of a store without an ending
_NAMELESS = names.ZARR[0]
_PLANES = ".ome.tif"
_NOT_FOR_OTHERS = (*OF_FILES, Step.EXPORT, Step.LISTING)


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


def check_spacing(setup: Setup) -> None:
    """Refuse a spacing where it does not reach who reads the images.

    Raises
    ------
    UsageError
    """
    if setup.spacing is None:
        return
    if replaced := setup.steps.replaced(*_NOT_FOR_OTHERS):
        raise UsageError(f"{', '.join(replaced)} reads images its own way: the option spacing does not reach it")
    reader = setup.plans_manager.image_reader_writer_class
    if turns(reader):
        raise UsageError(f"the model's reader, {reader.__name__}, turns images: mend the spacing in their headers")


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
    selection = selection_of(options)
    if isinstance(source, str):
        cases = _cases_of(source, selection, ending, isinstance(target, OutputFile))
    else:
        listed = [[each] if isinstance(each, str) else each for each in source]
        is_meant = isinstance(target, OutputFile) or any(_is_ours(each, ending) for case in listed for each in case)
        cases = listed if is_meant else None
    if cases is None:
        return None
    if isinstance(target, OutputFile) and len(cases) != 1:
        raise UsageError(f"-o {target[0]} is the name of one file, and there are {len(cases)} cases: give a folder")
    return Volumes(cases, target)


def _is_ours(path: Any, ending: str) -> bool:
    """Whether no reader of nnU-Net's takes a file of a list; the reader of a model for TIFF takes others, too."""
    if not isinstance(path, str) or path.endswith(ending):
        return False
    own = names.ZARR + names.HDF5 + (() if ending in names.TIFF else names.TIFF)
    return bool(names.ending_of(path, own)) or names.is_store(path)


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
        if not is_file:
            return None
        cases = model_files.list_cases(source, ending)
        for files in cases if len(cases) == 1 else ():
            model_files.check_numbers(files, ending)
        return cases
    return _grouped(names.volumes_in(source)) or None


def _grouped(paths: Sequence[str]) -> list[list[str]]:
    """Return cases: those whose numbers run from 0 are channels of one, any other is one by itself."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        ending = names.ending_of(path)
        is_numbered = model_files.is_numbered(path, ending)
        name = model_files.case_name([path], ending) if is_numbered else os.path.basename(path)
        groups.setdefault((name, ending if is_numbered else ""), []).append(path)
    cases = []
    for (_, ending), files in groups.items():
        numbers = [file[-len(ending) - 4 : -len(ending)] for file in files] if ending else []
        is_one = numbers == [f"{number:04d}" for number in range(len(files))]
        cases += [files] if is_one else [[file] for file in files]
    return cases


def case_name(files: Sequence[str]) -> str:
    """Return the name of a case of volumes: without ending, and without the number of the first channel."""
    path = files[0].rstrip("/")
    ending = names.ending_of(path)
    if ending and path.endswith(f"_0000{ending}"):
        return model_files.case_name([path], ending)
    # an array is named with the store that it is in
    parts = path.replace(os.sep, "/").split("/")
    store = next((at for at, part in enumerate(parts[:-1]) if names.ending_of(part, names.ZARR)), len(parts) - 1)
    return "_".join(part.removesuffix(names.ending_of(part)) for part in parts[store:])


def volume_jobs(volumes: Volumes, arguments: dict[str, Any], setup: Setup) -> list[Job]:
    """Make jobs of volumes.

    Raises
    ------
    UsageError
        If somebody else's code is to read or write them, or there are not as many outputs, or two have one name.
    """
    if replaced := setup.steps.replaced(*_NOT_FOR_OTHERS):
        raise UsageError(f"{', '.join(replaced)} reads or writes files its own way: give nnU-Net's folder of images")
    if isinstance(volumes.outputs, list) and len(volumes.outputs) != len(volumes.cases):
        raise twin(UsageError, AssertionError)(
            f"one output for each case is needed: {len(volumes.outputs)} for {len(volumes.cases)} cases"
        )
    part = slice(arguments.get("part_id", 0), None, arguments.get("num_parts", 1))
    made_with = "" if volumes.outputs is None else checksum(setup, arguments["save_probabilities"])
    jobs = [_job(volumes, number, arguments, setup, made_with) for number in range(len(volumes.cases))]
    known: dict[Path, int] = {}
    for number, job in enumerate(jobs):
        for output in () if job.recipe is None else job.recipe.outputs:
            if (other := known.setdefault(output, number)) != number:
                both = " and ".join(shown(volumes.cases[each][0]) for each in (other, number))
                raise UsageError(f"{both} would both be written as {shown(str(output))}: give their outputs one by one")
    return jobs[part]


def _job(volumes: Volumes, number: int, arguments: dict[str, Any], setup: Setup, made_with: str) -> Job:
    case = volumes.cases[number]
    files, output = files_of(case, setup), None
    name, refusal = case_name(case), None
    if isinstance(volumes.outputs, list):
        output = volumes.outputs[number]
        if given := names.ending_of(output):
            output, files = output[: -len(given)], replace(files, ending=given)
    elif volumes.outputs is not None:
        output = os.path.join(volumes.outputs, name + setup.name_suffix)
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
        refusal = refusal or _why_refused(recipe, arguments["overwrite"])
    return job if refusal is None else refused(job, refusal)


def _why_refused(recipe: Recipe, overwrite: bool) -> UsageError | None:
    """Return why an output cannot be where it is asked for: an input is there, or a store."""
    for output in recipe.outputs:
        for read in recipe.inputs:
            if output.exists() and read.exists() and os.path.samefile(output, read):
                return UsageError(f"{shown(str(output))} is read, and would be overwritten: give another name with -o")
            if read.is_dir() and Path(os.path.abspath(read)) in Path(os.path.abspath(output)).parents:
                return UsageError(
                    f"{shown(str(output))} lies within what is read, {shown(str(read))}: put it elsewhere"
                )
    if overwrite and recipe.outputs[0].is_dir():
        there = f"{shown(str(recipe.outputs[0]))} is there"
        return UsageError(f"{there}: remove it, choose another name, or go on with --continue_prediction")
    return None


def files_of(case: Sequence[str], setup: Setup) -> Files:
    """Return how the volumes of a case are read, and with which ending its label map is written: as they came."""
    first, model_ending, selection = case[0], setup.file_ending, selection_of(setup.options)
    is_own = selection.planes or names.is_store(first) or bool(names.ending_of(first, names.OWN))
    if not is_own and first.endswith(model_ending):
        return Files(list(case), ending=model_ending)
    reader = setup.plans_manager.image_reader_writer_class
    if not is_own and turns(reader):
        raise UsageError(f"{shown(first)}: the model's reader, {reader.__name__}, turns images: give {model_ending}")
    ending = _PLANES if selection.planes else names.ending_of(first) or _NAMELESS
    return Files(list(case), selection=selection, ending=ending)


def _recipe(files: Files, output: str, probabilities: bool, made_with: str) -> Recipe:
    endings = [files.ending, ".npz", ".pkl"] if probabilities else [files.ending]
    read = [file for file in (*files.images, files.stage, files.roi) if file is not None and not names.is_remote(file)]
    return Recipe(tuple(Path(output + ending) for ending in endings), tuple(map(Path, read)), made_with)


def _stage_of(folder: str | None, name: str, *endings: str) -> str | None:
    if folder is None:
        return None
    found = (os.path.join(folder, name + ending) for ending in endings)
    return next((file for file in found if os.path.exists(file)), os.path.join(folder, name + endings[0]))


# -- who reads and writes ----------------------------------------------------------------------------------------------


def setup_for(setup: Setup, job: Job) -> Setup:
    """Return the setup for a job: who reads and writes is its own where it is one of volumes.

    Raises
    ------
    UsageError
        If the model's own reader is needed, and writes no such files.
    """
    return setup if job.files is None else setup_for_files(setup, job.files, job.name)


def setup_for_files(setup: Setup, files: Files, case: str = "") -> Setup:
    """As `setup_for`, of the files of a case."""
    if files.selection is None and files.ending in ("", setup.file_ending):
        return setup
    ending = files.ending or setup.file_ending
    classes = model_files.label_names(setup.dataset_json)
    how = plans_read_by(
        setup.plans_manager,
        files.selection,
        ending,
        setup.file_ending,
        classes,
        lambda: {"nnunet_lowmem": _made(setup, files, case)},
    )
    return replace(setup, plans_manager=how, dataset_json={**setup.dataset_json, "file_ending": ending})


def _made(setup: Setup, files: Files, case: str) -> dict[str, Any]:
    """Return how labels are made, for the files that say so."""
    roi = {} if files.roi is None else {"roi": os.path.basename(files.roi)}
    return {"case": case, **of_labels(setup), "arithmetic": Ways(setup).arithmetic().value, **roi}
