"""Files as nnU-Net lays them out: trained model folders and folders of cases. Imports neither torch nor nnU-Net."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_lowmem.errors import ModelError, UsageError, because, missing, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.volumes.selection import is_store

_SHOWN = 8
# characters of a channel number, "_0000"
_NUMBER = 5
_logger = logging.getLogger(__name__)


class Listing(NamedTuple):
    """What a folder of images holds.

    Attributes
    ----------
    cases : list of list of str
        Files of each case, channel after channel, by the names of the cases.
    strays : list of str
        Files without a channel number, which stock takes none of.
    earlier : list of str
        Names that the segmentations of these cases have: those of an earlier run, as a rule.
    passed_over : list of str
        Names without a channel number that stock takes for those of a case, and then does without.
    """

    cases: list[list[str]]
    strays: list[str]
    earlier: list[str]
    passed_over: list[str]


def listing(folder: str, file_ending: str) -> Listing:
    """Sort the files of a folder that have the ending."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(file_ending))
    names = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    cases: dict[str, list[str]] = {}
    for name in names:
        if is_numbered(name, file_ending):
            cases.setdefault(case_name([name], file_ending), []).append(os.path.join(folder, name))
    found = Listing([cases[case] for case in sorted(cases)], [], [], [])
    for name in (name for name in names if not is_numbered(name, file_ending)):
        if name.removesuffix(file_ending) in cases:
            found.earlier.append(name)
        elif name[: -len(file_ending) - _NUMBER] in cases:
            found.passed_over.append(name)
        else:
            found.strays.append(os.path.join(folder, name))
    return found


def list_cases(folder: str, file_ending: str) -> list[list[str]]:
    """List the files of each case in a folder, channel after channel, as stock does (without its process pool).

    A file without a channel number is a case of its own, for `check_numbers` to refuse, unless it belongs to another.

    Raises
    ------
    UsageError
        If no file has a channel number.
    """
    found = listing(folder, file_ending)
    if found.strays and not found.cases:
        raise _unnumbered(found.strays[0], file_ending)
    return sorted([*found.cases, *([file] for file in found.strays)], key=lambda files: case_name(files, file_ending))


def is_numbered(file: str, file_ending: str) -> bool:
    """Whether a file is a channel of a case by its name."""
    return re.fullmatch(r".*_\d\d\d\d" + re.escape(file_ending), os.path.basename(file), re.DOTALL) is not None


def _unnumbered(file: str, file_ending: str) -> UsageError:
    return twin(UsageError, IndexError)(
        f"{shown(file)} has no channel number: name the files CASE_0000{file_ending}, CASE_0001{file_ending} and so "
        "on, one for each channel"
    )


def check_numbers(files: Sequence[str], file_ending: str) -> None:
    """Refuse a case of a folder whose channels are not numbered from 0 without a gap.

    Raises
    ------
    UsageError
        With the first file that is missing, or that has no number.
    """
    for number, file in enumerate(files):
        if not is_numbered(file, file_ending):
            raise _unnumbered(file, file_ending)
        if not file.endswith(f"_{number:04d}{file_ending}"):
            wanted = file[: -(len(file_ending) + 4)] + f"{number:04d}{file_ending}"
            reason = "is a broken link" if os.path.islink(wanted) else "is not a file there"
            raise twin(UsageError, RuntimeError)(
                f"channel {number} is missing: {shown(wanted)} {reason}, although there is {shown(file)}"
            )


def check_for_stock(folder: str, file_ending: str) -> None:
    """Refuse a folder of which stock's command predicts nothing.

    Raises
    ------
    UsageError
        With the first file that keeps it from that.
    """
    found = listing(folder, file_ending)
    known = {case_name(files, file_ending) for files in found.cases}
    outputs = [name for name in found.earlier if name[: -len(file_ending) - _NUMBER] not in known]
    alien = found.strays + [os.path.join(folder, name) for name in outputs]
    if alien:
        raise twin(UsageError, IndexError)(
            f"{shown(alien[0])} has no channel number, and stock's command predicts no folder that holds such a file: "
            "move it away"
        )


def tell_skipped(folder: str, file_ending: str) -> None:
    """Log once which names in a folder of images are no images, and why; hidden names are nobody's."""
    found = listing(folder, file_ending)
    reasons: dict[str, list[str]] = {}
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        reason = _why_skipped(os.path.join(folder, name), file_ending)
        reason = "outputs of an earlier run, by their names" if name in found.earlier else reason
        reason = "without a channel number" if name in found.passed_over else reason
        if reason:
            reasons.setdefault(reason, []).append(shown(name))
    for reason, names in reasons.items():
        some = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        _logger.warning("%s: skipped, %s: %s", shown(folder), reason, some)


def _why_skipped(path: str, file_ending: str) -> str | None:
    if not os.path.exists(path):
        return "broken links"
    if os.path.isdir(path):
        return "folders" if path.endswith(file_ending) else "stores, beside such files" if is_store(path) else None
    if not os.path.isfile(path):
        return "neither files nor links to files"
    return None if path.endswith(file_ending) else f"without the ending {file_ending}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises
    ------
    ModelError
        If the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise because(ModelError, f"{path} cannot be read: {error}", error) from error
    if not isinstance(content, dict):
        raise twin(ModelError, TypeError)(f"{path} holds no JSON object")
    return content


def check_file_ending(dataset_json: dict[str, Any], path: Path) -> str:
    """Return the ending of images and segmentations; names of files are made with it, so it must not lead elsewhere.

    Raises
    ------
    ModelError
        If there is none, or it is more than an ending.
    """
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str):
        raise twin(ModelError, KeyError)(f"{path} does not say which 'file_ending' the images have")
    if not re.fullmatch(r"(\.\w[\w+-]*){1,4}", ending, re.ASCII) or len(ending) > 32:
        raise ModelError(f"{path}: 'file_ending' {ending!r} is not the ending of a file name, such as .nii.gz")
    return ending


def case_name(files: Sequence[str], file_ending: str) -> str:
    """Name of a case: its first file without channel number and ending; without the ending where it has no number."""
    name = os.path.basename(files[0])
    return name[: -len(file_ending) - _NUMBER] if is_numbered(name, file_ending) else name.removesuffix(file_ending)


def label_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each value of a label map; with regions, of the one that is written with that value."""
    labels = dataset_json["labels"]
    order = dataset_json.get("regions_class_order")
    if order is not None:
        regions = [name for name, values in labels.items() if values not in (0, [0])]
        return {int(value): str(name) for value, name in zip(order, regions, strict=False)}
    return {int(value): str(name) for name, value in labels.items() if not isinstance(value, list | tuple)}


def check_previous_stage(cases: Sequence[Sequence[str]], stages: Sequence[str | None], file_ending: str) -> None:
    """Refuse cases of a cascade whose segmentation of the previous stage is missing.

    Raises
    ------
    UsageError
        With the first such case and how many there are.
    """
    lacking = [
        (case_name(files, file_ending), stage)
        for files, stage in zip(cases, stages, strict=True)
        if stage is not None and not os.path.isfile(stage) and is_numbered(files[0], file_ending)
    ]
    if lacking:
        name, stage = lacking[0]
        raise twin(UsageError, RuntimeError)(
            f"the previous stage of {len(lacking)} of {len(cases)} cases is missing; the first is case {shown(name)}, "
            f"expected as {shown(stage)}"
        )


def checkpoint_files(
    model_folder: str, folds: Sequence[int | str] | int | str | None, checkpoint_name: str, checks: bool = True
) -> list[Path]:
    """Find the checkpoint of each fold; None takes every numbered fold that has one.

    Without `checks` the files need not be there: a program may read what has these names from elsewhere.

    Raises
    ------
    ModelError
        If the folder, its dataset.json or plans.json, or a checkpoint is missing.
    """
    folder = Path(model_folder)
    for needed in (folder, folder / "dataset.json", folder / "plans.json"):
        if checks and not needed.exists():
            raise missing(ModelError, f"not a trained model folder: {needed} does not exist", needed)
    if folds is None:
        found = sorted(folder.glob(f"fold_[0-9]*/{checkpoint_name}"))
        if not found:
            raise missing(ModelError, f"no fold in {folder} has a checkpoint {checkpoint_name!r}", folder)
        return found
    chosen = [folds] if isinstance(folds, (int, str)) else folds
    files = [folder / f"fold_{fold if fold == 'all' else int(fold)}" / checkpoint_name for fold in chosen]
    if not files:
        raise UsageError(f"no folds of {folder} are asked for")
    for file in files:
        if checks and not file.is_file():
            raise missing(
                ModelError,
                f"checkpoint {file} does not exist. {folder} holds {_folds_in_words(folder, checkpoint_name)}; "
                "choose folds with -f and another checkpoint with -chk",
                file,
            )
    return files


def folds_in(model_folder: Path, checkpoint_name: str) -> list[int | str]:
    """Return the folds that have a checkpoint of that name, as ``-f`` takes them."""
    names = _fold_names(model_folder, checkpoint_name)
    numbered: list[int | str] = [int(name) for name in names if name.isdecimal()]
    return sorted(numbered, key=int) or [name for name in names if name == "all"]


def _fold_names(folder: Path, checkpoint_name: str) -> list[str]:
    return sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint_name}"))


def _folds_in_words(folder: Path, checkpoint_name: str) -> str:
    folds = _fold_names(folder, checkpoint_name)
    return f"{checkpoint_name} for fold {', '.join(folds)}" if folds else f"no {checkpoint_name} at all"
