"""Print stock and ours side by side from the files of `run.py`, and count the voxels that differ.

    python compare.py stock.json ours.json --stages stock_stages.json --outputs STOCK_OUT OUR_OUT

``--stages`` takes the run of `stock_stages.py`, because stock's own command does not say when its stages begin. The
exit code is 1 where a label map is missing, has another shape or type, or differs in a voxel.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

STAGES = ("preprocessing", "sliding window", "export", "first tile to file")


def row(name: str, stock: float | None, ours: float | None, unit: str) -> str:
    cells = ["-" if value is None else f"{value:.2f} {unit}" for value in (stock, ours)]
    ratio = f"{ours / stock:.2f}" if stock and ours else "-"
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio} |"


def table(stock: dict[str, Any], ours: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    lines = ["| | stock | ours | ours / stock |", "|---|---|---|---|"]
    lines.append(row("whole command", stock["wall_s"], ours["wall_s"], "s"))
    lines.append(row("peak, whole command", stock["peak_gib"], ours["peak_gib"], "GiB"))
    for stage in STAGES:
        pair = [run["stages"].get(stage, {}) for run in (stages, ours)]
        if any(pair):
            lines.append(row(stage, pair[0].get("seconds"), pair[1].get("seconds"), "s"))
            lines.append(row(f"{stage}, peak", pair[0].get("peak_gib"), pair[1].get("peak_gib"), "GiB"))
    for name, run in (("stock", stock), ("ours", ours)):
        if run["stopped"] or run["exit_code"]:
            lines.append(f"\n{name} did not finish: {run['stopped'] or ''} exit code {run['exit_code']}")
    return lines


def difference(stock_file: Path, our_file: Path) -> str | None:
    """Return how two label maps differ, or None."""
    if not our_file.exists():
        return "missing"
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in (stock_file, our_file))
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{first.shape} {first.dtype} against {second.shape} {second.dtype}"
    differing = int(np.count_nonzero(first != second))
    return f"{differing} of {first.size} voxels" if differing else None


def compare_outputs(stock_folder: Path, our_folder: Path) -> int:
    files = sorted(stock_folder.glob("*.nii.gz"))
    differences = {file.name: difference(file, our_folder / file.name) for file in files}
    for name, text in differences.items():
        print(f"{name}: {text or '0 voxels differ'}")
    if not files:
        print(f"no label maps in {stock_folder}")
    return int(not files or any(differences.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stock", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--stages", type=Path, help="run of stock_stages.py")
    parser.add_argument("--outputs", type=Path, nargs=2, metavar=("STOCK", "OURS"), help="folders of label maps")
    args = parser.parse_args()
    stock, ours = (json.loads(file.read_text()) for file in (args.stock, args.ours))
    stages = json.loads(args.stages.read_text()) if args.stages else stock
    print("\n".join(table(stock, ours, stages)), end="\n\n")
    return compare_outputs(*args.outputs) if args.outputs else 0


if __name__ == "__main__":
    sys.exit(main())
