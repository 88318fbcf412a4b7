"""Measure how memory and time grow with the length of the scan, or with the number of classes, and plot it.

    python curves.py length work --values 250 500 1000 2000 --plot ../../docs
    python curves.py classes work --values 2 15 118 350 700 --plot ../../docs --sides ours stock --stock_limit 20G

`length`: 512x512xN at 0.8x0.8x2 mm, 15 classes. `classes`: 256x256x200 at 1.2x1.2x2 mm, N classes. Points that are in
``work/length.json`` or ``work/classes.json`` are not measured again, so a long series may be continued. Where stock
was ended at its limit the point is a lower bound, drawn as a triangle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import SimpleITK as sitk  # noqa: N813
from make_case import make_case
from matplotlib.figure import Figure

from nnunet_lowmem.report.compare import Request, side_command, side_environment
from nnunet_lowmem.report.measured_command import TILES, run_measured
from nnunet_lowmem.sizes import parse_size
from nnunet_lowmem.system.memory_limits import total_ram_bytes

STAGES = {"preprocessing": ("preprocessing",), "sliding window": (TILES,), "export and writing": ("export", "writing")}
COLOURS = dict(zip(["peak RAM", *STAGES], ["tab:blue", "tab:green", "tab:orange", "tab:red"], strict=True))


class Series(NamedTuple):
    """One axis along which cases grow; ``fixed`` is what the other axis stays at."""

    title: str
    plane: int
    spacing: list[float]
    fixed: int

    def size_of(self, name: str, value: int) -> tuple[int, int]:
        """Return (slices, heads)."""
        return (value, self.fixed) if name == "length" else (self.fixed, value)


SERIES = {
    "length": Series("slices (512×512, 15 classes)", 512, [0.8, 0.8, 2.0], 15),
    "classes": Series("classes (256×256×200)", 256, [1.2, 1.2, 2.0], 200),
}


def images_of(work: Path, series: Series, plane: int, slices: int) -> Path:
    folder = work / f"images_{plane}x{slices}"
    if not folder.exists():
        folder.mkdir(parents=True)
        image = make_case([plane, plane, slices], series.spacing)
        sitk.WriteImage(image, str(folder / "ct_0000.nii.gz"))
    return folder


def model_of(work: Path, heads: int, patch: int, steps: int) -> Path:
    folder = work / f"model_{heads}_{patch}"
    if not folder.exists():
        script = Path(__file__).with_name("make_model.py")
        flags = ["--heads", str(heads), "--patch", str(patch), "--steps", str(steps)]
        subprocess.run([sys.executable, script, folder, *flags], check=True)
    return folder


def measure(args: argparse.Namespace, value: int, side: str) -> dict[str, Any]:
    series = SERIES[args.series]
    slices, heads = series.size_of(args.series, value)
    images = images_of(args.work, series, args.plane or series.plane, slices)
    flags = ("-i", str(images), "-f", "0", "-npp", "1", "-nps", "1", "--disable_tta", "--disable_progress_bar")
    request = Request(str(model_of(args.work, heads, args.patch, args.steps)), ("ct",), ".nii.gz", "cpu", flags)
    limit_bytes = parse_size(args.stock_limit, total_ram_bytes()) if side == "stock" else None
    command = side_command(request, side, args.work / side)
    log = args.work / f"{side}.log"
    run = run_measured(
        command, side_environment("cpu", args.work, os.environ), args.work / "trace", limit_bytes, log=log
    )
    if run.exit_code and not run.stopped:
        sys.exit(f"{side} failed at {value}; see {log}")
    return {"value": value, "side": side, **run.as_dict()}


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    file = args.work / f"{args.series}.json"
    points = json.loads(file.read_text()) if file.exists() else []
    for value in args.values:
        for side in args.sides:
            if not any(point["value"] == value and point["side"] == side for point in points):
                points.append(measure(args, value, side))
                file.write_text(json.dumps(points, indent=1))
                print(f"{value} {side}: {points[-1]['seconds']:.1f} s, {points[-1]['peak_bytes'] / 2**30:.2f} GiB")
    return sorted(points, key=lambda point: point["value"])


def plot(points: list[dict[str, Any]], title: str, file: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for side, line, inside in (("ours", "-", None), ("stock", "--", "white")):
        style = {"linestyle": line, "marker": "o", "markerfacecolor": inside}
        chosen = [point for point in points if point["side"] == side]
        if not chosen:
            continue
        values = [point["value"] for point in chosen]
        ended = [number for number, point in enumerate(chosen) if point["stopped"]]
        peaks = [point["peak_bytes"] / 2**30 for point in chosen]
        memory.plot(values, peaks, color=COLOURS["peak RAM"], label=side, **style)
        memory.plot([values[n] for n in ended], [peaks[n] for n in ended], "^", color="black", markersize=9)
        whole = [point for point in chosen if not point["stopped"]]
        for name, stages in STAGES.items():
            seconds = [
                sum(point["stages"].get(stage, {"seconds": 0})["seconds"] for stage in stages) for point in whole
            ]
            label = f"{name}, {side}"
            time.plot([p["value"] for p in whole], seconds, color=COLOURS[name], label=label, **style)
    for axes, unit in ((memory, "peak RAM, GiB"), (time, "seconds")):
        axes.set(xlabel=title, ylabel=unit, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, handlelength=4)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", choices=SERIES)
    parser.add_argument("work", type=Path, help="folder for images, models and measurements")
    parser.add_argument("--values", type=int, nargs="+", required=True, help="numbers of slices, or of classes")
    parser.add_argument("--sides", nargs="+", choices=("ours", "stock"), default=["ours"])
    parser.add_argument("--stock_limit", default="80%", help="end stock beyond (default: 80%% of the machine)")
    parser.add_argument("--plot", type=Path, help="folder for length.svg or classes.svg")
    parser.add_argument("--plane", type=int, help="rows and columns of the images, to try it on something small")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--steps", type=int, default=200, help="of fitting the model")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    points = measure_all(args)
    if args.plot:
        plot(points, SERIES[args.series].title, args.plot / f"{args.series}.svg")


if __name__ == "__main__":
    main()
