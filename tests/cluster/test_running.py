"""What reaches a cluster and what does not, on workers that are threads of this process; others: test_cluster."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from factory import ModelSpec
from images import balls, broken
from model_table import CHANNELS, REGIONS
from oracle import make_predictor, outputs, read_voxels, recorded_names

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import machine
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.cluster import connecting
from nnunet_lowmem.commands.ensemble import ensemble_folders
from nnunet_lowmem.errors import BudgetError, CasesFailedError, UsageError
from nnunet_lowmem.options import chosen
from nnunet_lowmem.predict import prepared
from nnunet_lowmem.predict.case import CaseRun
from nnunet_lowmem.predict.jobs import Files, Job
from nnunet_lowmem.predict.stored import store
from nnunet_lowmem.volumes.mapped import spilled_array

SMALL = {"patch_size": (12, 24, 24)}

# Dask is loaded by no other test of a process: it changes how exceptions are pickled
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(find_spec("distributed") is None, reason="needs Dask")]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    here = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with importlib.import_module("distributed").Client(**here, set_as_default=False) as given:
        yield given


@pytest.fixture
def cases(images) -> list[list[str]]:
    return [images(name) for name in ("head", "small")]


@pytest.fixture
def model(models, cases) -> str:
    return models(ModelSpec(), cases[0])


def test_cases_on_workers_have_the_labels_of_one_process(model, cases, client, tmp_path, monkeypatch):
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    make_predictor(LowMemPredictor, model).predict_from_files(cases, outputs(cases, tmp_path / "one"))
    told: list[Any] = []
    monkeypatch.chdir(tmp_path)  # paths mean the same to workers, wherever these are
    predictor = make_predictor(LowMemPredictor, model, client=client, on_case=told.append, report=True)
    threads = torch.get_num_threads()
    assert predictor.predict_from_files(cases, outputs(cases, Path("many"))) == [None, None]
    assert torch.get_num_threads() == threads
    for file in (tmp_path / "one").glob("*.nii.gz"):
        assert read_voxels(tmp_path / "many" / file.name).tobytes() == read_voxels(file).tobytes()
    assert sorted(report.case for report in told) == ["head", "small"]
    assert recorded_names(tmp_path / "many") == ["head.nii.gz", "small.nii.gz"]
    assert not list((tmp_path / "many").glob(".partial*"))
    page = (tmp_path / "many" / "lowmem_report.html").read_text()
    assert re.search(r"Workers over time.*image/svg.*2 tasks on\s+2 workers\.", page, re.DOTALL)
    assert sorted(turn.task for turn in predictor.run_report.turns) == ["head", "small"]
    predictor.predict_from_files(cases, outputs(cases, Path("many")), overwrite=False)
    assert len(predictor.run_report.skipped) == 2
    page = (tmp_path / "many" / "lowmem_report.html").read_text()
    assert "Workers over time" not in page, "of a run in which nothing was left to do"
    assert client.status == "running"


KINDS: dict[str, tuple[ModelSpec, str, dict[str, Any]]] = {
    "plain": (ModelSpec(**SMALL), "head", {}),
    "regions, transposed": (
        ModelSpec(**SMALL, **REGIONS, transpose_forward=(2, 0, 1), file_ending=".nii"),
        "head_margin",
        {},
    ),
    "folds, mirrored": (ModelSpec(**SMALL, folds=(0, 1), mirror_axes=(2,)), "head", {"folds": (0, 1)}),
    "two channels": (ModelSpec(**SMALL, **CHANNELS, use_mask_for_norm=(True, False)), "head_holes", {}),
    "a box": (ModelSpec(**SMALL), "head_margin", {"bbox": "4:40,:,10:"}),
    "a region": (ModelSpec(**SMALL), "head_margin", {"roi": "roi.nii.gz"}),
    "bfloat16": (ModelSpec(**SMALL), "head", {"fast": "bfloat16"}),
    "read as needed": (ModelSpec(**SMALL, spacing=(5.0, 5.0, 5.0)), "head", {}),
    "not resampled by tables": (ModelSpec(**SMALL, resampling="torch"), "head", {}),
}


SLOW = ["folds, mirrored", "two channels", "a box", "bfloat16", "not resampled by tables"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KINDS])
def test_cases_in_parts_have_the_labels_of_one_process(name, models, images, client, tmp_path, monkeypatch):
    spec, image, given = KINDS[name]
    files, folds, options = images(image), given.get("folds", (0,)), {**given}
    options.pop("folds", None)
    model = models(spec, files)
    if "roi" in options:
        options["roi"] = balls(files[0], tmp_path / options["roi"], 0.25, 0.75)
    kept: list[Path | None] = []
    if name == "regions, transposed":  # as in a folder in RAM: the image is read into RAM, too
        monkeypatch.setattr(machine, "why_nothing_is_spilled", lambda _: "is in RAM")
    if name == "read as needed":
        monkeypatch.setattr(CasePlanning, "keeps_image", False)
        monkeypatch.setattr(CasePlanning, "spill", lambda _: partial(spilled_array, folder=tmp_path))
        monkeypatch.setattr(prepared, "store", lambda case, folder: kept.append(store(case, folder)))
    reports = []
    for folder, more in [("one", {}), ("many", {"client": client, "split": 3})]:
        (tmp_path / folder).mkdir()
        predictor = make_predictor(LowMemPredictor, model, folds, on_case=reports.append, **options, **more)
        predictor.predict_from_files([files], [str(tmp_path / folder / "case")])
    file = f"case{spec.file_ending}"
    assert read_voxels(tmp_path / "many" / file).tobytes() == read_voxels(tmp_path / "one" / file).tobytes()
    assert read_voxels(tmp_path / "one" / file).any()
    turns = [turn.task for turn in predictor.run_report.turns]
    if name == "plain":
        parts = [f"head, part {number} of 3" for number in (1, 2, 3)]
        assert sorted(turns) == sorted(["head, finished", *parts, "head, prepared"])
    one, many = reports
    assert (many.case, many.output) == (one.case, str(tmp_path / "many" / "case"))
    assert many.tiles_of_case == one.tiles_of_case
    assert kept == [None] * (name == "read as needed"), "nothing is stored"
    if name != "bfloat16":  # of which a case on one worker may have to decide first
        assert (many.tiles > one.tiles) is (name != "not resampled by tables")
    left = {path.name for path in (tmp_path / "many").iterdir() if path.suffix not in (".json", ".jsonl")}
    assert left == {file}, "parts and hidden folders are gone"


def test_parts_that_are_refused_fail_their_case_alone(model, cases, client, tmp_path, monkeypatch):
    """What a tile takes is first seen in parts, in several at a time: here it is said to be too much."""

    def refuse(run: CaseRun, *_: Any) -> None:
        raise BudgetError("does not fit: 2 GiB, budget 1 GiB")

    predicted = CaseRun.predicted
    monkeypatch.setattr(
        CaseRun, "predicted", lambda run, *given: (predicted if run.job.piece is None else refuse)(run, *given)
    )
    predictor = make_predictor(LowMemPredictor, model, client=client, split=3)
    with pytest.raises(
        CasesFailedError, match=r"1 of 2 cases failed: case head, .*part [123] of 3: .*budget 1 GiB"
    ) as told:
        predictor.predict_from_files(cases, outputs(cases, tmp_path))
    assert told.value.exit_code == 3
    assert [case.case for case in predictor.run_report.done] == ["small"]
    assert not list(tmp_path.glob("[.]partial*"))


def test_ensembles_on_workers_are_those_of_one_process(model, cases, client, tmp_path, monkeypatch):
    for name, step_size in (("half", 0.5), ("whole", 1.0)):
        (tmp_path / name).mkdir()
        predictor = make_predictor(LowMemPredictor, model, tile_step_size=step_size)
        predictor.predict_from_files(cases, outputs(cases, tmp_path / name), save_probabilities=True)
    monkeypatch.chdir(tmp_path)
    folders = [Path("half"), Path("whole")]
    one = list(ensemble_folders(folders, Path("one"), True))
    many = list(ensemble_folders(folders, Path("many"), True, chosen(client=client)))
    assert [file.name for file in many] == [file.name for file in one] == ["head.nii.gz", "small.nii.gz"]
    for file in one:
        assert read_voxels(tmp_path / "many" / file.name).tobytes() == read_voxels(tmp_path / file).tobytes()
        assert (tmp_path / "many" / file.name.replace(".nii.gz", ".npz")).stat().st_size
    (tmp_path / "whole" / "small.npz").write_bytes(b"PK no zip")
    with pytest.raises(UsageError, match=r"small\.npz is no archive"):
        list(ensemble_folders(folders, Path("many"), False, chosen(client=client)))


def test_how_cases_are_cut_may_be_told(model, cases, client, tmp_path):
    files = cases[:1], outputs(cases[:1], tmp_path)
    for split, told in [("often", "auto, never or a number"), (0, "auto, never or a number"), (-2, "and not '-2'")]:
        with pytest.raises(UsageError, match=told):
            make_predictor(LowMemPredictor, model, client=client, split=split).predict_from_files(*files)
    with pytest.raises(UsageError, match="--split is for clusters"):
        make_predictor(LowMemPredictor, model, split=2).predict_from_files(*files)


def test_only_long_cases_are_cut_by_themselves_and_where_workers_have_nothing_to_do():
    from nnunet_lowmem.cluster.attempts import Task
    from nnunet_lowmem.cluster.splitting import LONG_TILES, Splitting
    from nnunet_lowmem.cluster.tasks import Cutting

    job = Job("case", "out", Files(["case.nii.gz"]))
    long, short = (Task(job, tiles, may_be_cut=True, most_parts=9) for tiles in (LONG_TILES, LONG_TILES - 1))
    auto = Splitting("auto")
    assert auto.cutting(Task(job, LONG_TILES, may_be_cut=True, most_parts=3), 1, 4) == Cutting(3, False)
    assert auto.cutting(Task(job, LONG_TILES, most_parts=3), 1, 4) is None
    assert [auto.cutting(long, cases, 4) for cases in (1, 2, 3)] == [Cutting(4, False), Cutting(2, False), None]
    assert auto.cutting(short, 1, 4) is None
    assert Splitting("never").cutting(long, 1, 4) is None
    assert Splitting("3").cutting(short, 9, 1) == Cutting(3, True)


def test_a_bad_case_costs_itself_and_says_where(model, cases, client, tmp_path):
    cases = [broken(tmp_path, "bad"), cases[1]]
    predictor = make_predictor(LowMemPredictor, model, client=client)
    with pytest.raises(CasesFailedError, match=r"1 of 2 cases failed: case bad, preprocessing: .*\(worker [01], "):
        predictor.predict_from_files(cases, outputs(cases, tmp_path))
    assert [report.case for report in predictor.run_report.done] == ["small"]


def test_what_does_not_reach_workers_is_refused(model, cases, client, tmp_path, monkeypatch):
    class Mine(LowMemPredictor):
        """Overrides what workers could not be told of."""

        def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
            return super().predict_sliding_window_return_logits(input_image)

    files = cases[:1], outputs(cases[:1], tmp_path)
    monkeypatch.setattr(connecting, "_PATIENCE_S", 0.5)
    by_hand = make_predictor(LowMemPredictor, model, client=client)
    by_hand.came_from = None
    for predictor, given, told in [
        (by_hand, files, "workers read the model by themselves"),
        (make_predictor(LowMemPredictor, model, client=client), (cases[:1], None), "workers write files"),
        (make_predictor(Mine, model, client=client), files, "predict_sliding_window_return_logits is replaced"),
        (make_predictor(LowMemPredictor, model, workers=1, scheduler=""), files, "exclude each other: give one"),
        (make_predictor(LowMemPredictor, model, workers=0), files, "--workers must be at least 1, got 0"),
        (make_predictor(LowMemPredictor, model, scheduler="tcp://127.0.0.1:9"), files, "no scheduler answers at tcp"),
        (
            make_predictor(LowMemPredictor, model, scheduler_file=tmp_path / "none"),
            files,
            "none is not there",
        ),
    ]:
        with pytest.raises(UsageError, match=told):
            predictor.predict_from_files(*given)


def test_the_table_shows_what_differs():
    from nnunet_lowmem.cluster.members import _table

    rows = [("this machine", {"torch": "2.1", "numpy": "2.0"}), ("tcp://other:1", {"torch": "2.0", "numpy": "2.0"})]
    assert _table(rows).splitlines() == ["               torch", "this machine   2.1", "tcp://other:1  2.0"]
