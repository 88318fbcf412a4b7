"""Runs one command with a predictor in the place of nnU-Net's, with or without the start-up hook."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.nnunet.switching import VARIABLE
from nnunet_lowmem.system import platform

#: Holds a ``sitecustomize``, which Python imports when it starts.
ON_PATH = Path(__file__).parents[1] / "on_path"


def environment_for(predictor: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with what makes Python programs use that predictor."""
    on_path = str(ON_PATH)
    others = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", on_path)]
    return {**environment, VARIABLE: predictor, "PYTHONPATH": os.pathsep.join([on_path, *others])}


def run(options: argparse.Namespace) -> int:
    """Run the command in the place of this process, or on Windows as its child; return the child's exit code.

    Raises
    ------
    UsageError
        If there is no such predictor or no command, or that is not found.
    """
    from nnunet_lowmem.nnunet import predictors, switching

    if options.predictor != switching.BY_PLANS:
        predictors.find(options.predictor)
    command = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not command:
        raise UsageError("run: give the command after --, as in: nnunet-lowmem run -- TotalSegmentator -i ct.nii.gz")
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(f"run: the command {command[0]!r} is not found")
    environment = environment_for(options.predictor, os.environ)
    return platform.become(program, command, environment)
