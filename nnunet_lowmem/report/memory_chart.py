"""Memory over time against the budget, with the stages marked, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_lowmem.sizes import format_gib

#: Colours of the stages, here and on the page.
STAGE_COLOURS = {
    "preprocessing": "#8ec5e8",
    "prediction": "#f3c178",
    "export": "#a9d5a0",
    "writing": "#cfb8e6",
    "report": "#d3d3d3",
}
_OTHER_COLOUR = "#d3d3d3"
INK, _MEASURED, _PROJECTED, _BUDGET = "#22303c", "#1f5f8b", "#b3541e", "#a01c2c"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nnunet_lowmem",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5ae",
    "xtick.color": INK,
    "ytick.color": INK,
}
_BAND = 0.45
# cases whose names have room in the chart
_NAMED_CASES = 8
# a budget beyond so many times the highest curve would press the curves to the ground
_FAR = 2.5
MINUTES_FROM_S = 300.0


@dataclass(frozen=True)
class Limits:
    """What holds for one case from a moment on: bytes; None where no budget is known."""

    start_s: float
    projected_bytes: int
    budget_bytes: int | None


@dataclass
class MemoryStory:
    """What was measured in one run; seconds since its start.

    Attributes
    ----------
    points : sequence of (seconds, bytes)
    stages : list of (start, stage)
        In order of time; an empty name: between cases.
    cases : list of (start, name)
    limits : list of Limits
    end_s : float
    """

    points: Sequence[tuple[float, int]] = ()
    stages: list[tuple[float, str]] = field(default_factory=list)
    cases: list[tuple[float, str]] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    end_s: float = 0.0


def stage_colour(stage: str) -> str:
    """Return the colour of a stage."""
    return STAGE_COLOURS.get(stage, _OTHER_COLOUR)


def memory_chart(story: MemoryStory, width: float, height: float) -> bytes:
    """Draw it, as an SVG file of so many inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        unit_s, unit = (60.0, "min") if story.end_s >= MINUTES_FROM_S else (1.0, "s")
        _draw_stages(axes, story, unit_s)
        lines = _draw_curves(axes, story, unit_s)
        axes.set_xlabel(f"time since the start of the run ({unit})")
        axes.set_ylabel("memory (GiB)")
        axes.set_xlim(0, max(story.end_s, 0.1) / unit_s)
        axes.spines[["top", "right"]].set_visible(False)
        seen = [stage for stage in STAGE_COLOURS if stage in {stage for _, stage in story.stages}]
        patches = [Patch(color=stage_colour(stage), alpha=_BAND, label=stage) for stage in seen]
        columns = max(2, min(len(lines) + len(patches), int(width)))
        figure.legend(handles=[*lines, *patches], loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
        if len(story.cases) <= _NAMED_CASES and width > 6:
            _name_cases(axes, story, unit_s)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return file.getvalue()


def _draw_stages(axes: Any, story: MemoryStory, unit_s: float) -> None:
    for (start, stage), (end, _) in pairwise([*story.stages, (story.end_s, "")]):
        if stage and end > start:
            axes.axvspan(start / unit_s, end / unit_s, color=stage_colour(stage), alpha=_BAND, linewidth=0)


def _draw_curves(axes: Any, story: MemoryStory, unit_s: float) -> list[Any]:
    seconds = [second / unit_s for second, _ in story.points]
    held = [size / 2**30 for _, size in story.points]
    axes.fill_between(seconds, held, color=_MEASURED, alpha=0.18, linewidth=0)
    lines = axes.plot(seconds, held, color=_MEASURED, linewidth=1.6, label="measured")
    starts = [limits.start_s / unit_s for limits in story.limits] + [story.end_s / unit_s]
    projected = [limits.projected_bytes / 2**30 for limits in story.limits]
    budgets = [limits.budget_bytes / 2**30 for limits in story.limits if limits.budget_bytes is not None]
    top = max([0.01, *held, *projected])
    if projected:
        style = {"color": _PROJECTED, "linewidth": 1.4, "linestyle": (0, (5, 2)), "label": "projected"}
        lines += axes.step(starts, [*projected, projected[-1]], where="post", **style)
    near = len(budgets) == len(projected) > 0 and max(budgets) <= _FAR * top
    if near:
        style = {"color": _BUDGET, "linewidth": 1.6, "label": "budget"}
        lines += axes.step(starts, [*budgets, budgets[-1]], where="post", **style)
        top = max(top, *budgets)
    elif budgets:
        told = f"budget {format_gib(int(min(budgets) * 2**30))}: far above this chart"
        axes.text(0.995, 0.985, told, color=_BUDGET, transform=axes.transAxes, ha="right", va="top", fontsize=9)
    axes.set_ylim(0, 1.18 * top)
    return list(lines)


def _name_cases(axes: Any, story: MemoryStory, unit_s: float) -> None:
    for number, ((start, name), (end, _)) in enumerate(pairwise([*story.cases, (story.end_s, "")])):
        if number:
            axes.axvline(start / unit_s, color="#9aa5ae", linewidth=0.8)
        room = max(3, int(100 * (end - start) / max(story.end_s, 0.1)))
        shown = name if len(name) <= room else name[: room - 1] + "…"
        place = axes.get_xaxis_transform()
        # a name is no formula
        axes.text(start / unit_s, 1.0, f" {shown}", transform=place, va="bottom", fontsize=9, parse_math=False)
