"""What an option costs in labels: the bundled 118-class model on four images, stock's label maps beside ours.

    python accuracy.py work --fast bfloat16 [--folds 0 1] [--images ct3 ct15 head aniso]

Mirroring on, one image per command, on the CPU; without `--fast` it is the exact default that is compared. ``work``
keeps stock's label maps, and the seconds they took, so that they are made once for all options. Both sides ask for huge
pages, so their seconds compare; they are single runs.

The model has seen one image, that CT, and no mirrored one: its borders are less certain than those of a good model, and
on the heads, which are T1, what it finds is no anatomy. So more labels differ than with a good model. Classes of up to
500 voxels in stock's map are left out of the Dice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from make_case import AIR, CT

import nnunet_lowmem
from nnunet_lowmem.nnunet.model_files import label_names, read_json
from nnunet_lowmem.report.compare import Request, side_command, side_environment
from nnunet_lowmem.report.label_differences import LabelDifference, compare_folders, read_labels
from nnunet_lowmem.report.measured_command import run_measured

MODEL = Path(nnunet_lowmem.__file__).parent / "data" / "ct118"
TEST_DATA = Path(__file__).parents[1] / "data"
ENDING = ".nii.gz"
LEAST_VOXELS = 500
COLUMNS = ("image", "voxels", "differ", "share", f"classes > {LEAST_VOXELS}", "mean Dice", "worst", "stock", "ours")


def finer_ct() -> sitk.Image:
    """The CT at 1.5 mm, so that logits are resampled; the last voxels are those of the CT, nothing lies beyond."""
    image = sitk.ReadImage(str(CT))
    size = [2 * voxels - 1 for voxels in image.GetSize()]
    spacing = [step / 2 for step in image.GetSpacing()]
    geometry = (image.GetOrigin(), spacing, image.GetDirection())
    return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, *geometry, AIR)


IMAGES: dict[str, Callable[[], sitk.Image]] = {
    "ct3": lambda: sitk.ReadImage(str(CT)),
    "ct15": finer_ct,
    "head": lambda: sitk.ReadImage(str(TEST_DATA / "t1_head_1mm.nii.gz")),
    "aniso": lambda: sitk.ReadImage(str(TEST_DATA / "t1_aniso_6p5mm.nii.gz")),
}


def model_of(work: Path) -> Path:
    """Put the two folds together that lie apart."""
    folder = work / "model"
    if not folder.exists():
        shutil.copytree(MODEL, folder)
        shutil.copytree(TEST_DATA / "ct118_fold_1", folder / "fold_1")
    return folder


def images_of(work: Path, name: str) -> Path:
    folder = work / "images" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        sitk.WriteImage(IMAGES[name](), str(folder / f"{name}_0000{ENDING}"))
    return folder


def predict(work: Path, name: str, side: str, folds: Sequence[str], our_flags: Sequence[str]) -> tuple[Path, float]:
    """Return the folder of the label map and the seconds; what stock has made is not made again."""
    output = work / "_".join([side, *folds, *(flag.strip("-") for flag in our_flags)])
    facts = output / f"{name}.json"
    if side == "stock" and facts.exists():
        return output, float(json.loads(facts.read_text())["seconds"])
    output.mkdir(exist_ok=True)
    flags = ("-i", str(images_of(work, name)), "-f", *folds, "-npp", "1", "-nps", "1", "--disable_progress_bar")
    request = Request(str(model_of(work)), (name,), ENDING, "cpu", flags, tuple(our_flags))
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = side_environment("cpu", temporary, {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    log = output / f"{name}.log"
    run = run_measured(side_command(request, side, output), environment, temporary / "trace", log=log)
    if run.exit_code:
        sys.exit(f"{side} failed on {name}; see {log}")
    facts.write_text(json.dumps(run.as_dict()))
    return output, run.seconds


def cells_of(
    case: LabelDifference, voxels_of: Sequence[int], names: Mapping[int, str], stock_s: float, ours_s: float
) -> list[str]:
    """Return a row of the table; `voxels_of` counts the voxels of each label in stock's map."""
    dice = {label: case.dice[label] for label, count in enumerate(voxels_of) if label and count > LEAST_VOXELS}
    share = f"{100 * case.differing / case.voxels:.4f} %"
    cells = [case.case, f"{case.voxels:,}", f"{case.differing:,}", share, str(len(dice))]
    worst = min(dice, key=lambda label: dice[label], default=None)
    cells.append(f"{fmean(dice.values()):.5f}" if dice else "-")
    cells.append("-" if worst is None or dice[worst] == 1 else f"{names.get(worst, worst)} {dice[worst]:.5f}")
    return [*cells, f"{stock_s:.1f} s", f"{ours_s:.1f} s"]


def compare_one(work: Path, name: str, folds: Sequence[str], our_flags: Sequence[str]) -> list[str]:
    stock, stock_s = predict(work, name, "stock", folds, ())
    ours, ours_s = predict(work, name, "ours", folds, our_flags)
    [case] = compare_folders(stock, ours, [name], ENDING)
    if case.problem:
        sys.exit(f"{name}: {case.problem}")
    counts: Any = np.bincount(read_labels(stock / f"{name}{ENDING}").ravel())
    return cells_of(case, counts.tolist(), label_names(read_json(MODEL / "dataset.json")), stock_s, ours_s)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for images, the model and label maps")
    parser.add_argument(
        "--fast", nargs="?", const="", metavar="NUMBERS", help="as the command takes it: with or without a value"
    )
    parser.add_argument("--folds", nargs="+", choices=("0", "1"), default=["0", "1"])
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES))
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    our_flags = [] if args.fast is None else ["--fast", args.fast] if args.fast else ["--fast"]
    print(f"Folds {' '.join(args.folds)}, ours with {' '.join(our_flags) or 'no flag'}.\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for name in args.images:
        print(line(compare_one(work, name, args.folds, our_flags)), flush=True)


if __name__ == "__main__":
    main()
