"""``nnunet-lowmem verify``: whether label maps are still what was written, and with what they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lowmem.names import shown
from nnunet_lowmem.sizes import format_gib

if TYPE_CHECKING:  # `--help` loads nothing
    import argparse

    from nnunet_lowmem.predict.verification import Verified


def add_flags(add: Callable[..., object]) -> None:
    """Add the arguments of the command."""
    add("path", metavar="FOLDER", help="a folder of label maps, or one of them: then all that is told of it is shown")
    add("--json", action="store_true", help="for scripts: what is found, with the records")
    add("--verbose", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Print what is found; return 1 if a file is not what was written, or has no record.

    Raises
    ------
    UsageError
        If there is nothing to compare.
    """
    from rich.console import Console

    from nnunet_lowmem.predict.verification import Verdict, verify

    path = Path(options.path)
    found = verify(path)
    if options.json:
        told = {"files": [file.as_json() for file in found.files], "notes": list(found.notes)}
        print(json.dumps(told, indent=1))  # noqa: T201  # for scripts, unwrapped
        return 0 if found.is_as_written else 1
    console = Console(markup=False, emoji=False, highlight=False)
    one = found.files[0] if len(found.files) == 1 and found.files[0].name == path.name else None
    console.print(_table_of(found.files) if one is None else _details(path, one))
    for note in found.notes:
        console.print(note, soft_wrap=True)
    if not found.is_as_written:
        others = sum(file.verdict is not Verdict.AS_WRITTEN for file in found.files)
        console.print(f"{others} of {len(found.files)} files are not known to be what was written", soft_wrap=True)
    return 0 if found.is_as_written else 1


def _table_of(files: tuple[Verified, ...]) -> Any:
    """Return a row for each file."""
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in ("file", "", "made with", "when (UTC)")))
    for file in files:
        made = "" if file.record is None else _model(file.record)
        verdict = f"{file.verdict.value}: {file.seen}" if file.seen else file.verdict.value
        table.add_row(shown(file.name), verdict, made, "" if file.record is None else _when(file.record))
    return table


def _details(path: Path, file: Verified) -> Any:
    """Return all that is told of one file: name and value."""
    from rich.table import Column, Table

    grid = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False)
    grid.add_row("file", shown(str(path)))
    grid.add_row("", f"{file.verdict.value}: {file.seen}" if file.seen else file.verdict.value)
    for name, value in () if file.record is None else _told(file.record):
        grid.add_row(name, shown(value))
    return grid


def _told(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give what a record tells, in words; a part that is not as it is known is left out."""
    yield "written", _when(record)
    yield "made with", _model(record)
    if "schema" not in record:
        yield "", "written by an earlier version, which told no more"
        return
    for about in (_command, _run, _files, _labels, _took):
        try:
            told = list(about(record))
        except (KeyError, TypeError, ValueError, AttributeError):  # of another version, or changed by hand
            told = [("", f"not told: {about.__name__[1:]}")]
        yield from ((str(name), str(value)) for name, value in told)


def _command(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from shlex import join

    yield "command", join(record["command"])


def _run(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    yield "machine", ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    yield "settings", ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    yield "network in", record["arithmetic"]


def _files(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give what was read, and whether it is still there: of images as they were, of the model as it was."""
    from nnunet_lowmem.predict.verification import state_of

    for image in record["images"]:
        state = state_of(Path(image["path"]), image["bytes"], image.get("checksum")) if "bytes" in image else ""
        yield image["role"], f"{image['path']}{f': {state}' if state else ''}"
    folder = record["model"]["folder"]
    for name, (size_bytes, checksum) in record["model"]["files"].items():
        yield "model file", f"{name} {checksum}: {state_of(Path(folder, name), size_bytes, checksum)}"
    yield "shape", "x".join(map(str, record["geometry"]["shape"]))
    yield "spacing", f"{' x '.join(f'{step:g}' for step in record['geometry']['spacing_mm'])} mm"


def _labels(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for label in record["labels"]:
        ml = "" if label["ml"] is None else f", {label['ml']:.2f} ml"
        yield f"label {label['value']}", f"{label['name']}: {label['voxels']:,} voxels{ml}"


def _took(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in record["seconds"].items())
    ram = record["memory"]["RAM"]
    limit = "none" if ram["limit"] is None else format_gib(ram["limit"])
    peak = "not measured" if ram["peak"] is None else format_gib(ram["peak"])
    yield "RAM", f"peak {peak}, projected {format_gib(ram['projected'])}, limit {limit}"


def _model(record: dict[str, Any]) -> str:
    """Return what the model is called; of a record that does not say it, the checksum of model and options."""
    try:
        model = record["model"]
        folds = ", ".join(str(name).split("/")[0] for name in model["checkpoints"])
        told = model["dataset"], Path(model["folder"] or "").name, model["configuration"], folds
        return " ".join(str(each) for each in told if each)
    except (KeyError, TypeError, AttributeError):
        return f"model and options {str(record.get('made_with', ''))[:12]}"


def _when(record: dict[str, Any]) -> str:
    from datetime import datetime, timezone

    if not record["time_ns"]:
        return "not told"
    try:
        return datetime.fromtimestamp(record["time_ns"] // 10**9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "not told"
