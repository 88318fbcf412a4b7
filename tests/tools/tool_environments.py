"""Tools from the registry in environments of their own, beside this package, and the bundled model as their weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
import torch

import nnunet_lowmem

CHECKOUT = Path(__file__).parents[2]
DATA = Path(nnunet_lowmem.__file__).parent / "data"
#: Names a folder whose environments are used again and left there; without it they are made anew and removed.
KEPT = "TOOL_ENVIRONMENTS"
FLAG = {"nnUNet_predictor": "lowmem"}
LINE = "predictor 'lowmem' in place of nnUNetPredictor: nnunet_lowmem.predictor.LowMemPredictor"

INSTALL_S = 2400
RUN_S = 600
# nothing listens there: a tool that needs the network fails instead of using it
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Run:
    """What a program wrote, and the cases that `LowMemPredictor` worked on in it."""

    stdout: str
    stderr: str
    cases: list[str]


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def programs(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("[Ll]ib/**/site-packages"))

    def run(self, *command: str | Path, **variables: str) -> Run:
        """Run a program of this environment as its user would, without what the tests' own environment sets."""
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.jsonl"
            path = os.pathsep.join([str(self.programs), os.environ["PATH"]])
            own = {"PATH": path, "nnUNet_lowmem_trace": str(trace), **NO_NETWORK, **variables}
            inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
            words = [str(self.programs / command[0]), *map(str, command[1:])]
            done = subprocess.run(words, env={**inherited, **own}, capture_output=True, text=True, timeout=RUN_S)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
            spans = map(json.loads, trace.read_text().splitlines()) if trace.exists() else []
            return Run(done.stdout, done.stderr, list(dict.fromkeys(span["case"] for span in spans)))

    def python(self, program: str, *words: str | Path, **variables: str) -> Run:
        return self.run("python", "-c", program, *words, **variables)


@contextmanager
def environment(name: str, requirements: Sequence[str]) -> Iterator[Environment]:
    """An environment with these packages and this one, as pip installs them."""
    kept = os.environ.get(KEPT)
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as root:
        made = Environment(Path(root) / name)
        if not made.programs.exists():
            venv.create(made.folder, with_pip=True)
        with tempfile.TemporaryDirectory() as source:
            install(made, [*requirements, copy_of_checkout(Path(source))])
        yield made


def install(made: Environment, requirements: Sequence[str]) -> None:
    pip = [str(made.programs / "python"), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_S)
    assert done.returncode == 0, f"{requirements} cannot be installed: {done.stderr[-6000:]}"


def copy_of_checkout(folder: Path) -> str:
    """What pip builds from, elsewhere: building leaves files behind, and takes up those of earlier builds."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "nnunet_lowmem", folder / "nnunet_lowmem", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    return str(folder)


def write_weights(folder: Path, trainer: str, **configuration: Any) -> Path:
    """Write the bundled model as that trainer would have left it: without mirroring, entries of its plans changed."""
    (folder / "fold_0").mkdir(parents=True)
    shutil.copy(DATA / "ct118" / "dataset.json", folder)
    plans = json.loads((DATA / "ct118" / "plans.json").read_text())
    plans["configurations"]["3d_fullres"].update(configuration)
    (folder / "plans.json").write_text(json.dumps(plans))
    checkpoint = torch.load(DATA / "ct118" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint.update(trainer_name=trainer, inference_allowed_mirroring_axes=None)
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_scan(path: Path, spacing: Sequence[float] | None = None) -> Path:
    """Write the middle of the bundled CT, on its 3 mm grid or resampled; the whole of it is the demo's."""
    scan = SimpleITK.ReadImage(str(DATA / "ct_abdomen_3mm.nii.gz"))[20:100, 10:90, 20:100]
    if spacing is not None:
        size = [round(n * old / new) for n, old, new in zip(scan.GetSize(), scan.GetSpacing(), spacing, strict=True)]
        grid = (scan.GetOrigin(), spacing, scan.GetDirection())
        scan = SimpleITK.Resample(scan, size, SimpleITK.Transform(), SimpleITK.sitkLinear, *grid, -1000)
    SimpleITK.WriteImage(scan, str(path))
    return path


def assert_by_stock(run: Run) -> None:
    assert LINE not in run.stderr
    assert run.cases == []


def assert_by_lowmem(run: Run, cases: int = 1) -> None:
    assert LINE in run.stderr
    assert len(run.cases) == cases


def assert_same_labels(expected: Path, actual: Path) -> None:
    first, second = nibabel.load(expected), nibabel.load(actual)
    labels = np.asarray(first.dataobj)
    assert len(np.unique(labels)) > 10, "too little was found for a comparison to mean anything"
    np.testing.assert_array_equal(labels, np.asarray(second.dataobj))
    np.testing.assert_array_equal(first.affine, second.affine)
