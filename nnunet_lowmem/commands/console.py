"""What the commands show and how they set torch up: device, threads, tables."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from nnunet_lowmem.budget.arrays import Stage
from nnunet_lowmem.budget.estimates import Estimate
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.errors import BudgetError, UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.predict.outcomes import FAILURES_FILE, CaseReport, RunReport
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.types import Place
from nnunet_lowmem.volumes.selection import is_output_file


def _console() -> Console:
    """Return a console that takes brackets and colons in names for nothing else."""
    return Console(markup=False, emoji=False)


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name; without one CUDA where there is one, else MPS, else the CPU.

    Raises
    ------
    UsageError
        If the device does not exist here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not cuda:
        raise UsageError(f"-device {name}: torch {torch.__version__} sees no CUDA device here; use -device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"-device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.type == "mps" and not mps:
        raise UsageError("-device mps: torch sees no MPS device here; use -device cpu")
    return device


def set_torch_threads(device: torch.device) -> None:
    """Set torch's threads as stock's command does: all cores on the CPU, one beside a GPU."""
    if device.type == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())
    elif device.type == "cuda":
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)


def print_plan(plan: Plan) -> None:
    """Print the planned allocations of a case, stage by stage."""
    stages = (Column(stage.value, justify="right") for stage in Stage)
    table = Table("array", "place", *stages, title=f"plan for {plan.case}")
    for allocation in plan.allocations:
        sizes = [format_gib(allocation.size_bytes) if stage in allocation.stages else "" for stage in Stage]
        table.add_row(allocation.name, allocation.place.value, *sizes)
    _console().print(table)
    for place in Place:
        limit = plan.budget.limit(place)
        if limit is not None:
            _console().print(
                f"{place.value}: projected {format_gib(plan.projected_bytes(place))} "
                f"(reserved {format_gib(plan.budget.reserved(place))}), budget {format_gib(limit)}"
            )


def print_case(report: CaseReport) -> None:
    """Print one line that says what became of a case that is done; scripts know it by ``case NAME: done in``."""
    count = len(report.labels)
    seconds, peak = sum(report.seconds.values()), format_gib(report.peak_bytes)
    _print_line(f"case {report.case}: done in {seconds:.1f} s, peak {peak}, {count} label{'s' * (count != 1)}")


def _print_line(text: str) -> None:
    _console().print(text, highlight=False, soft_wrap=True)


def print_report(report: CaseReport) -> None:
    """Print of a case that is done also time per stage, and the measured peak beside the projected one."""
    print_case(report)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    way = "" if report.arithmetic == "exact" else f"; network in {report.arithmetic}"
    reused = f"; {report.reused_tiles} constant tiles reused" if report.reused_tiles else ""
    tiles, whole = report.tiles, report.tiles_of_case
    of_case = f"; {tiles:,} of {whole:,} tiles" if tiles < whole else ""
    if tiles > whole:
        of_case = f"; {tiles:,} tiles for {whole:,}, since cuts need some again"
    _console().print(
        f"{report.case}: {times}; RAM measured {format_gib(report.peak_bytes)}, "
        f"projected {format_gib(report.plan.projected_bytes(Place.RAM))}{way}{of_case}{reused}"
    )


def print_run(report: RunReport, output: str) -> None:
    """Print a line for each case that failed, and how many did not; `output` is a folder, or the file of the only one.

    The others have been told of when they were done, or skipped.
    """
    for failed in report.failed:
        reason = failed.reason.removeprefix(f"case {failed.case} ")
        _print_line(f"case {failed.case}: failed in {failed.stage}, {reason}")
    cases = len(report.done) + len(report.failed) + len(report.skipped)
    others = [(len(report.skipped), "skipped"), (len(report.failed), "failed")]
    told = "".join(f", {count} {what}" for count, what in others if count)
    is_file = is_output_file(output)
    place = Path(output) / FAILURES_FILE if report.failed and not is_file else Path(output)
    _print_line(f"{len(report.done)} of {cases} cases done{told}: {shown(str(place))}")


def print_estimates(found: Sequence[Estimate], as_json: bool, verbose: bool) -> int:
    """Print what every case will take; return the exit code: that of `BudgetError` where a case does not fit."""
    if as_json:
        print(json.dumps([estimate.as_json() for estimate in found], indent=1))  # noqa: T201  # for scripts, unwrapped
    else:
        for estimate in found:
            if verbose and estimate.plan is not None:
                print_plan(estimate.plan)
        lines = ["Upper bounds by header alone: what is cropped is not known yet."]
        lines += (line for estimate in found for line in _estimate_lines(estimate))
        _console().print("\n".join(lines), highlight=False, soft_wrap=True)
    fitting = {estimate.case for estimate in found if estimate.problem is None}  # in whichever arithmetic
    if any(estimate.readable and estimate.case not in fitting for estimate in found):
        return BudgetError.exit_code
    return 0 if all(estimate.readable for estimate in found) else UsageError.exit_code


def _estimate_lines(estimate: Estimate) -> Iterator[str]:
    facts, plan = estimate.facts, estimate.plan
    if facts is not None and plan is not None:
        shapes = ["x".join(map(str, shape)) for shape in (facts.original_shape, facts.grid.image_shape)]
        named = f"{estimate.case} in {estimate.arithmetic}" if estimate.arithmetic else estimate.case
        yield f"plan for {named}: {shapes[0]}, resampled {shapes[1]}; {plan.placement.in_words()}"
        tiles, of_case = estimate.tiles, facts.tiles_of_case
        counted = f"{tiles:,} tiles" if tiles >= of_case else f"{tiles:,} of {of_case:,} tiles"
        sizes = f"reads {format_gib(estimate.read_bytes)}, writes at most {format_gib(estimate.written_bytes)}"
        yield f"  {sizes}; {counted} for each fold"
        limits = ((place, plan.budget.limit(place)) for place in Place)
        yield "  projected " + ", ".join(
            f"{place.value} {format_gib(plan.projected_bytes(place))} of {format_gib(limit)}"
            for place, limit in limits
            if limit is not None
        )
        yield (
            f"  smallest RAM {format_gib(estimate.least_ram_bytes)}, without spilling "
            f"{format_gib(estimate.least_ram_unspilled_bytes)}; stock: about {format_gib(estimate.stock_bytes)}"
        )
    yield f"  {shown(estimate.problem or 'fits')}"
