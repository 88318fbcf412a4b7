"""Fifty cases in a row leave nothing behind: no memory, no file, no thread, no process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factory import ModelSpec

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.window.rolling import RollingWindow

CHILD = """
import json, os, sys, threading
from pathlib import Path
import psutil, torch
from nnunet_lowmem import LowMemPredictor

options = json.loads(sys.argv[1])
told = []

# when a case begins: the one before is computed, and its files wait to be written beside this one
def tell(progress):
    if (progress.stage, progress.done) != ("preprocessing", 0):
        return
    process = psutil.Process()
    told.append([process.memory_info().rss, threading.active_count(), len(process.children(recursive=True)),
                 process.num_fds()])

predictor = LowMemPredictor(
    device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False, tmp_dir=options["tmp_dir"], on_progress=tell
)
predictor.initialize_from_trained_model_folder(options["model"], [0])
before = sorted(thread.name for thread in threading.enumerate())
predictor.predict_from_files(options["images"], options["output"])
threads = sorted(thread.name for thread in threading.enumerate())
print(json.dumps({"told": told, "left": os.listdir(options["tmp_dir"]), "before": before, "threads": threads}))
"""


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_window_is_gone_when_the_case_is_written(images, models, tmp_path, probabilities):
    files = images("head")
    predictor = LowMemPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(models(ModelSpec(), files), [0])
    windows = {}

    def count(progress) -> None:
        if progress.done not in (0, progress.total):
            return  # looking through all that is alive takes a while
        alive = sum(type(thing) is RollingWindow for thing in gc.get_objects())
        windows[progress.stage] = max(alive, windows.get(progress.stage, 0))

    predictor.on_progress = count
    gc.collect()  # what other tests have left
    gc.disable()
    try:
        predictor.predict_from_files([files], [str(tmp_path / "case")], save_probabilities=probabilities)
    finally:
        gc.enable()
    assert windows["prediction"] == 1
    assert windows["writing"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts file descriptors")
def test_fifty_cases_leave_nothing_behind(images, models, tmp_path):
    files = images("head")
    model = models(ModelSpec(), files)
    for name in ("images", "tmp"):
        (tmp_path / name).mkdir()
    for number in range(51):
        os.link(files[0], tmp_path / "images" / f"case{number:02d}_0000.nii.gz")
    options = {"model": model, "images": str(tmp_path / "images"), "output": str(tmp_path / "out")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps({**options, "tmp_dir": str(tmp_path / "tmp")})],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    told = json.loads(child.stdout.splitlines()[-1])
    assert len(told["told"]) == 51
    after_third, after_fiftieth = told["told"][3], told["told"][50]
    assert after_fiftieth[0] <= 1.05 * after_third[0]
    assert after_fiftieth[1:] == after_third[1:]
    assert told["left"] == []
    # tqdm's monitor is one per process, whoever shows a bar first
    assert [name for name in told["threads"] if name != "tqdm_monitor"] == told["before"]
    assert len(list(Path(options["output"]).glob("case*.nii.gz"))) == 51
