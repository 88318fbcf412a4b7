"""The table of ``nnunet-lowmem compare``: Markdown, so that it can be pasted where a report is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Column, Table

from nnunet_lowmem.names import shown
from nnunet_lowmem.report.compare import Comparison
from nnunet_lowmem.report.measured_command import TILES, MeasuredCommand
from nnunet_lowmem.sizes import format_gib

_STAGES = {"preprocessing": ("preprocessing",), "sliding window": (TILES,), "export and writing": ("export", "writing")}
_WORST = 3
_SECONDS = "{:.1f} s".format


def print_comparison(comparison: Comparison, label_names: Mapping[int, str], as_json: bool) -> None:
    """Print both sides, the label maps, and what has to be known about them."""
    if as_json:
        print(json.dumps(comparison.as_dict(), indent=1))  # noqa: T201  # for scripts, unwrapped
        return
    columns = (Column(name, justify="right") for name in ("stock", "ours", "ours / stock"))
    table = Table("", *columns, box=MARKDOWN)
    for cells in [*_measured_rows(comparison), *_label_rows(comparison, label_names)]:
        table.add_row(*map(shown, cells))
    console = Console(markup=False, emoji=False)
    console.print(table)
    for line in _remarks(comparison):
        console.print(line, highlight=False, soft_wrap=True)


def _measured_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    at_least = ">= " if comparison.stopped else ""
    for name, value, text in _rows():
        stock, ours = (comparison.median_of(side, value) for side in ("stock", "ours"))
        if stock is None and ours is None:
            continue
        ratio = f"{'<= ' if at_least else ''}{ours / stock:.2f}" if stock and ours is not None else "-"
        yield (
            name,
            "-" if stock is None else at_least + text(stock),
            "-" if ours is None else text(ours),
            "-" if comparison.failed_side() else ratio,
        )


def _rows() -> Iterator[tuple[str, Callable[[MeasuredCommand], float | None], Callable[[float], str]]]:
    """Name of each row, its value in a run, and how that is written."""
    yield "whole command", lambda run: run.seconds, _SECONDS
    yield "first tile after", lambda run: run.first_tile_s, _SECONDS
    for name, stages in _STAGES.items():
        yield name, partial(_stage_seconds, stages), _SECONDS
    yield "peak RAM", lambda run: run.peak_bytes, _size
    for name, stages in _STAGES.items():
        yield f"peak RAM, {name}", partial(_stage_peak, stages), _size
    yield "peak VRAM, of torch", lambda run: run.vram_bytes, _size


def _stage_seconds(stages: Sequence[str], run: MeasuredCommand) -> float | None:
    found = [run.stages[stage].seconds for stage in stages if stage in run.stages]
    return sum(found) if found else None


def _stage_peak(stages: Sequence[str], run: MeasuredCommand) -> float | None:
    peaks = [run.stages[stage].peak_bytes for stage in stages if stage in run.stages]
    return max((peak for peak in peaks if peak is not None), default=None)


def _size(size_bytes: float) -> str:
    return format_gib(int(size_bytes))


def _label_rows(comparison: Comparison, label_names: Mapping[int, str]) -> Iterator[tuple[str, ...]]:
    compared = [case for case in comparison.labels if not case.problem]
    if not compared:
        return
    yield "voxels that differ", "", f"{comparison.differing} of {sum(case.voxels for case in compared)}", ""
    mean = comparison.mean_dice()
    if mean is not None:
        yield "Dice, mean of labels", "", f"{mean:.5f}", ""
    pairs = [(dice, label, case.case) for case in compared for label, dice in case.dice.items() if dice < 1]
    for dice, label, case in sorted(pairs)[:_WORST]:
        name = label_names.get(label, "")
        yield f"Dice, {case}, label {label} {name}".rstrip(), "", f"{dice:.5f}", ""


def _remarks(comparison: Comparison) -> Iterator[str]:
    if comparison.stopped:
        yield (
            f"Stock was ended, since it {comparison.stopped} (--stock-limit); so there are no label maps of stock to "
            "compare with, and its numbers are lower bounds."
        )
    for case in comparison.labels:
        if case.problem:
            yield shown(f"{case.case} cannot be compared: {case.problem}")
    if side := comparison.failed_side():
        codes = [run.exit_code for run in comparison.runs[side]]
        yield f"{side} failed, exit code {', '.join(map(str, codes))}; its last lines:\n{comparison.logs[side]}"
    times = {side: len(runs) for side, runs in comparison.runs.items()}
    if max(times.values()) > 1:
        yield f"Medians of {times['stock']} (stock) and {times['ours']} (ours) runs."
