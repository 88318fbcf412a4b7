"""Stock and ours in turn, three times each, with the same allocator: medians and ranges.

    python pair.py results -m model -i images -f 0 -npp 1 -nps 1 --disable_tta -device cpu -- --fast bfloat16

All after the folder are flags of `nnunet-lowmem compare`, those behind ``--`` of ours alone; `--repeat` is 3 unless
given. Our command has torch ask for huge pages by setting ``THP_MEM_ALLOC_ENABLE``: here it is set for stock, too, so
that what is gained is not the allocator's. The folder must be empty; it keeps label maps, logs and ``compare.json``.
The exit code is that of `compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_lowmem.report.measured_command import TILES

SIDES = ("stock", "ours")
Run = Mapping[str, Any]


def stage_s(*stages: str) -> Callable[[Run], float | None]:
    """Return what adds up the seconds of stages; None where a run has none of them."""

    def seconds(run: Run) -> float | None:
        found = [run["stages"][stage]["seconds"] for stage in stages if stage in run["stages"]]
        return sum(found) if found else None

    return seconds


#: Name, value in a run, unit.
ROWS: tuple[tuple[str, Callable[[Run], float | None], str], ...] = (
    ("whole command", lambda run: run["seconds"], "s"),
    ("first tile after", lambda run: run["first_tile_s"], "s"),
    ("preprocessing", stage_s("preprocessing"), "s"),
    ("sliding window", stage_s(TILES), "s"),
    ("export and writing", stage_s("export", "writing"), "s"),
    ("peak, process tree", lambda run: run["peak_bytes"] / 2**30, "GiB"),
)


def measure(folder: Path, flags: Sequence[str]) -> int:
    """Run `compare`, which leaves its numbers in the folder; return its exit code."""
    command = [sys.executable, "-m", "nnunet_lowmem", "compare", "-o", str(folder), "--repeat", "3", "--json", *flags]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown from what `compare` has found."""
    yield "| | stock | ours | ours / stock |"
    yield "|---|---|---|---|"
    for name, value, unit in ROWS:
        values = [[number for run in found[side] if (number := value(run)) is not None] for side in SIDES]
        stock, ours = (median_and_range(numbers, unit) for numbers in values)
        ratio = f"{statistics.median(values[1]) / statistics.median(values[0]):.2f}" if all(values) else "-"
        yield f"| {name} | {stock} | {ours} | {ratio} |"
    voxels = sum(case["voxels"] for case in found["labels"])
    yield f"| voxels that differ | | {found['differing']:,} of {voxels:,} | |"
    if found["mean_dice"] is not None:
        yield f"| Dice, mean of labels | | {found['mean_dice']:.5f} | |"


def median_and_range(numbers: Sequence[float], unit: str) -> str:
    if not numbers:
        return "-"
    three = (statistics.median(numbers), min(numbers), max(numbers))
    middle, least, most = (f"{number:.{1 if unit == 's' else 2}f}" for number in three)
    return f"{middle} {unit} ({least}–{most})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s FOLDER FLAG ... [-- FLAG ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="empty folder for what both sides write")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of compare")
    args = parser.parse_args()
    exit_code = measure(args.folder, args.flags)
    file = args.folder / "compare.json"
    if not file.exists():
        return exit_code
    found = json.loads(file.read_text())
    if found["labels"] is None or any(run["exit_code"] for side in SIDES for run in found[side]):
        print(f"stock was ended, or a side failed; see {args.folder}")
        return exit_code
    print("\n".join(table(found)))
    print(f"\nMedians of {len(found['ours'])} (range), in turn, huge pages on both sides.")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
