"""Runs a command and measures it from outside: seconds, the memory of its whole process tree, and its stages.

The command finds in an environment variable the name of a file into which it may write a line of JSON per span of a
stage (see `clock.trace`); from these come the seconds and the peak of each stage. Whatever happens, signals to this
process included, the command and all it has started are ended before `run_measured` returns.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.clock import TRACE_VARIABLE
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.system.memory_limits import physical_ram
from nnunet_lowmem.system.platform import end_session
from nnunet_lowmem.system.process_tree import ProcessTree

#: Name of the stage whose beginning is the first tile.
TILES = "prediction"
_LOOK_S = 0.05
_KILL_S = 10.0
_PACKAGES = ("nnunetv2", "torch", "numpy", "scipy", "numba", "nnunet-lowmem")


@dataclass(frozen=True)
class StageCost:
    """What one stage took: the seconds of all its spans, and the peak in them, None where all were too short."""

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class MeasuredCommand:
    """What a command took.

    Attributes
    ----------
    exit_code : int
        Minus the signal's number where one ended it.
    stopped : str
        Why it was ended from here; empty if it was not.
    seconds : float
        Until it ended.
    first_tile_s : float or None
        Until its first tile, where it told.
    peak_bytes : int
        Of the whole process tree.
    vram_bytes : int or None
        Most that torch held of the device, where the command told.
    stages : dict of StageCost
    timeline : list of (float, int)
        Seconds since the start, and bytes.
    sampling_cpu_s : float
    """

    exit_code: int
    stopped: str
    seconds: float
    first_tile_s: float | None
    peak_bytes: int
    vram_bytes: int | None
    stages: dict[str, StageCost]
    timeline: list[tuple[float, int]]
    sampling_cpu_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return all but the timeline as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "timeline"}


def run_measured(
    command: Sequence[str],
    environment: Mapping[str, str],
    trace: Path,
    limit_bytes: int | None = None,
    limit_s: float = float("inf"),
    log: Path | None = None,
) -> MeasuredCommand:
    """Run `command` and wait for its end, or end it where it takes too much.

    Parameters
    ----------
    command : sequence of str
    environment : mapping of str to str
    trace : Path
        File for the spans of its stages; an older one is removed.
    limit_bytes : int, optional
        Memory of the process tree beyond which it is ended.
    limit_s : float
        Seconds after which it is ended.
    log : Path, optional
        Where its stdout and stderr go; to those of this process if not given.
    """
    trace.unlink(missing_ok=True)
    start_s = time.time()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("wb")) if log else None
        child = stack.enter_context(_process_group(command, {**environment, TRACE_VARIABLE: str(trace)}, out))
        sampler = stack.enter_context(PeakSampler(_LOOK_S, pid=child.pid))
        stopped = _watch(child, sampler, limit_bytes, limit_s)
        seconds = time.time() - start_s
    timeline, spans = sampler.timeline(), _read_spans(trace)
    starts = [span["start_s"] for span in spans if span["stage"] == TILES]
    return MeasuredCommand(
        exit_code=child.returncode,
        stopped=stopped,
        seconds=seconds,
        first_tile_s=min(starts) - start_s if starts else None,
        peak_bytes=sampler.peak_bytes(),
        vram_bytes=next((span["vram_bytes"] for span in spans if "vram_bytes" in span), None),
        stages=stages_of(spans, timeline),
        timeline=[(moment - start_s, held_bytes) for moment, held_bytes in timeline],
        sampling_cpu_s=sampler.cpu_s,
    )


@contextlib.contextmanager
def _process_group(
    command: Sequence[str], environment: Mapping[str, str], out: Any
) -> Iterator[subprocess.Popen[bytes]]:
    error = None if out is None else subprocess.STDOUT
    child = subprocess.Popen(
        list(command), env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error, start_new_session=True
    )
    tree = ProcessTree(child.pid)
    try:
        yield child
    finally:
        _end(child, tree)


def _end(child: subprocess.Popen[bytes], tree: ProcessTree) -> None:
    """End the session that the command has begun, with what it left running, and the command itself."""
    tree.note_descendants()
    end_session(child)
    tree.end_descendants(0.0)
    child.wait()
    # but not for ever, until the kernel has taken down what was killed: the next command needs the memory
    deadline_s = time.monotonic() + _KILL_S
    while not tree.ended() and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)


def _watch(child: subprocess.Popen[bytes], sampler: PeakSampler, limit_bytes: int | None, limit_s: float) -> str:
    """Wait for the command to end; return why it must be ended, if it must."""
    start_s = time.monotonic()
    while child.poll() is None:
        if limit_bytes is not None and sampler.peak_bytes() > limit_bytes:
            return f"took more than {format_gib(limit_bytes)}"
        if time.monotonic() - start_s > limit_s:
            return f"took more than {limit_s:.0f} s"
        time.sleep(_LOOK_S)
    return ""


def _read_spans(trace: Path) -> list[dict[str, Any]]:
    """Return what was written whole: a command that is ended may leave half a line."""
    spans = []
    for line in trace.read_text().splitlines() if trace.exists() else ():
        with contextlib.suppress(ValueError):
            spans.append(json.loads(line))
    return spans


def stages_of(spans: Sequence[Mapping[str, Any]], timeline: Sequence[tuple[float, int]]) -> dict[str, StageCost]:
    """Add up the spans of each stage, and find the highest point of the timeline within them."""
    moments = [moment for moment, _ in timeline]
    seconds: dict[str, float] = {}
    held: dict[str, list[int]] = {}
    for span in spans:
        stage, start_s, stop_s = span["stage"], span["start_s"], span["stop_s"]
        seconds[stage] = seconds.get(stage, 0.0) + stop_s - start_s
        within = timeline[bisect_left(moments, start_s) : bisect_right(moments, stop_s)]
        held.setdefault(stage, []).extend(held_bytes for _, held_bytes in within)
    return {stage: StageCost(total, max(held[stage], default=None)) for stage, total in seconds.items()}


def machine_facts() -> dict[str, Any]:
    """Return what a measurement depends on: processor, memory, versions."""
    ram = physical_ram()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "ram_bytes": ram and ram.total_bytes,
        "free_ram_bytes": ram and ram.free_bytes,
        "python": platform.python_version(),
        **{name: version_of(name) for name in _PACKAGES},
    }
