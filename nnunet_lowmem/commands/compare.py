"""Flags of ``nnunet-lowmem compare``, and what becomes of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from nnunet_lowmem.commands.flags import asked_bytes
from nnunet_lowmem.commands.shell import tell
from nnunet_lowmem.errors import UsageError

_SWITCHES = ("disable_tta", "not_on_device")


def add_flags(add: Callable[..., object]) -> None:
    """Add the flags beside those that say what is predicted."""
    add("-o", metavar="FOLDER", help="keep label maps, logs and numbers in this empty folder")
    add("--max_ram", metavar="SIZE", help="RAM budget of ours")
    add("--stock-limit", metavar="SIZE", help="end stock when it takes more RAM (default: what is free, less headroom)")
    add("--repeat", type=int, default=1, metavar="N", help="run both so often, in turn, and show medians")
    add("--deterministic", action="store_true", help="keep CUDA from choosing other algorithms from run to run")
    add("--json", action="store_true", help="print JSON with sizes in bytes instead of a table")
    add("--disable_progress_bar", action="store_true", help="accepted; none is shown")
    add("--verbose", action="store_true", help="show tracebacks")
    add("ours", nargs="*", metavar="-- FLAG", help="more flags for nnUNetv2_predict_lowmem alone")


def run(options: argparse.Namespace, checked_model: Callable[[Sequence[str]], tuple[str, str]]) -> int:
    """Compare, print the table, and return the exit code.

    Parameters
    ----------
    options : argparse.Namespace
    checked_model : callable
        Checks the flags of our command; returns its model folder and the ending of its files.

    Raises
    ------
    UsageError
        If the request cannot be carried out.
    """
    if options.repeat < 1:
        raise UsageError(f"--repeat must be at least 1, got {options.repeat}")
    limit_bytes = None if options.stock_limit is None else asked_bytes("--stock-limit", options.stock_limit)
    flags, our_flags = _flags_of_both(options), [*_given(options, "--max_ram"), *options.ours]
    model_flags = ["-d", "-p", "-tr", "-c"] if options.m is None else ["-m"]
    with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):  # nnU-Net prints when it is imported
        model_folder, ending = checked_model([*flags, *_given(options, *model_flags, "-device"), "-o", out, *our_flags])
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # older nnU-Nets print at import
        from nnunet_lowmem.commands import console
        from nnunet_lowmem.commands.compare_table import print_comparison
        from nnunet_lowmem.nnunet import model_files
        from nnunet_lowmem.report.compare import Request, compare

        model_files.check_for_stock(options.i, ending)
        request = Request(
            model_folder=model_folder,
            cases=tuple(model_files.case_name(files, ending) for files in model_files.list_cases(options.i, ending)),
            file_ending=ending,
            device=str(console.choose_device(options.device)),
            flags=tuple(flags),
            our_flags=tuple(our_flags),
            repeat=options.repeat,
            stock_limit_bytes=limit_bytes,
            deterministic=options.deterministic,
            keep=Path(options.o) if options.o else None,
        )
        found = compare(request, tell)
    names = model_files.label_names(model_files.read_json(Path(model_folder) / "dataset.json"))
    print_comparison(found, names, options.json)
    return found.exit_code


def _flags_of_both(options: argparse.Namespace) -> list[str]:
    """Spell out the flags that stock's command and ours share, but for the model, the device and the output."""
    words = _given(options, "-i", "-step_size", "-chk", "-npp", "-nps", "-prev_stage_predictions")
    switches = [f"--{name}" for name in _SWITCHES if getattr(options, name)]
    return [*words, "-f", *map(str, options.f), "--disable_progress_bar", *switches]


def _given(options: argparse.Namespace, *flags: str) -> list[str]:
    """Spell out those of the flags that have a value."""
    values = {flag: getattr(options, flag.strip("-")) for flag in flags}
    return [word for flag, value in values.items() if value is not None for word in (flag, str(value))]
