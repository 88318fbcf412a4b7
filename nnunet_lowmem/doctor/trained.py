"""What is in a folder of trained models: its configurations and folds, and how many of their weights are denormal."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.network import denormals
from nnunet_lowmem.nnunet.model import load_folds
from nnunet_lowmem.nnunet.model_files import folds_in
from nnunet_lowmem.nnunet.trust import Trust
from nnunet_lowmem.predict.weights import denormals_of

_PARTS = 3


def other_configurations(model_folder: Path, checkpoint_name: str) -> list[Path]:
    """Return the folders beside one that hold other trained models of the same data: TRAINER__PLANS__CONFIGURATION."""
    beside = sorted(folder for folder in model_folder.absolute().parent.glob("*__*__*") if folder.is_dir())
    return [
        folder
        for folder in beside
        if folder.name != model_folder.absolute().name
        and len(folder.name.split("__")) == _PARTS
        and os.path.isfile(folder / "plans.json")
        and folds_in(folder, checkpoint_name)
    ]


def denormal_weights(model_folder: Path, folds: list[int | str], checkpoint_name: str, trust: Trust) -> Finding:
    """Count the weights that many processors are slow with; reads all of them.

    Raises
    ------
    ModelError
        If a file is missing or unreadable, names what is not trusted, or asks for an absurd size.
    """
    _, _, weights = load_folds(model_folder, folds, checkpoint_name, trust)
    found = total = 0
    for fold in weights:
        of_fold, all_of_fold = denormals_of(fold)
        found, total = found + of_fold, total + all_of_fold
    seen = f"{found:,} of {total:,} weights are denormal ({100 * found / max(1, total):.2g} %)"
    if found * denormals.WORTH_A_WORD > total:
        advice = (
            "many processors are slow with them; this package leaves them out where a tile shows that no bit changes"
        )
        return Finding("weights", Verdict.MIND, seen, advice)
    return Finding("weights", Verdict.FINE, seen)
