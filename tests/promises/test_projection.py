"""What is projected holds: real predictions of real models, measured, and under a hard limit of the kernel.

Each runs in a process of its own, since what a process has once taken hides what the next case takes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from images import CT, SUPPORT, read

MIB = 2**20
CHILD = SUPPORT / "projection_child.py"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.timeout(600),
]


@dataclass(frozen=True)
class Run:
    """A model, the shape (x, y, z), spacing and type of its image, and options of the predictor."""

    spec: ModelSpec
    shape: tuple[int, int, int] = (320, 320, 120)
    spacing: tuple[float, float, float] = (1.2, 1.2, 2.5)
    voxels: int = SimpleITK.sitkInt16
    options: dict[str, Any] = field(default_factory=dict)


def ct(**changes) -> ModelSpec:
    common = {"channels": ("CT",), "normalisation": ("CTNormalization",), "features": (4, 6)}
    return ModelSpec(**{**common, "spacing": (3.0, 2.0, 2.0), "patch_size": (32, 64, 64), **changes})


def mr(mask: bool, **changes) -> ModelSpec:
    rules = {"normalisation": ("ZScoreNormalization",) * 3, "use_mask_for_norm": (mask,) * 3}
    return ct(channels=("a", "b", "c"), **rules, **changes)


FOLDS = ct(labels=30, spacing=(5.0, 4.0, 4.0), patch_size=(24, 48, 48), folds=(0, 1, 2), mirror_axes=(0, 1, 2))
MANY = ct(labels=60, spacing=(4.0, 3.0, 3.0), patch_size=(24, 48, 48))
RUNS = {
    "tiny": Run(ct(patch_size=(24, 28, 20)), (60, 50, 40), (3.0, 3.0, 3.0)),
    "few classes": Run(ct(labels=5)),
    "many classes": Run(MANY),
    "three channels": Run(mr(False), (256, 256, 100), (1.4, 1.4, 3.0), SimpleITK.sitkFloat32),
    "three folds, mirrored": Run(FOLDS, options={"folds": [0, 1, 2], "mirroring": True}),
    "fast": Run(MANY, options={"fast": True}),
    "fast, mirrored, three folds": Run(FOLDS, options={"folds": [0, 1, 2], "mirroring": True, "fast": True}),
    "bfloat16": Run(MANY, options={"fast": "bfloat16"}),
    "bfloat16, mirrored, three folds": Run(FOLDS, options={"folds": [0, 1, 2], "mirroring": True, "fast": "bfloat16"}),
    "heads as a whole": Run(ct(labels=12, spacing=(4.0, 3.0, 3.0), patch_size=(24, 48, 48), resampling="torch")),
    "masked": Run(mr(True), (256, 256, 100), (1.4, 1.4, 3.0), SimpleITK.sitkFloat32),
    # nothing is resampled: tiles are normalised as they are read, out of the files or of what is spilled of them
    "masked, on its grid": Run(
        mr(True, spacing=(3.0, 1.4, 1.4), file_ending=".nii"), (256, 256, 100), (1.4, 1.4, 3.0), SimpleITK.sitkFloat32
    ),
    "compressed, on its grid": Run(
        mr(False, spacing=(3.0, 1.4, 1.4)), (256, 256, 100), (1.4, 1.4, 3.0), SimpleITK.sitkFloat32
    ),
    "two-dimensional": Run(ct(labels=6, spacing=(2.0, 2.0), patch_size=(128, 128))),
    "SimpleITKIOWithReorient": Run(ct(labels=5, reader="SimpleITKIOWithReorient")),
    "NibabelIO": Run(ct(labels=5, reader="NibabelIO")),
    "NibabelIOWithReorient": Run(ct(labels=5, reader="NibabelIOWithReorient")),
    "a box": Run(MANY, options={"bbox": "30:75,100:220,80:200"}),
    "a region": Run(MANY, options={"region": True}),
    "regions": Run(ct(labels={"background": 0, "both": [1, 2], "one": [2]}, regions_class_order=(1, 2))),
}


def scan(shape, spacing, voxels) -> SimpleITK.Image:
    """The bundled CT, mirrored until it fills the field of view."""
    source = read(CT)
    array = SimpleITK.GetArrayFromImage(source)
    needed = [int(n * s / step) + 2 for n, s, step in zip(shape, spacing, source.GetSpacing(), strict=True)]
    padding = [(0, max(0, n - size)) for n, size in zip(needed[::-1], array.shape, strict=True)]
    filled = SimpleITK.GetImageFromArray(np.pad(array, padding, mode="symmetric"))
    filled.SetSpacing(source.GetSpacing())
    grid = (shape, SimpleITK.Transform(), SimpleITK.sitkLinear, filled.GetOrigin(), spacing, filled.GetDirection())
    return SimpleITK.Resample(filled, *grid, 1.0, voxels)


@pytest.fixture(scope="module")
def predict(models, tmp_path_factory):
    """Predict a `Run` in a process of its own, once with the same options, and return what it tells."""

    def write_images(name: str, run: Run, shape, spacing) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for channel in range(len(run.spec.channels)):
            file = folder / f"case_{channel:04d}{run.spec.file_ending}"
            SimpleITK.WriteImage(scan(shape, spacing, run.voxels), str(file))
        return folder

    images: dict[str, Path] = {}
    told: dict[str, dict[str, Any]] = {}

    def once(name: str, **options) -> dict[str, Any]:
        key = json.dumps([name, options])
        if key not in told:
            told[key] = in_child(name, **options)
        return told[key]

    def in_child(name: str, cases: int = 1, **options) -> dict[str, Any]:
        run = RUNS[name]
        if name not in images:
            images[name] = write_images("images", run, run.shape, run.spacing)
            small = write_images("small", run, (40, 40, 30), (5.0, 5.0, 5.0))
            models(run.spec, sorted(map(str, small.iterdir())))
            images[f"model of {name}"] = Path(models(run.spec, sorted(map(str, small.iterdir()))))
        root = tmp_path_factory.mktemp("run")
        (root / "images").mkdir()
        for number, path in product(range(cases), images[name].iterdir()):
            os.link(path, root / "images" / path.name.replace("case", f"case{number}"))
        (root / "tmp").mkdir()
        given = {"model": str(images[f"model of {name}"]), "images": str(root / "images"), "output": str(root / "out")}
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps({**given, "tmp_dir": str(root / "tmp"), **run.options, **options})],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return once


def assert_promise_kept(told: dict[str, Any]) -> None:
    assert told["error"] is None
    assert told["left"] == []
    (case,) = told["cases"]
    assert case["measured"] <= case["projected"] <= case["budget"], case
    assert case["projected"] <= 1.25 * case["measured"] + 64 * MIB, case


@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != "tiny")]
)
def test_measured_is_within_projected_and_projected_is_no_exaggeration(predict, name):
    assert_promise_kept(predict(name))


def predict_within(predict, name: str, free: dict[str, Any], share: float, **options: Any) -> dict[str, Any]:
    """Predict once more under a hard limit between the least there is a plan for and what was projected without one."""
    reserved_varies_bytes = 12 * MIB
    most, least = free["cases"][0]["projected"], free["least"]
    told = predict(name, max_ram=int(least + share * (most - least)) + reserved_varies_bytes, limit=True, **options)
    assert_promise_kept(told)
    assert told["outputs"] == free["outputs"]
    return told


@pytest.mark.parametrize(
    "name, shares",
    [
        pytest.param("many classes", [0.0, 0.5, 1.0], marks=pytest.mark.slow),
        pytest.param("three folds, mirrored", [0.0, 0.5, 1.0], marks=pytest.mark.slow),
        pytest.param("bfloat16", [0.0, 1.0], marks=pytest.mark.slow),
    ],
)
def test_spilling_changes_no_label_and_holds_under_a_hard_limit(predict, name, shares):
    free = predict(name)
    assert free["least"] < free["cases"][0]["projected"]
    for share in shares:
        told = predict_within(predict, name, free, share)
        spilled = [name for name, place in told["cases"][0]["placement"].items() if place == "disk"]
        assert bool(spilled) == (share < 1), spilled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked, on its grid", "compressed, on its grid"])
def test_an_input_on_disk_changes_no_label_and_holds_under_a_hard_limit(predict, name):
    told = predict_within(predict, name, predict(name), 0)
    assert told["cases"][0]["placement"]["input"] == "disk"


@pytest.mark.slow
def test_preprocessing_goes_on_with_less_where_memory_is_gone(predict):
    """The plan knows nothing of it: the image goes to disk, the labels stay."""
    free, short = predict("tiny"), predict("tiny", short_of_memory=True)
    assert short["error"] is None
    assert short["outputs"] == free["outputs"]
    (told,) = short["log"]
    assert re.match(r"case case0: RAM ran out \(no room.*\): from .* projected to .*, with the image on disk", told), (
        told
    )


@pytest.mark.slow
def test_arrays_are_planned_as_files_are(predict):
    """Spilled before they are preprocessed; beside the array, which the caller holds."""
    free = predict("three channels", arrays=True)
    assert free["outputs"] == predict("three channels")["outputs"]
    assert free["cases"][0]["placement"]["image"] == "RAM"
    told = predict_within(predict, "three channels", free, 0, arrays=True)
    assert told["cases"][0]["placement"]["image"] == "disk"


def some(lowest: float, highest: float) -> st.SearchStrategy[float]:
    return st.floats(lowest, highest).map(lambda number: round(number, 2))


@st.composite
def any_run(draw: st.DrawFn) -> Run:
    """Shapes up to 11 million voxels, classes, patch sizes, spacings and folds."""
    x, y, z = draw(st.integers(40, 280)), draw(st.integers(40, 280)), draw(st.integers(12, 140))
    model_spacing = (draw(some(2.5, 6)), *[draw(some(2.5, 5))] * 2)
    patch = tuple(4 * draw(st.integers(7, 14)) for _ in range(3))
    folds = tuple(range(draw(st.integers(1, 3))))
    spec = ct(labels=draw(st.integers(2, 90)), spacing=model_spacing, patch_size=patch, folds=folds, mirror_axes=(0, 2))
    spacing = (*[draw(some(0.8, 2))] * 2, draw(some(1, 4)))
    return Run(spec, (x, y, z), spacing, options={"folds": folds, "mirroring": draw(st.booleans())})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_promise_over_random_cases_and_budgets(predict):
    """Each without a budget and within one; a run takes seconds, so an example that fails is not made smaller."""
    number = itertools.count()

    @settings(max_examples=12, deadline=None, database=None, phases=[Phase.generate])
    @given(any_run(), some(0, 1))
    def check(run: Run, share: float) -> None:
        name = f"random {next(number)}"
        RUNS[name] = run
        free = predict(name)
        assert_promise_kept(free)
        predict_within(predict, name, free, share)

    check()


@pytest.mark.slow
def test_the_report_is_made_within_the_same_bounds(predict):
    """From pictures to page under the kernel's limit, with no budget but the projected peak."""
    free = predict("many classes")
    most = free["cases"][0]["projected"]
    told = predict("many classes", max_ram=most + 12 * MIB, limit=True, report=True)
    assert_promise_kept(told)
    assert told["outputs"] == free["outputs"]
    assert told["cases"][0]["stages"]["report"] <= told["cases"][0]["measured"]
    assert told["pages"] == ["lowmem_report.html"]


@pytest.mark.slow
def test_a_process_that_prefetches_is_inside_the_budget(predict):
    alone = predict("few classes", cases=3)
    beside = predict("few classes", cases=3, prefetch=True)
    assert beside["outputs"] == alone["outputs"]
    for one, two in zip(alone["cases"], beside["cases"], strict=True):
        assert two["measured"] <= two["projected"] <= two["budget"]
        assert two["projected"] > one["projected"] + 500 * MIB
    least = max(case["projected"] for case in alone["cases"]) + 50 * MIB
    tight = predict("few classes", cases=3, prefetch=True, max_ram=least)
    assert tight["outputs"] == alone["outputs"]
    assert all(case["measured"] <= case["projected"] <= least for case in tight["cases"])


@pytest.mark.slow
def test_writing_beside_the_next_case_is_inside_the_budget(predict):
    """With a slow writer, so that it goes on while tiles are predicted; in the end where there is no room for both."""
    maps_bytes = 2 * 320 * 320 * 120  # the map and its copy
    beside = predict("few classes", cases=3, slow_writer=True)
    assert beside["error"] is None
    assert len(set(beside["outputs"])) == 1
    assert all(taken > maps_bytes for taken in more_reserved(beside)), "what writing takes counts as in use"
    for case in beside["cases"]:
        assert case["measured"] <= case["projected"] <= case["budget"], case
        assert case["projected"] <= 1.25 * case["measured"] + 64 * MIB, case
    tight = predict("few classes", cases=3, slow_writer=True, max_ram=beside["cases"][0]["projected"] + 12 * MIB)
    assert tight["outputs"] == beside["outputs"]
    assert all(case["measured"] <= case["projected"] <= case["budget"] for case in tight["cases"])
    assert all(taken < maps_bytes for taken in more_reserved(tight)), "it was written first"


def more_reserved(told: dict[str, Any]) -> list[int]:
    """What was in use before each case, beyond what was before the first."""
    first, *others = (case["reserved"] for case in told["cases"])
    return [reserved - first for reserved in others]


@pytest.mark.slow
def test_a_case_below_the_smallest_budget_is_refused_before_work(predict):
    told = predict("tiny", max_ram=100 * MIB)
    assert told["cases"] == []
    assert told["outputs"] == []
    for word in ("case case0 does not fit", "budget 0.0977 GiB", "reserved", "--max_ram"):
        assert word in told["error"]
