"""Runs one command with a predictor in the place of nnU-Net's, with or without the start-up hook."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_lowmem.errors import UsageError

#: Holds a ``sitecustomize``, which Python imports when it starts.
ON_PATH = Path(__file__).parents[1] / "on_path"


def environment_for(predictor: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with what makes Python programs use that predictor."""
    return {
        **environment,
        "nnUNet_predictor": predictor,
        "PYTHONPATH": _joined(ON_PATH, environment.get("PYTHONPATH")),
    }


def run(command: Sequence[str], predictor: str) -> int:
    """Run `command` in the place of this process, or on Windows as its child; return the child's exit code.

    Raises
    ------
    UsageError
        If there is no command, or it is not found.
    """
    if not command:
        raise UsageError("run: give the command after --, as in: nnunet-lowmem run -- TotalSegmentator -i ct.nii.gz")
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(f"run: the command {command[0]!r} is not found")
    environment = environment_for(predictor, os.environ)
    if os.name == "nt":  # there, exec returns to the shell at once
        return subprocess.call([program, *command[1:]], env=environment)
    return os.execve(program, list(command), environment)


def _joined(folder: Path, others: str | None) -> str:
    entries = [entry for entry in (others or "").split(os.pathsep) if entry and entry != str(folder)]
    return os.pathsep.join([str(folder), *entries])
