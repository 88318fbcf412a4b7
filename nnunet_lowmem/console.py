"""What the commands show and how they set torch up: device, threads, tables."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nnunet_lowmem.errors import BudgetError, UsageError
from nnunet_lowmem.memory import format_gib
from nnunet_lowmem.planner import Place, Plan, Stage
from nnunet_lowmem.reporting import FAILURES_FILE, CaseReport, RunReport


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
    table = Table(title=f"plan for {plan.case}")
    table.add_column("array")
    table.add_column("place")
    for stage in Stage:
        table.add_column(stage.value, justify="right")
    for allocation in plan.allocations:
        sizes = [format_gib(allocation.size_bytes) if stage in allocation.stages else "" for stage in Stage]
        table.add_row(allocation.name, allocation.place.value, *sizes)
    Console().print(table)
    for place in (Place.RAM, Place.VRAM):
        limit = plan.budget.limit(place)
        if limit is not None:
            Console().print(
                f"{place.value}: projected {format_gib(plan.projected_bytes(place))} "
                f"(reserved {format_gib(plan.budget.reserved(place))}), budget {format_gib(limit)}"
            )


def print_report(report: CaseReport) -> None:
    """Print time per stage, and the measured peak beside the projected one."""
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    Console().print(
        f"{report.case}: {times}; RAM measured {format_gib(report.peak_bytes)}, "
        f"projected {format_gib(report.plan.projected_bytes(Place.RAM))}"
    )


def print_run(report: RunReport, folder: str) -> None:
    """Print what became of every case."""
    table = Table(title=f"predictions in {folder}")
    for column in ("case", "", "stage", "why"):
        table.add_column(column, overflow="fold")
    for case in report.done:
        table.add_row(case.case, "done", "", f"{sum(case.seconds.values()):.1f} s")
    for skipped in report.skipped:
        table.add_row(skipped.case, "skipped", "", skipped.reason)
    for failed in report.failed:
        table.add_row(failed.case, "failed", failed.stage, failed.reason)
    Console().print(table)
    if report.failed:
        Console().print(f"{len(report.failed)} cases failed; see {Path(folder) / FAILURES_FILE}", highlight=False)


def print_estimates(plans: Iterable[Plan]) -> int:
    """Print the plan of every case; return the exit code, that of `BudgetError` where a case does not fit."""
    fits = True
    for plan in plans:
        print_plan(plan)
        fits = fits and plan.fits(Place.RAM) and plan.fits(Place.VRAM)
    return 0 if fits else BudgetError.exit_code
