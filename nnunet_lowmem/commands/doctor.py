"""``nnunet-lowmem doctor``: flags, and in which order what is found is told."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lowmem.commands.flags import Flags, add_predict_flags
from nnunet_lowmem.commands.shell import limit_of_memory
from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.errors import LowMemError, UsageError

if TYPE_CHECKING:
    from nnunet_lowmem.commands.doctor_tables import Teller
    from nnunet_lowmem.predictor import LowMemPredictor

Folds = list[int | str]
#: Checks what is to be looked at; returns the model's folder and folds, None without a model.
Examined = Callable[[argparse.Namespace], "tuple[Path, Folds] | None"]
#: Makes a predictor that knows a model of some folds, but for its weights.
Described = Callable[[argparse.Namespace, Path, Folds], "LowMemPredictor"]


def add_flags(parser: Flags, by_folder: bool) -> None:
    """Add the log, and the flags of a prediction, so that those of a run that failed can be given as they were."""
    parser.add_argument(
        "log", nargs="?", metavar="LOG", help="what a run printed, before the flags; - for standard input"
    )
    parser.add_argument("--json", action="store_true", help="everything that is found as JSON, sizes in bytes")
    parser.add_argument("--estimate", action="store_true", help="accepted: the doctor predicts nothing")
    add_predict_flags(parser, by_folder, required=False)
    parser.set_defaults(f=None)


def run(options: argparse.Namespace, words: Sequence[str], examined: Examined, described: Described) -> int:
    """Tell what is wrong; return 1 where something will fail, else 0. `words` are those behind ``doctor``.

    With ``--json`` what was found until then is printed in the end, whatever comes up.

    Raises
    ------
    UsageError
        If the log or the model cannot be read.
    """
    from nnunet_lowmem.commands.doctor_tables import Teller

    teller = Teller(options.json)
    try:
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            _tell(options, words, teller, examined, described)
    except LowMemError as error:
        teller.told["error"] = str(error)
        raise
    finally:
        if options.json:
            print(json.dumps(teller.told, indent=1))  # noqa: T201  # for scripts, unwrapped
    return int(teller.fails)


def _tell(
    options: argparse.Namespace, words: Sequence[str], teller: Teller, examined: Examined, described: Described
) -> None:
    if options.log is not None:
        _tell_log(options, words, teller)
    model = examined(options)
    if model is not None:
        _tell_model(options, *model, described, teller)
    elif options.log is None:
        for finding in _machine(options):
            teller.finding(finding)


def _tell_log(options: argparse.Namespace, words: Sequence[str], teller: Teller) -> None:
    from nnunet_lowmem.doctor.log import diagnose
    from nnunet_lowmem.doctor.log_text import blocks
    from nnunet_lowmem.doctor.tools import Command

    found = diagnose(blocks(options.log))
    typed = _typed(options, words)
    command = Command(typed) if typed else found.tool.command
    estimate = f"{typed} --estimate" if typed else "nnunet-lowmem doctor -m MODEL -i IMAGES"
    teller.diagnosis(found, command, estimate)


def _typed(options: argparse.Namespace, words: Sequence[str]) -> str:
    """Return the command of a prediction by the flags that were given; empty if model or images are not among them."""
    if options.i is None or (options.m is None and options.d is None):
        return ""
    words = [word for word in words if word not in ("--json", "--estimate", "--")]
    # the log is a word behind no flag; one behind a switch is told by its being the only one
    places = [place for place, word in enumerate(words) if word == options.log]
    free = [place for place in places if place == 0 or not words[place - 1].startswith("-")] or places[-1:]
    words = [word for place, word in enumerate(words) if place != free[0]]
    if options.o is None:
        words += ["-o", "OUTPUT"]
    return shlex.join(["nnUNetv2_predict_lowmem", *words])


def _machine(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at the machine; what needs torch comes last, so that the first lines stand at once."""
    from nnunet_lowmem.doctor import environment, machine

    yield from environment.findings()
    yield from machine.findings(Path(options.o or "."), options.tmp_dir)
    try:
        from nnunet_lowmem.doctor import devices

        yield from devices.findings()
    except Exception as error:  # whatever a broken torch or numba raises
        advice = "in a fresh environment: python -m venv new && new/bin/pip install THIS_REPOSITORY"
        if limit := limit_of_memory(error):
            advice = f"raise the limit{limit}"
        yield Finding("torch and numba", Verdict.FAILS, f"cannot be loaded: {type(error).__name__}: {error}", advice)


def _tell_model(options: argparse.Namespace, folder: Path, folds: Folds, described: Described, teller: Teller) -> None:
    from nnunet_lowmem.doctor import advice, trained
    from nnunet_lowmem.nnunet.model_files import folds_in
    from nnunet_lowmem.nnunet.trust import Trust

    _check_device(options, teller)
    others = {each: folds_in(each, options.chk) for each in trained.other_configurations(folder, options.chk)}
    if options.i is not None:
        estimates = list(described(options, folder, folds).estimate(options.i, options.save_probabilities))
        teller.case(advice.largest(estimates), estimates)
    rows: dict[str, Any] = {}
    for other, at_hand in others.items():
        try:
            predictor = described(options, other, at_hand)
            found = advice.largest(list(predictor.estimate(options.i, False))) if options.i is not None else None
            rows[other.name] = found or "trained; with -i IMAGES it is told what it takes"
        except (LowMemError, OSError) as error:
            rows[other.name] = str(error)
    teller.configurations(rows)
    trust = Trust(tuple(options.trust or ()), bool(options.trust_model))
    teller.finding(trained.denormal_weights(folder, folds, options.chk, trust))


def _check_device(options: argparse.Namespace, teller: Teller) -> None:
    """Tell of a device that is not here, and go on with the CPU: what a case needs is asked before a GPU is bought."""
    from nnunet_lowmem.commands.console import choose_device

    try:
        choose_device(options.device)
    except UsageError as error:
        teller.finding(Finding("-device", Verdict.FAILS, str(error)))
        options.device = "cpu"
