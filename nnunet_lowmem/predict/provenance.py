"""With what a label map was made: told in the records beside it, and in the files of stores (docs/records.md)."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.network import choices
from nnunet_lowmem.nnunet import frames, model_files
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.options import OF_VOLUMES, OPTIONS, Arithmetic, Options
from nnunet_lowmem.predict.jobs import Files, Job
from nnunet_lowmem.predict.outcomes import LabelVolume
from nnunet_lowmem.predict.records import content, stated, without_secrets
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.types import Place

_PACKAGES = ("nnunet-lowmem", "nnunetv2", "torch", "numpy", "SimpleITK", "nibabel")
# options on which labels depend
_OF_LABELS = (*OF_VOLUMES, "bbox", "accept_nan", "fast", "output_grid", "probabilities_dtype")
# larger files are not read once more
_CHECKED_BYTES = 2**32
# options that cannot be written down
_NOT_TOLD = ("client", "on_plan", "on_case", "on_progress")
#: What nnU-Net's reader of pictures gives as the spacing of an axis that they do not have.
_NO_SPACING = 999.0
_MM3_PER_ML = 1000.0


def label_volumes(voxels: Mapping[int, int], setup: Setup, properties: Mapping[str, Any]) -> tuple[LabelVolume, ...]:
    """Return the labels of a map with their names and volumes; `voxels` of each label that is there."""
    names: dict[int, str] = {}
    spacing: list[float] = []
    # of somebody's own kind of labels or reader: what cannot be told must not cost the case
    with suppress(Exception):
        names = model_files.label_names(setup.dataset_json)
    with suppress(Exception):
        spacing = [float(step) for step in properties["spacing"]]
    voxel_ml = None
    if len(spacing) == 3 and _NO_SPACING not in spacing:
        voxel_ml = math.prod(spacing) / _MM3_PER_ML
    return tuple(
        LabelVolume(
            label, names.get(label, f"label {label}"), count, None if voxel_ml is None else round(count * voxel_ml, 6)
        )
        for label, count in sorted(voxels.items())
    )


def of_run(setup: Setup) -> dict[str, Any]:
    """Return what is the same for all cases of a run, as JSON-like data: versions, machine, model and options."""
    files, known = setup.weights.checkpoints, choices.machine()
    told = [option.name for option in OPTIONS if option.name not in _NOT_TOLD]
    return {
        "versions": _versions(),
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else setup.device.type,
            "processor": known["capability"],
            "threads": known["threads"],
        },
        "model": {"folder": str(files[0].parent.parent.absolute()) if files else None, **_model(setup)},
        "settings": _settings(setup, told),
    }


def of_labels(setup: Setup) -> dict[str, Any]:
    """Return what labels depend on, as JSON-like data, for files that go out of the house: no paths of this machine."""
    return {
        "versions": _versions(),
        "machine": {"device": setup.device.type},
        "model": _model(setup),
        "settings": _settings(setup, _OF_LABELS),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version_of(package) for package in _PACKAGES}}


def _model(setup: Setup) -> dict[str, Any]:
    plans = setup.plans_manager.plans
    return {
        "dataset": plans.get("dataset_name"),
        "plans": plans.get("plans_name"),
        "configuration": setup.memo.configuration,
        "trainer": setup.trainer_name,
        "checkpoints": [os.path.join(file.parent.name, file.name) for file in setup.weights.checkpoints],
        "patch_size": list(setup.patch_size),
    }


def _settings(setup: Setup, names: Iterable[str]) -> dict[str, Any]:
    """Return how the model is used, with those of the named options that have another value than by default."""
    options = {name: _plain(getattr(setup.options, name)) for name in names}
    if setup.bbox is not None:
        options["bbox"] = _plain(setup.bbox)
    return {
        "folds": setup.weights.folds,
        "mirrored_axes": list(setup.mirrored_axes),
        "tile_step_size": setup.tile_step_size,
        "gaussian": setup.use_gaussian,
        **{name: value for name, value in options.items() if value != _plain(getattr(Options, name))},
    }


def _plain(value: Any) -> Any:
    """Return the value of an option as it is told: an array, of a mask, by its shape."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    shape = getattr(value, "shape", ())
    return f"array of shape {'x'.join(map(str, shape))}" if shape else str(value)


@dataclass
class Made:
    """One case that is computed, with all that is told of how.

    Attributes
    ----------
    setup, job, clock
    arithmetic : Arithmetic
        In which the network was run.
    plan : Plan
    tiles : dict
        As of `Predicted`.
    labels : tuple of LabelVolume
    properties : dict
        nnU-Net's, of what is written.
    inputs : list
        `states` of the files that are read, before they were.
    """

    setup: Setup
    job: Job
    clock: StageClock
    arithmetic: Arithmetic
    plan: Plan
    tiles: Mapping[str, int]
    labels: tuple[LabelVolume, ...]
    properties: dict[str, Any]
    inputs: list[list[str | int]]
    _writes_since: float = field(default_factory=time.perf_counter)

    def begin_writing(self) -> None:
        """Note that the files of the case are being written from now on."""
        self._writes_since = time.perf_counter()

    def told(self) -> dict[str, Any]:
        """Return what a record tells beside what it is about; files of the model and images are read for it."""
        writing_s = self.clock.seconds.get("writing", 0.0) + time.perf_counter() - self._writes_since
        run = of_run(self.setup)
        run["model"]["files"] = self._model_contents()
        return {
            "case": self.job.name,
            **run,
            "images": self._images(),
            "geometry": self._geometry(),
            "tiles": dict(self.tiles),
            **({"joined": True} if self.job.piece is not None else {}),
            "labels": [vars(label) for label in self.labels],
            "seconds": {name: round(s, 3) for name, s in (self.clock.seconds | {"writing": writing_s}).items()},
            "memory": self._memory(),
        }

    def _geometry(self) -> dict[str, Any]:
        backward = self.setup.plans_manager.transpose_backward
        shape = self.properties["shape_before_cropping"]
        return {
            "shape": [int(shape[axis]) for axis in backward],
            "spacing_mm": [float(step) for step in self.properties["spacing"]],
            "place": [np.asarray(part).tolist() for part in frames.place_of(self.properties)],
            "network_spacing_mm": [float(step) for step in self.setup.configuration_manager.spacing],
        }

    def _memory(self) -> dict[str, Any]:
        """Return limits, what was projected and what was measured, in bytes, of each place."""
        peaks = {} if self.clock.sampler is None else self.clock.sampler.peaks_bytes()
        found: dict[str, Any] = {
            place.value: {"limit": self.plan.budget.limit(place), "projected": self.plan.projected_bytes(place)}
            for place in Place
        }
        found[Place.RAM.value] |= {"peak": max(peaks.values(), default=None), "peak_by_stage": peaks}
        if self.setup.device.type == "cuda":
            # of all cases of this process so far: a client may count by the same numbers, which are not set back
            found[Place.VRAM.value]["peak_so_far"] = torch.cuda.max_memory_allocated(self.setup.device)
        return found

    def _images(self) -> list[dict[str, Any]]:
        """Return what was read, channels first; with a checksum, but of what is not read as a whole."""
        files = self.job.files
        if files is None:
            return []
        roles = [*(("image", file) for file in files.images), ("previous stage", files.stage), ("roi", files.roi)]
        return [self._image(role, file, files) for role, file in roles if file is not None]

    def _image(self, role: str, file: str, files: Files) -> dict[str, Any]:
        told: dict[str, Any] = {"role": role, "path": without_secrets(file)}
        path = Path(file)
        if not path.is_file():  # a store, or an address
            return told
        told |= {"path": str(path.absolute())}
        if stated([path])[:1] in [[state] for state in self.inputs]:  # else it is another file by now
            told |= {"bytes": path.stat().st_size}
            if files.selection is None and told["bytes"] <= _CHECKED_BYTES:
                told |= {"checksum": content(path)[1]}
        return told

    def _model_contents(self) -> dict[str, list[int | str]]:
        """Return size and checksum of each file that the model was read from, as far as it is there and the same."""
        memo, found = self.setup.memo, dict[str, list[int | str]]()
        for file, state in memo.read.items():
            if stated([file]) == [state] and len(state) > 1:
                if file not in memo.checksums:
                    memo.checksums[file] = str(content(file)[1])
                found["/".join(file.parts[-2:] if file.suffix == ".pth" else file.parts[-1:])] = [
                    state[1],
                    memo.checksums[file],
                ]
        return found
