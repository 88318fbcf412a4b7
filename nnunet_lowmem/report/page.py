"""``lowmem_report.html``: one page that tells what a run took and made, and needs nothing beside itself.

Pictures wait as small files, and the page is written piece by piece, so that its cost in memory does not grow with the
number of cases. Names of cases, labels and messages are strangers' strings: the template escapes every one, and the
page forbids itself to load or run anything.
"""

from __future__ import annotations

import base64
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.nnunet.model_files import label_names
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.outcomes import CaseReport, RunReport
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.report.memory_chart import Limits, MemoryStory, memory_chart, stage_colour
from nnunet_lowmem.report.slices import colour, labelled_volume, overlays
from nnunet_lowmem.report.workers_chart import workers_chart
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.memory_held import PeakSampler, Timeline
from nnunet_lowmem.types import Place, PreprocessedCase

REPORT_FILE = "lowmem_report.html"

_SHOWN_LABELS = 12
_SHOWN_WARNINGS = 100
_WIDE, _NARROW = (10.4, 3.7), (3.9, 3.6)


@dataclass
class CasePictures:
    """The slices of one case, by title and file, the labels that take most of them, and how many more there are.

    A label is its value and its name; its volume is that of the whole label map, which is known once the case is done.
    """

    pictures: list[tuple[str, Path]] = field(default_factory=list)
    legend: list[tuple[int, str]] = field(default_factory=list)
    further: int = 0


class HtmlReport(Listener):
    """Watches a run and writes its page at the end, however it ends; a context manager.

    Parameters
    ----------
    target : Path
        Output folder.
    folder : Path
        Temporary folder for pictures.
    facts : mapping
        What else to tell of the run: names and values.
    report : RunReport
        Filled by whoever runs the cases.
    """

    measures = True
    draws = True

    def __init__(self, target: Path, folder: Path, facts: Mapping[str, str], report: RunReport) -> None:
        self._target, self._folder, self._facts, self._report = target, folder, facts, report
        self._pictures: dict[str, CasePictures] = {}
        self._plans: dict[str, Plan] = {}
        self._story = MemoryStory()
        self._timeline = Timeline()
        self._messages = _Messages()
        self._began_s = time.time()

    def __enter__(self) -> HtmlReport:
        logging.getLogger("nnunet_lowmem").addHandler(self._messages)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        logging.getLogger("nnunet_lowmem").removeHandler(self._messages)
        self._story.end_s = self._now_s()
        self._story.points = [(when - self._began_s, held) for when, held in self._timeline.points]
        self._write("" if kind is None else f"{kind.__name__}: {error}")

    @contextmanager
    def case(self, name: str, sampler: PeakSampler | None) -> Iterator[None]:
        """Take part in one case."""
        if sampler is None:  # of a worker elsewhere: its memory is in what it reports
            yield
            return
        self._story.cases.append((self._now_s(), name))
        try:
            yield
        finally:
            self._story.stages.append((self._now_s(), ""))
            for point in sampler.timeline():
                self._timeline.add(*point)

    def plan(self, plan: Plan) -> None:
        """Take note of the plan of a case."""
        self._plans[plan.case] = plan
        limits = Limits(self._now_s(), plan.projected_bytes(Place.RAM), plan.budget.limit(Place.RAM))
        self._story.limits.append(limits)

    def draw(self, setup: Setup, job: Job, case: PreprocessedCase, labels: NDArray[Any]) -> None:
        """Keep slices of a case; its labels are in the axes of the file."""
        names = label_names(setup.dataset_json)
        drawn = overlays(labelled_volume(case, labels, setup.plans_manager.transpose_forward))
        assert job.output is not None, "what is drawn is written"
        kept = self._pictures[job.output] = CasePictures()
        counts: Counter[int] = Counter()
        for axis, overlay in enumerate(drawn):
            path = self._folder / f"{len(self._pictures)}-{axis}.jpg"
            Image.fromarray(overlay.rgb).save(path, "JPEG", quality=85, subsampling=0)
            kept.pictures.append((overlay.title, path))
            counts += overlay.counts
        shown = [value for value, _ in counts.most_common(_SHOWN_LABELS)]
        kept.legend = [(value, names.get(value, f"label {value}")) for value in shown]
        kept.further = max(0, len(counts) - _SHOWN_LABELS)

    def _now_s(self) -> float:
        return time.time() - self._began_s

    def progress(self, progress: Progress) -> None:
        """Take note of a stage that begins."""
        if not self._story.stages or self._story.stages[-1][1] != progress.stage:
            self._story.stages.append((self._now_s(), progress.stage))

    def _write(self, ended_by: str) -> None:
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"gib": format_gib, "duration": duration, "colour": stage_colour}
        environment.filters |= {"ml": millilitres, "label_colour": colour}
        environment.filters["jpeg"] = lambda path: _data_uri(path.read_bytes(), "image/jpeg")
        template = environment.from_string((files("nnunet_lowmem") / "data" / "report.html").read_text("utf-8"))
        with atomic_output(self._target / REPORT_FILE) as path, path.open("wb") as file:
            for piece in template.generate(self._content(ended_by)):
                file.write(piece.encode("utf-8", "backslashreplace"))

    def _shown(self, case: CaseReport) -> tuple[CaseReport, CasePictures, dict[int, float | None]]:
        volumes = {label.value: label.ml for label in case.labels}
        return case, self._pictures.get(case.output or "", CasePictures()), volumes

    def _workers(self) -> str:
        turns = self._report.turns
        return _data_uri(workers_chart(turns, self._began_s), "image/svg+xml") if turns else ""

    def _content(self, ended_by: str) -> dict[str, Any]:
        sizes = (_WIDE, _NARROW) if self._story.points else ()
        charts = [_data_uri(memory_chart(self._story, *size), "image/svg+xml") for size in sizes]
        return {
            "run": self._report,
            "cases": [self._shown(case) for case in self._report.done],
            "failed": [(case, self._plans.get(case.case)) for case in self._report.failed],
            "peak": max(self._report.done, key=lambda case: case.peak_bytes, default=None),
            "shown_labels": _SHOWN_LABELS,
            "longest_s": max((sum(case.seconds.values()) for case in self._report.done), default=0.0),
            "charts": charts,
            "workers": self._workers(),
            "story": self._story,
            "messages": self._messages,
            "facts": self._facts,
            "folder": self._target.resolve().name,
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._began_s)),
            "ended_by": ended_by,
            "ram": Place.RAM,
            "places": list(Place),
        }


class _Messages(logging.Handler):
    """Warnings of a run, each once; errors are told with the case that failed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.further = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR or text in self.texts:
            return
        if len(self.texts) < _SHOWN_WARNINGS:
            self.texts.append(text)
        else:
            self.further += 1


def duration(seconds: float) -> str:
    """Return seconds as text: ``0.04 s``, ``4.2 s``, ``83 s``, ``12 min 05 s``."""
    if seconds < 119.5:
        digits = 2 if seconds < 0.95 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{digits}f} s"
    seconds = round(seconds)
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def millilitres(ml: float) -> str:
    """Return a volume as text, without its unit: ``< 0.01``, ``3.14``, ``4,321.0``."""
    return "< 0.01" if ml < 0.01 else f"{ml:.2f}" if ml < 9.995 else f"{ml:,.1f}"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def facts_of(setup: Setup) -> dict[str, str]:
    """Name what the labels and the times of a run depend on."""
    patch = " × ".join(map(str, setup.patch_size))
    known = setup.plans_manager.plans  # nobody needs these to predict
    options, mirrored = setup.options, "mirrored" if setup.mirrored_axes else "not mirrored"
    facts = {
        "model": ", ".join([known.get("dataset_name", "?"), setup.trainer_name, known.get("plans_name", "?")]),
        "heads": str(setup.heads),
        "checkpoints": str(setup.weights.folds),
        "tiles": f"{patch} voxels, step {setup.tile_step_size:g}, {mirrored}",
        "device": str(setup.device),
        "budget asked for": f"RAM {options.max_ram or 'not limited'}, VRAM {options.max_vram or 'not limited'}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    return facts | {name: version_of(name) for name in ("nnunetv2", "torch", "numpy")}
