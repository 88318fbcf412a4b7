"""Which worker of a cluster did what and when, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_lowmem.predict.outcomes import Turn
from nnunet_lowmem.report.memory_chart import INK, MINUTES_FROM_S, STYLE

_DONE, _LOST = "#8ec5e8", "#e5a3a0"
# inches
_WIDE, _ROW, _AROUND = 10.4, 0.42, 1.1
# rows that are drawn, and letters that have room in an inch
_MOST_ROWS, _LETTERS = 64, 13


def workers_chart(turns: Sequence[Turn], began_s: float) -> bytes:
    """Draw turns, as an SVG file; those that ended without a result in another colour.

    Parameters
    ----------
    turns : sequence of Turn
    began_s : float
        When the run began, seconds since the epoch.
    """
    workers = list(dict.fromkeys(turn.worker for turn in turns))[:_MOST_ROWS]
    end_s = max(turn.ended_s - began_s for turn in turns)
    unit_s, unit = (60.0, "min") if end_s >= MINUTES_FROM_S else (1.0, "s")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDE, _AROUND + _ROW * len(workers)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for turn in turns:
            if turn.worker not in workers:
                continue
            row, start_s, length_s = workers.index(turn.worker), turn.began_s - began_s, turn.ended_s - turn.began_s
            colour = _DONE if turn.is_done else _LOST
            axes.barh(row, length_s / unit_s, left=start_s / unit_s, height=0.72, color=colour, edgecolor="white")
            room = int(_LETTERS * _WIDE * 0.85 * length_s / max(end_s, 0.1))
            if room > 3:  # a name is no formula
                shown = turn.task if len(turn.task) <= room else turn.task[: room - 1] + "…"
                axes.text(start_s / unit_s, row, f" {shown}", va="center", fontsize=8, color=INK, parse_math=False)
        axes.set_yticks(range(len(workers)), workers, fontsize=9, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, max(end_s, 0.1) / unit_s)
        axes.set_xlabel(f"time since the start of the run ({unit})")
        axes.spines[["top", "right"]].set_visible(False)
        handles = [Patch(color=_DONE, label="done")]
        if not all(turn.is_done for turn in turns):
            handles.append(Patch(color=_LOST, label="ended without a result"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return file.getvalue()
