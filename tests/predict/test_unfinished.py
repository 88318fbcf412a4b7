"""A run that was ended in the middle of a case goes on behind the planes that were final, with the same labels."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from images import SUPPORT, balls
from model_table import REGIONS
from oracle import make_predictor, predict_ours
from placing import finest_columns, straight_to_file

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import planner
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.labels.counting import counted
from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.predict import unfinished
from nnunet_lowmem.predict.outcomes import CaseReport

SMALL = {"patch_size": (12, 24, 24)}
MODELS: dict[str, tuple[ModelSpec, str, dict[str, Any]]] = {
    "cropped, transposed": (ModelSpec(**SMALL, transpose_forward=(1, 2, 0)), "head_margin", {}),
    "regions": (ModelSpec(**SMALL, **REGIONS, transpose_forward=(2, 0, 1)), "head_margin", {}),
    "a box": (ModelSpec(**SMALL), "head_margin", {"bbox": "4:40,:,10:"}),
}


class Ended(BaseException):
    """As an interruption: nobody handles it."""


def read_voxels(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("lowmem_unfinished"))


def predict(
    model: str,
    files: list[str],
    output: Path,
    ends_at: int = -1,
    overwrite: bool = False,
    folds: tuple[int, ...] = (0,),
    **options: Any,
) -> tuple[int, CaseReport | None]:
    """Return how many tiles there were to do, and what is told at the end."""
    reports: list[CaseReport] = []
    totals: list[int] = []

    def end(progress: Any) -> None:
        if progress.stage == "prediction":
            totals.append(progress.total)
            if progress.done == ends_at:
                raise Ended

    predictor = make_predictor(LowMemPredictor, model, folds, on_case=reports.append, on_progress=end, **options)
    try:
        predict_ours(predictor, [files], [str(output)], overwrite=overwrite)
    except Ended:
        assert ends_at >= 0
    return totals[-1], reports[0] if reports else None


@pytest.mark.parametrize(
    "name, columns, ending, leaves",
    [
        ("cropped, transposed", True, ".nii.gz", False),
        ("regions", False, ".nii", False),
        ("a box", False, ".nii.gz", True),
        ("cropped, transposed", True, ".nii", True),
    ],
)
def test_continues_behind_what_was_final(name, columns, ending, leaves, images, models, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(label_writing, "STREAMED_FROM_BYTES", 0)
    if leaves:
        monkeypatch.setattr(planner, "placements", straight_to_file)
    spec, image, options = MODELS[name]
    spec = replace(spec, file_ending=ending)
    files = images(image)
    model = models(spec, files)
    if name != "cropped, transposed":  # between two balls there is nothing to do, behind the first one row is left
        options = options | {"roi": balls(files[0], tmp_path / "balls.nii.gz", 0.25, 0.75)}
    all_tiles, _ = predict(model, files, tmp_path / "whole", **options)
    assert left_in(tmp_path) == []
    if columns:
        monkeypatch.setattr(planner, "placements", finest_columns)
        of_case = all_tiles
        all_tiles, _ = predict(model, files, tmp_path / "columns", **options)
        assert all_tiles > of_case
    ended = random.Random(name).randint(all_tiles // 2, all_tiles - 1)
    predict(model, files, tmp_path / "case", ended, **options)
    assert len(left_in(tmp_path)) == 1
    assert not (tmp_path / f"case{ending}").exists()
    left, _ = predict(model, files, tmp_path / "case", 2, **options)  # ended once more
    assert left < all_tiles
    if columns:
        monkeypatch.setattr(planner, "placements", straight_to_file)  # another budget: planes are not cut again
    again, report = predict(model, files, tmp_path / "case", **options)
    assert again <= left
    assert report is not None
    assert report.tiles == again
    assert (report.plan.placement.label_map is None) == leaves
    assert report.tiles_of_case == all_tiles or options or columns
    labels = read_voxels(tmp_path / f"case{ending}")
    np.testing.assert_array_equal(labels, read_voxels(tmp_path / f"whole{ending}"))
    assert {label.value: label.voxels for label in report.labels} == counted(labels)
    assert left_in(tmp_path) == []


def test_a_long_case_of_several_folds_is_computed_in_parts(images, models, tmp_path, monkeypatch):
    files, folds = images("head_margin"), (0, 1)
    model = models(ModelSpec(patch_size=(8, 32, 32), folds=folds), files)
    at_once, _ = predict(model, files, tmp_path / "whole", folds=folds)
    assert left_in(tmp_path) == []
    monkeypatch.setattr(unfinished, "PART_S", 1e-6)
    assert predict(model, files, tmp_path / "cheap", 0, folds=folds)[0] == at_once, "cuts would cost more than a fifth"
    monkeypatch.setattr(unfinished, "_SHARE", 0.5)
    assert predict(model, files, tmp_path / "once", 0, folds=folds, overwrite=True)[0] == at_once, "nobody continues it"
    in_parts, report = predict(model, files, tmp_path / "parts", folds=folds)
    assert report is not None
    assert at_once < in_parts == report.tiles < 1.5 * at_once
    assert report.tiles_of_case == at_once
    np.testing.assert_array_equal(read_voxels(tmp_path / "parts.nii.gz"), read_voxels(tmp_path / "whole.nii.gz"))
    predict(model, files, tmp_path / "case", in_parts - 2, folds=folds)
    left, report = predict(model, files, tmp_path / "case", folds=folds)
    assert report is not None
    assert left < 0.6 * in_parts, "the end of a part is kept, however soon it comes"
    np.testing.assert_array_equal(read_voxels(tmp_path / "case.nii.gz"), read_voxels(tmp_path / "whole.nii.gz"))
    assert left_in(tmp_path) == []


def test_what_does_not_belong_to_the_case_is_not_continued(images, models, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    (source,) = images("head")
    file = tmp_path / "in_0000.nii.gz"
    file.write_bytes(Path(source).read_bytes())
    files, spec = [str(file)], ModelSpec(**SMALL)
    model, other = models(spec, [source]), models(replace(spec, labels=6), [source])
    all_tiles, _ = predict(model, files, tmp_path / "case", -2)
    (tmp_path / "case.nii.gz").unlink()
    predict(model, files, tmp_path / "case", all_tiles - 1)
    (kept,) = (tmp_path / name for name in left_in(tmp_path))
    data = kept.read_bytes()

    def tiles(model: str = model, **options: Any) -> int:
        """How many there are to do, if that file lies there."""
        total, _ = predict(model, files, tmp_path / "case", 0, **options)
        kept.write_bytes(data)
        return total

    whole_box, of_box = {"bbox": ":30,:,:"}, predict(model, files, tmp_path / "box", 0, bbox=":30,:,:")[0]
    left = tiles()
    assert left < all_tiles / 2
    assert tiles(other) == all_tiles
    assert tiles(tile_step_size=0.9) == predict(model, files, tmp_path / "step", 0, tile_step_size=0.9)[0]
    assert tiles(**whole_box) == of_box
    assert tiles(overwrite=True) == all_tiles
    for damage in (data[: len(data) // 2], data[:-1], data[:-9] + bytes(9), data + b"more"):
        kept.write_bytes(damage)
        assert left <= tiles() <= all_tiles
    for place in (0, 8, 16):  # in the number of planes, that of bytes, the checksum
        line = data.index(b"\n") + 1
        kept.write_bytes(data[: line + place] + bytes([data[line + place] ^ 1]) + data[line + place + 1 :])
        assert tiles() == all_tiles
    kept.write_bytes(data[:-1])  # but for the last chunk all is whole
    assert tiles() < all_tiles
    kept.write_bytes(data[:80] + bytes(200) + data[280:])
    assert tiles() == all_tiles
    SimpleITK.WriteImage(SimpleITK.ReadImage(source) * 0.5, str(file))
    assert tiles() == all_tiles


def test_planes_that_are_gone_meanwhile_fail_the_case(images, models, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    files = images("head")
    model = models(ModelSpec(**SMALL), files)
    predict(model, files, tmp_path / "case", predict(model, files, tmp_path / "whole")[0] - 1)

    def remove(self: Any, part: Any, columns: Any, seconds: float) -> Any:
        for name in left_in(tmp_path):
            (tmp_path / name).unlink()
        return columns

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "counts", remove)
        with pytest.raises(CasesFailedError, match=r"held [\d,]+ labelled voxels .* holds 0 labelled .* again"):
            predict(model, files, tmp_path / "case")
    assert not (tmp_path / "case.nii.gz").exists()
    predict(model, files, tmp_path / "case")
    np.testing.assert_array_equal(read_voxels(tmp_path / "case.nii.gz"), read_voxels(tmp_path / "whole.nii.gz"))


def test_a_disk_that_is_full_costs_a_warning(images, models, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "flush", full)
    files = images("head")
    predict(models(ModelSpec(**SMALL), files), files, tmp_path / "case")
    assert [record.message for record in caplog.records if "labels cannot be kept" in record.message]
    assert (tmp_path / "case.nii.gz").exists()
    assert left_in(tmp_path) == []


KILLED = """
import sys
import time
import torch
from oracle import make_predictor, predict_ours
from placing import finest_columns
from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.predict import unfinished

unfinished.EVERY_S = 0.0
model, file, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # bits may depend on them, and labels are never of two kinds of run
def tell(progress):
    time.sleep(0.02 * (progress.stage == "prediction"))
    print(progress.stage, progress.done, flush=True)
predict_ours(make_predictor(LowMemPredictor, model, on_progress=tell), [[file]], [output])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_process_that_was_killed_is_continued_by_another(images, models, tmp_path):
    files = images("head")
    model = models(ModelSpec(**SMALL), files)
    all_tiles, _ = predict(model, files, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, model, *files, str(tmp_path / "case"), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=SUPPORT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("prediction") and int(line.split()[1]) > all_tiles * 0.7:
                time.sleep(random.random() * 0.02)
                process.kill()
    assert len(left_in(tmp_path)) == 1
    assert predict(model, files, tmp_path / "case")[0] < all_tiles
    np.testing.assert_array_equal(read_voxels(tmp_path / "case.nii.gz"), read_voxels(tmp_path / "whole.nii.gz"))
    assert left_in(tmp_path) == []
