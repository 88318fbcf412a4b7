"""Parts of a case on real workers, each a process of its own: what is lost when one of them goes, and what is kept."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from clusters import left_in, predict, voxels
from factory import ModelSpec

from nnunet_lowmem.errors import CasesFailedError, WorkerError

resource = pytest.importorskip("resource")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("distributed") is None, reason="needs Dask"),
    pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL"),
]

MODEL = ModelSpec(patch_size=(8, 16, 16))
# seconds of work for each part
SLOW = {"tile_step_size": 0.25}


def unfinished(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("lowmem_unfinished*")]


# what workers load: labels of a small case are written before anybody could be killed
SLOW_WRITER = """
import time
from nnunet_lowmem.nnunet import label_writing

def slow(*given, write=label_writing.write_segmentation):
    time.sleep(3)
    write(*given)

if label_writing.write_segmentation.__name__ != "slow":  # it is loaded several times
    label_writing.write_segmentation = slow
"""


@pytest.mark.parametrize("step", ["prepare", "part", "finish"])
def test_a_worker_that_is_killed_costs_what_it_did(step, start, models, images, tmp_path):
    cluster = start()
    (tmp_path / "slow_writer.py").write_text(SLOW_WRITER)
    for name in ("a", "b"):
        cluster.join(name, "--preload", tmp_path / "slow_writer.py")
    files = images("head")
    model = models(MODEL, files)
    one = predict(model, [files], tmp_path / "one", **SLOW).run_report.done[0]
    killed: list[str] = []
    tiles: dict[str, int] = {}
    again = {"prepare": "prepared", "finish": "finished"}

    def follow(progress: Any) -> None:
        is_part = ", part" in progress.case
        if progress.stage == "prediction" and is_part:
            tiles[progress.case] = max(progress.done, tiles.get(progress.case, 0))
        now = "part" if is_part else "finish" if tiles else "prepare"
        if now == step and not killed and progress.worker and (progress.done or step != "part"):
            killed.append(progress.worker)
            again["part"] = progress.case.removeprefix("head, ")
            cluster.kill(progress.worker.split(" ")[0])

    options = {"scheduler_file": cluster.file, "split": 2, "on_progress": follow}
    predictor = predict(model, [files], tmp_path / "many", **options, **SLOW)
    (report,) = predictor.run_report.done
    assert killed
    assert voxels(tmp_path / "many") == voxels(tmp_path / "one")
    assert one.tiles < report.tiles < 1.6 * one.tiles, "two parts, and nothing of a part that was done again"
    assert {turn.task.removeprefix("head, ") for turn in predictor.run_report.turns if not turn.is_done} == {
        again[step]
    }
    assert len(predictor.run_report.turns) == 5, "prepared, two parts, finished; one of them twice"
    assert left_in(tmp_path / "many") == unfinished(tmp_path / "many") == []


def test_parts_that_are_done_stay_when_the_scheduler_goes_and_the_case_is_continued(start, models, images, tmp_path):
    cluster = start("a")
    files = images("head")
    model = models(MODEL, files)
    one = predict(model, [files], tmp_path / "one", **SLOW).run_report.done[0]

    def kill(progress: Any) -> None:
        if "part 2" in progress.case and progress.done:
            cluster.scheduler.kill()

    options = {"scheduler_file": cluster.file, "split": 2}
    with pytest.raises(WorkerError, match="the scheduler has gone"):
        predict(model, [files], tmp_path / "many", on_progress=kill, **options, **SLOW)
    assert len(unfinished(tmp_path / "many")) >= 1
    report = predict(model, [files], tmp_path / "many", **SLOW).run_report.done[0]
    assert report.tiles < 0.7 * one.tiles
    assert voxels(tmp_path / "many") == voxels(tmp_path / "one")
    assert unfinished(tmp_path / "many") == []


def test_a_worker_whose_disk_is_full_fails_the_case_and_the_other_part_is_kept(start, models, images, tmp_path):
    """No file of that worker may be longer than some bytes, as on a disk that is full."""
    cluster = start("a")
    files = images("head")
    model = models(MODEL, files)
    one = predict(model, [files], tmp_path / "one", **SLOW).run_report.done[0]
    limited: list[str] = []

    def limit(progress: Any) -> None:
        if "part 2" in progress.case and not limited:
            limited.append(progress.worker)
            resource.prlimit(cluster.workers["a"].pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    options = {"scheduler_file": cluster.file, "split": 2}
    told = r"case head, writing: part 2 of 2: .*labels cannot be kept: .*File too large; make room .*worker a"
    with pytest.raises(CasesFailedError, match=told):
        predict(model, [files], tmp_path / "many", on_progress=limit, **options, **SLOW)
    assert len(unfinished(tmp_path / "many")) == 1
    assert voxels(tmp_path / "many") == {}
    assert left_in(tmp_path / "many") == []
    cluster.join("b")  # and the first one stays, with what it has kept
    resource.prlimit(cluster.workers["a"].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = predict(model, [files], tmp_path / "many", **options, **SLOW).run_report.done[0]
    assert report.tiles < 0.8 * one.tiles, "part 1 is not computed again"
    assert voxels(tmp_path / "many") == voxels(tmp_path / "one")
    assert unfinished(tmp_path / "many") == []


def test_a_part_that_fails_while_another_runs_fails_its_case(start, models, images, tmp_path):
    cluster = start("a", "b")
    files = images("head")
    model = models(MODEL, files)
    failing: list[str] = []

    def limit(progress: Any) -> None:
        if "part 1 of 2" in progress.case and "head," in progress.case and not failing:
            failing.append(progress.worker.split(" ")[0])
            worker = cluster.workers[failing[0]]
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    options = {"scheduler_file": cluster.file, "split": 2, "on_progress": limit}
    with pytest.raises(CasesFailedError, match=r"1 of 1 cases failed: case head, writing: part 1 of 2: ") as told:
        predict(model, [files], tmp_path / "many", **options, **SLOW)
    assert told.value.exit_code == 1
    assert left_in(tmp_path / "many") == []
