"""A data set of small heads, planned, preprocessed and trained by nnU-Net's own commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from images import DATA, HEAD, read

import nnunet_lowmem

NAME = "Dataset001_Heads"
CASES = [f"head_{number}" for number in range(5)]
VALIDATED = CASES[3:]
NEXT = ("3d_cascade_fullres", "3d_other")
TRAINERS = [Path(__file__).with_name("trainers"), Path(nnunet_lowmem.__file__).with_name("trainers")]
COMMANDS = {
    "nnUNetv2_plan_and_preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:"
    "plan_and_preprocess_entry",
    "nnUNetv2_preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry",
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
}
#: Three stages: of two, deep supervision would weigh the only output with 0.
ARCHITECTURE = {
    "n_stages": 3,
    "features_per_stage": [8, 12, 16],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}


@dataclass
class TinyTraining:
    """Folders of nnU-Net below `root`, and its commands run with them.

    ``path`` holds what Python is to import before what is installed; the trainers of the tests and of the package are
    found by ``nnUNet_extTrainer``.
    """

    root: Path
    path: Sequence[Path] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, command: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
        folders = {f"nnUNet_{kind}": str(self.root / kind) for kind in ("raw", "preprocessed", "results")}
        environment = {
            **os.environ,
            **folders,
            "nnUNet_def_n_proc": "1",
            # nnU-Net 2.5 reads its own checkpoints as torch did before 2.6
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
            "nnUNet_extTrainer": os.pathsep.join(map(str, TRAINERS)),
            "PYTHONPATH": os.pathsep.join([*map(str, self.path), str(TRAINERS[1].parents[1])]),
            **self.variables,
            **variables,
        }
        module, _, function = COMMANDS[command].partition(":")
        program = f"from {module} import {function} as main; main()"
        words = (sys.executable, "-c", program, *words)
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)

    def must(self, command: str, *words: str, **variables: str) -> str:
        done = self.run(command, *words, **variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def train(self, configuration: str, fold: str, trainer: str, *flags: str, **variables: str) -> str:
        words = ["1", configuration, fold, "-tr", trainer, "-device", "cpu", *flags]
        return self.must("nnUNetv2_train", *words, nnUNet_n_proc_DA="0", **variables)

    def results(self, configuration: str, trainer: str = "QuickTrainer") -> Path:
        return self.root / "results" / NAME / f"{trainer}__nnUNetPlans__{configuration}"

    def prepare(self) -> TinyTraining:
        write_raw(self.root / "raw" / NAME)
        words = ["-d", "1", "-npfp", "1", "-np", "1", "-c", "3d_fullres"]
        self.must("nnUNetv2_plan_and_preprocess", *words, "--no_pp")
        preprocessed = self.root / "preprocessed" / NAME
        edit_plans(preprocessed / "nnUNetPlans.json")
        splits = [{"train": CASES[:3], "val": VALIDATED}]
        (preprocessed / "splits_final.json").write_text(json.dumps(splits))
        configurations = ["3d_fullres", "3d_lowres", "3d_other"]
        self.must("nnUNetv2_preprocess", "-d", "1", "-np", "1", "1", "1", "-c", *configurations)
        return self


def write_raw(folder: Path) -> None:
    """Five samplings of the head at 5 mm, with its AAL labels by hemisphere."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number, name in enumerate(CASES):
        image, labels = (
            read(path)[number::5, number::5, number::5] for path in (HEAD, DATA / "t1_head_1mm_aal.nii.gz")
        )
        SimpleITK.WriteImage(image, str(folder / "imagesTr" / f"{name}_0000.nii.gz"))
        array = SimpleITK.GetArrayFromImage(labels)
        halves = SimpleITK.GetImageFromArray(np.where(array == 0, 0, 1 + array % 2).astype(np.uint8))
        halves.CopyInformation(image)
        SimpleITK.WriteImage(halves, str(folder / "labelsTr" / f"{name}.nii.gz"))
    labels = {"background": 0, "left": 2, "right": 1}
    dataset = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": len(CASES), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))


def edit_plans(path: Path) -> None:
    """A small network and patch, a grid of its own, and a cascade with two second stages.

    Patches are powers of two: for others, nnU-Net 2.6 and 2.7 compute chunks for blosc2 that are smaller than blocks.
    """
    plans = json.loads(path.read_text())
    full = plans["configurations"]["3d_fullres"]
    full.update(patch_size=[32, 32, 32], spacing=[4.3, 4.7, 4.1], batch_size=2)
    full["architecture"]["arch_kwargs"].update(ARCHITECTURE)
    full["architecture"]["network_class_name"] = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    full["architecture"]["arch_kwargs"].pop("n_blocks_per_stage", None)
    second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    low = {"inherits_from": "3d_fullres", "spacing": [6.2, 6.2, 6.2], "patch_size": [16, 16, 16]}
    low |= {"data_identifier": "nnUNetPlans_3d_lowres", "next_stage": ["3d_cascade_fullres", "3d_other"]}
    other = {**second, "spacing": [5.5, 5.0, 6.0], "data_identifier": "nnUNetPlans_3d_other"}
    plans["configurations"].update({"3d_lowres": low, "3d_cascade_fullres": second, "3d_other": other})
    path.write_text(json.dumps(plans))


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_validation(ours: Path, stock: Path, cases: list[str]) -> None:
    """The same files and no other, the same voxels, the same metrics."""
    assert names(ours) == names(stock)
    assert (ours / "summary.json").read_text() == (stock / "summary.json").read_text()
    expected, actual = read_all(stock), read_all(ours)
    assert sorted(expected) == [f"{case}.nii.gz" for case in cases]
    for case, voxels in expected.items():
        np.testing.assert_array_equal(actual[case], voxels)
        assert len(np.unique(voxels)) > 1, "an empty segmentation compares nothing"


def assert_same_next_stages(ours: Path, stock: Path, cases: list[str]) -> None:
    """The same files, the same labels, stored in the same way."""
    assert names(ours) == names(stock)
    for stage, case in product(NEXT, cases):
        actual, expected = (stored_labels(folder / stage, case) for folder in (ours, stock))
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual[:], expected[:])
        if not isinstance(actual, np.ndarray):
            assert (actual.chunks, actual.blocks) == (expected.chunks, expected.blocks)


def stored_labels(folder: Path, case: str):
    """As .npz before nnU-Net 2.6, and compressed by blosc2 since."""
    if (folder / f"{case}.npz").exists():
        return np.load(folder / f"{case}.npz")["seg"]
    import blosc2

    return blosc2.open(str(folder / f"{case}.b2nd"))


def moved(folder: Path) -> Path:
    """Put what one of both has written out of the other's way."""
    return Path(shutil.move(folder, folder.with_name(folder.name + "_of_ours")))
