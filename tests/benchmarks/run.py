"""Run a command and measure it from outside: seconds, and the memory of its whole process tree.

    python run.py stock.json -- nnUNetv2_predict_from_modelfolder -m MODEL -i IMAGES -o OUT -device cpu ...
    python run.py ours.json -- nnUNetv2_predict_lowmem -m MODEL -i IMAGES -o OUT -device cpu ...

Memory is anonymous PSS plus shared memory, children included. The command finds in the environment variable
``nnUNet_lowmem_trace`` the name of a file into which it may write a line of JSON per event, ``{"time": seconds since
the epoch, "event": ..., "case": ...}``; from these come the seconds and the peak of each stage. Without the file only
the whole is reported. The exit code is that of the command, or 1 where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from nnunet_lowmem.measuring import PeakSampler
from nnunet_lowmem.memory import parse_size

TRACE = "nnUNet_lowmem_trace"
SPANS = {
    "preprocessing": ("preprocessing_start", "preprocessing_end"),
    "sliding window": ("first_tile", "prediction_end"),
    "export": ("prediction_end", "export_end"),
    "first tile to file": ("first_tile", "case_end"),
}


def read_events(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def spans_of(events: list[dict[str, Any]], begin: str, end: str) -> list[tuple[float, float]]:
    """Return (start, stop) of every case that has both events."""
    starts = {event["case"]: event["time"] for event in reversed(events) if event["event"] == begin}
    stops = {event["case"]: event["time"] for event in events if event["event"] == end}
    return [(start, stops[case]) for case, start in starts.items() if case in stops]


def stages_of(events: list[dict[str, Any]], timeline: list[tuple[float, int]]) -> dict[str, dict[str, float]]:
    stages = {}
    for stage, (begin, end) in SPANS.items():
        spans = spans_of(events, begin, end)
        held = [size for moment, size in timeline if any(start <= moment <= stop for start, stop in spans)]
        if held:
            seconds = sum(stop - start for start, stop in spans)
            stages[stage] = {"seconds": round(seconds, 2), "peak_gib": round(max(held) / 2**30, 3)}
    return stages


def interleaved_seconds(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of stages that alternate, as our command sums them up itself; its export includes writing."""
    sums = [event["seconds"] for event in events if event.get("seconds")]
    if not sums:
        return {}
    return {
        "sliding window": {"seconds": round(sum(s["prediction"] for s in sums), 2)},
        "export": {"seconds": round(sum(s["export"] + s.get("writing", 0.0) for s in sums), 2)},
    }


def watch(child: subprocess.Popen[bytes], stop_at_bytes: int, timeout_s: float) -> tuple[PeakSampler, str | None]:
    """Wait for the command to end; end it when it takes too much memory or time, and return why."""
    start_s, stopped = time.monotonic(), None
    with PeakSampler(0.05, pid=child.pid) as sampler:
        while child.poll() is None and stopped is None:
            time.sleep(0.05)
            if sampler.peak_bytes() > stop_at_bytes:
                stopped = f"more than {stop_at_bytes / 2**30:.1f} GiB"
            elif time.monotonic() - start_s > timeout_s:
                stopped = f"more than {timeout_s:.0f} s"
    return sampler, stopped


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End what the command left running, and the command itself."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()


def machine() -> dict[str, Any]:
    packages = ("nnunetv2", "torch", "numpy", "scipy", "nnunet-lowmem")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def measure(command: list[str], trace: Path, stop_at_bytes: int, timeout_s: float) -> dict[str, Any]:
    trace.unlink(missing_ok=True)
    free_bytes = psutil.virtual_memory().available
    start_s = time.time()
    child = subprocess.Popen(command, env=os.environ | {TRACE: str(trace)}, start_new_session=True)
    try:
        sampler, stopped = watch(child, stop_at_bytes, timeout_s)
        wall_s = time.time() - start_s
    finally:
        end_group(child)
    timeline = sampler.timeline()
    events = read_events(trace)
    first_tiles = [event["time"] for event in events if event["event"] == "first_tile"]
    return {
        "command": [Path(command[0]).name, *command[1:]],
        "exit_code": child.returncode,
        "stopped": stopped,
        "wall_s": round(wall_s, 2),
        "first_tile_s": round(min(first_tiles) - start_s, 2) if first_tiles else None,
        "peak_gib": round(sampler.peak_bytes() / 2**30, 3),
        "sampling_cpu_s": round(sampler.cpu_s, 2),
        "free_ram_at_start_gib": round(free_bytes / 2**30, 1),
        "stages": stages_of(events, timeline) | interleaved_seconds(events),
        "machine": machine(),
        "events": [event | {"time": round(event["time"] - start_s, 3)} for event in events],
        "timeline": [(round(moment - start_s, 3), size) for moment, size in timeline],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [--stop_at SIZE] [--timeout S] RESULT.json -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, help="file for the result")
    parser.add_argument("--stop_at", default="90%", help="end the command when its memory passes this (default 90%%)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if not command or shutil.which(command[0]) is None:
        parser.error(f"no such command: {command[0] if command else 'give one after --'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the command would outlive `timeout run.py ...`
    stop_at_bytes = parse_size(args.stop_at, psutil.virtual_memory().total)
    result = measure(command, args.json.with_suffix(".trace.jsonl"), stop_at_bytes, args.timeout)
    args.json.write_text(json.dumps(result))
    print(json.dumps({key: value for key, value in result.items() if key not in ("timeline", "events")}, indent=1))
    return 1 if result["stopped"] else int(result["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
