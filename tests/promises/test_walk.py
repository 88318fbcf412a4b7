"""How many files lie between a call and each piece of its work: what a newcomer steps through to follow one case."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from factory import ModelSpec
from oracle import make_predictor

import nnunet_lowmem
from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.nnunet import adapter

PACKAGE = Path(nnunet_lowmem.__file__).parent
# voxels read, resampled, through the network, kernels of the window and of the labels, written, given their name
WORK = {"read_into", "zoom_cubic", "forward", "run", "write_seg", "put"}


def test_one_case_from_files_to_its_label_map_passes_25_files(models, images, tmp_path):
    """A second one: the first has compiled kernels and loaded what is imported late."""
    case = images("small")
    predictor = make_predictor(LowMemPredictor, models(ModelSpec(), case))
    predictor.predict_from_files_sequential([case], [str(tmp_path / "first")])
    passed: dict[str, str] = {}
    done = set()

    def watch(frame: FrameType | None, event: str, _: Any) -> None:
        if frame is None or event != "call" or frame.f_code.co_name not in WORK:
            return
        work = frame.f_code.co_name
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if PACKAGE in file.parents:
                passed.setdefault(file.relative_to(PACKAGE).as_posix(), work)
                done.add(work)
            frame = frame.f_back

    sys.setprofile(watch)
    try:
        predictor.predict_from_files_sequential([case], [str(tmp_path / "second")])
    finally:
        sys.setprofile(None)
    assert done == WORK
    rule = adapter.label_rule(predictor.label_manager)
    labels = "labels/probabilities.py" if rule.by_softmax else "labels/labeller.py"  # the first as nnU-Net 2.5 decides
    assert {"predict/runs.py", "window/rolling.py", labels} <= set(passed)
    assert len(passed) <= 25, passed
