"""Cases on a real scheduler and real workers, each a process of its own: the same labels, and what failures cost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clusters import ENVIRON, left_in, meanwhile, predict, voxels, when
from factory import ModelSpec
from model_table import CHANNELS, REGIONS
from oracle import read_voxels, recorded_names

from nnunet_lowmem.errors import CasesFailedError, UsageError, WorkerError

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("distributed") is None, reason="needs Dask"),
    pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL"),
]


def test_every_kind_of_model_has_the_labels_of_one_process(start, models, images, tmp_path):
    cluster = start("a", "b")
    kinds = {
        "plain": (ModelSpec(), "head", {}),
        "regions, transposed": (ModelSpec(**REGIONS, transpose_forward=(2, 0, 1)), "head_margin", {}),
        "folds, mirrored": (ModelSpec(folds=(0, 1), mirror_axes=(2,)), "head", {"folds": (0, 1)}),
        "two channels": (ModelSpec(**CHANNELS, use_mask_for_norm=(True, False)), "head_holes", {}),
        "probabilities": (ModelSpec(), "small", {"probabilities": True}),
        "fast": (ModelSpec(), "head", {"fast": True}),
        "box": (ModelSpec(), "head", {"bbox": "2:30,:,5:"}),
    }
    for name, (spec, image, options) in kinds.items():
        model, cases = models(spec, images("head" if image == "small" else image)), [images(image)]
        predict(model, cases, tmp_path / "one", **options)
        seen: set[str] = set()
        told = {"on_progress": lambda progress, seen=seen: seen.add(progress.worker.split(" ")[0])}
        predict(model, cases, tmp_path / "many", scheduler_file=cluster.file, **told, **options)
        assert seen & {"a", "b"}, "a worker has done it"
        assert voxels(tmp_path / "many") == voxels(tmp_path / "one"), name
        for file in (tmp_path / "one").glob("*.npz"):
            ours, theirs = (
                np.load(folder / file.name)["probabilities"] for folder in (tmp_path / "one", tmp_path / "many")
            )
            np.testing.assert_array_equal(ours, theirs)
        assert left_in(tmp_path / "many") == []
        for folder in ("one", "many"):
            for file in (tmp_path / folder).iterdir():
                file.unlink()


def test_a_worker_that_is_killed_costs_its_case_a_second_start(start, models, cases, tmp_path):
    cluster = start("a", "b")
    model = models(ModelSpec(patch_size=(8, 16, 16)), cases[0])
    predict(model, cases, tmp_path / "one")
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        cluster.kill(worker)

    predictor = predict(
        model, cases, tmp_path / "many", scheduler_file=cluster.file, on_progress=when("prediction", kill)
    )
    assert killed
    assert voxels(tmp_path / "many") == voxels(tmp_path / "one")
    assert len(predictor.run_report.done) == 3
    assert left_in(tmp_path / "many") == []


def test_a_case_that_loses_two_workers_fails_alone(start, models, cases, tmp_path):
    cluster = start("a", "b", "c")
    model = models(ModelSpec(patch_size=(8, 16, 16)), cases[0])
    large = max(cases, key=lambda files: read_voxels(Path(files[0])).size)
    name = Path(large[0]).name.removesuffix("_0000.nii.gz")
    told: set[str] = set()

    def kill(progress: Any) -> None:
        if progress.case == name and progress.stage == "prediction":
            worker = progress.worker.split(" ")[0]
            if worker not in told:
                told.add(worker)
                cluster.kill(worker)

    with pytest.raises(CasesFailedError, match=rf"1 of 3 cases failed: case {name}, .*worker . .*, then . .* has gone"):
        predict(model, cases, tmp_path / "many", scheduler_file=cluster.file, on_progress=kill, tile_step_size=0.2)
    assert len(told) == 2
    assert len(voxels(tmp_path / "many")) == 2
    cluster.join("d")
    predictor = predict(model, cases, tmp_path / "many", scheduler_file=cluster.file)
    assert [len(predictor.run_report.done), len(predictor.run_report.skipped)] == [1, 2]


def test_the_scheduler_goes_and_the_command_ends_with_what_is_done(start, models, cases, tmp_path):
    cluster = start("a")
    model = models(ModelSpec(patch_size=(8, 16, 16)), cases[0])

    def kill(_: str) -> None:
        cluster.scheduler.kill()

    with pytest.raises(WorkerError, match=r"the scheduler has gone .*--continue_prediction"):
        predict(model, cases, tmp_path / "out", scheduler_file=cluster.file, on_progress=when("prediction", kill))
    there = len(voxels(tmp_path / "out"))
    assert there < 3
    predictor = predict(model, cases, tmp_path / "out")
    assert len(predictor.run_report.skipped) >= there
    assert len(predictor.run_report.done) + len(predictor.run_report.skipped) == 3
    assert left_in(tmp_path / "out") == []


def test_workers_that_are_not_alike_are_refused_unless_they_are_accepted(start, models, cases, tmp_path):
    """Of the other torch there is only what names its version: two of them would be 6 GB."""
    cluster = start()
    cluster.join("old", ONEDNN_MAX_CPU_ISA="AVX2")
    model = models(ModelSpec(), cases[0])
    with pytest.raises(
        UsageError, match=r"(?s)differs from this.*oneDNN\nthis machine +as it is\nworker old +AVX2\n.*--allow-mixed"
    ):
        predict(model, cases, tmp_path / "out", scheduler_file=cluster.file)
    assert voxels(tmp_path / "out") == {}
    # in parts, which are joined though the machines differ
    options = {"scheduler_file": cluster.file, "allow_mixed": True, "split": 2}
    done = predict(model, cases, tmp_path / "out", **options).run_report.done
    assert len(done) == 3
    assert any(case.tiles > case.tiles_of_case for case in done)
    assert all(case.tiles < 2 * case.tiles_of_case for case in done), "the last task has joined and not begun again"
    cluster.kill("old")
    (tmp_path / "torch-0.1.dist-info").mkdir()
    (tmp_path / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    cluster.join("older", PYTHONPATH=os.pathsep.join([str(tmp_path), ENVIRON["PYTHONPATH"]]))
    with pytest.raises(UsageError, match=r"torch\nthis machine +\S+\nworker older +0\.1\n"):
        predict(model, cases, tmp_path / "again", scheduler_file=cluster.file)


def test_threads_are_the_commands_whatever_a_worker_has(start, models, images, tmp_path):
    """As a nanny starts them: OMP_NUM_THREADS=1, by which sums are others."""
    if torch.get_num_threads() < 2:
        pytest.skip("one thread is what a nanny gives")
    cluster = start()
    cluster.join("a", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    model = models(ModelSpec(patch_size=(24, 32, 32)), images("head"))
    predict(model, [images("head")], tmp_path / "one", probabilities=True)
    predict(model, [images("head")], tmp_path / "many", probabilities=True, scheduler_file=cluster.file)
    (ours, theirs) = (next((tmp_path / name).glob("*.npz")) for name in ("one", "many"))
    np.testing.assert_array_equal(np.load(ours)["probabilities"], np.load(theirs)["probabilities"])


def test_a_worker_may_join_late_and_none_may_come(start, models, cases, tmp_path):
    cluster = start()
    model = models(ModelSpec(), cases[0])
    with pytest.raises(UsageError, match=r"no worker for 2 s \(--worker_timeout\)"):
        predict(model, cases, tmp_path / "out", scheduler_file=cluster.file, worker_timeout_s=2)

    def join() -> None:
        time.sleep(3)
        cluster.join("late")

    with meanwhile(join):
        predictor = predict(model, cases, tmp_path / "out", scheduler_file=cluster.file, worker_timeout_s=60)
    assert len(predictor.run_report.done) == 3


def test_what_no_worker_can_hold_is_refused_with_both_numbers_and_others_are_not(start, models, images, tmp_path):
    cluster = start()
    cluster.join("small", "--resources", f"MEMORY={700 * 2**20}")
    cluster.join("smaller", "--resources", f"MEMORY={600 * 2**20}")
    model = models(ModelSpec(labels=60, patch_size=(40, 64, 64)), images("head"))
    with pytest.raises(
        CasesFailedError, match=r"case head does not fit: .*GiB.*budget 0\.68 GiB.*\(worker small, "
    ) as told:
        predict(model, [images("head")], tmp_path / "out", scheduler_file=cluster.file)
    assert told.value.exit_code == 3
    cluster.join("large", "--resources", f"MEMORY={4 * 2**30}")
    time.sleep(5)
    assert len(predict(model, [images("head")], tmp_path / "out", scheduler_file=cluster.file).run_report.done) == 1


def test_a_worker_that_does_not_see_the_output_is_refused(start, models, cases, tmp_path):
    cluster = start()
    (tmp_path / "out").mkdir()
    mounted = f"mount -t tmpfs tmpfs {tmp_path / 'out'} && exec {sys.executable} -m distributed.cli.dask_worker"
    command = ["unshare", "-m", "sh", "-c", f"{mounted} --scheduler-file {cluster.file} --no-nanny --no-dashboard"]
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    with subprocess.Popen(command, env=ENVIRON, stderr=subprocess.DEVNULL, cwd=cluster.folder) as process:
        try:
            with pytest.raises(UsageError, match=r"does not see .*out: images.*storage that all"):
                predict(models(ModelSpec(), cases[0]), cases, tmp_path / "out", scheduler_file=cluster.file)
        finally:
            process.kill()


def test_ctrl_c_ends_the_tasks_and_the_workers_stay(start, models, images, tmp_path):
    cluster = start("a")
    model = models(ModelSpec(patch_size=(8, 16, 16)), images("head"))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(
            model,
            [images("head")],
            tmp_path / "out",
            scheduler_file=cluster.file,
            on_progress=when("prediction", interrupt),
        )
    time.sleep(5)
    assert left_in(tmp_path / "out") == []
    assert voxels(tmp_path / "out") == {}, "the task has ended between two tiles"
    assert len(predict(model, [images("head")], tmp_path / "out", scheduler_file=cluster.file).run_report.done) == 1


def drop(name: str, dask_scheduler: Any = None) -> None:
    """As a scheduler does that has heard nothing for long."""
    address = dask_scheduler.aliases[name]
    dask_scheduler.dropped = asyncio.ensure_future(dask_scheduler.remove_worker(address=address, stimulus_id="silent"))


def test_a_worker_that_is_cut_off_leaves_its_case_when_it_is_back(start, models, images, tmp_path):
    """Stopped, so that the scheduler drops it, and continued while another has its case: one file, made once."""
    cluster = start("a", "b")
    model = models(ModelSpec(patch_size=(8, 16, 16)), images("head"))
    predict(model, [images("head")], tmp_path / "one", tile_step_size=0.25)
    stopped: list[subprocess.Popen] = []

    def stop(worker: str) -> None:
        stopped.append(cluster.workers[worker])
        stopped[0].send_signal(signal.SIGSTOP)
        with import_module("distributed").Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
            client.run_on_scheduler(drop, worker)

    def go_on() -> None:
        while not stopped:
            time.sleep(0.1)
        time.sleep(4)
        stopped[0].send_signal(signal.SIGCONT)

    with meanwhile(go_on):
        followed = when("prediction", stop)
        predict(
            model,
            [images("head")],
            tmp_path / "many",
            scheduler_file=cluster.file,
            on_progress=followed,
            tile_step_size=0.25,
        )
    assert voxels(tmp_path / "many") == voxels(tmp_path / "one")
    time.sleep(3)
    assert left_in(tmp_path / "many") == []
    assert len(recorded_names(tmp_path / "many")) == 1


def test_workers_without_a_limit_and_with_nannies(start, models, images, tmp_path):
    cluster = start()
    fixed = ("--scheduler-file", cluster.file, "--nthreads", "2", "--no-dashboard", "--memory-limit")
    cluster._start("dask_worker", *fixed, "0", "--name", "unlimited", "--no-nanny")
    model = models(ModelSpec(labels=60, patch_size=(40, 64, 64)), images("head"))
    with pytest.raises(CasesFailedError, match=r"head does not fit.*\(worker unlimited\)"):
        predict(model, [images("head")], tmp_path / "out", scheduler_file=cluster.file, max_ram="700M")
    cluster._start("dask_worker", *fixed, "6GiB", "--name", "nanny")
    time.sleep(5)
    predictor = predict(model, [images("head")], tmp_path / "out", scheduler_file=cluster.file, max_ram="64G")
    budget = predictor.run_report.done[0].plan.budget.ram_bytes
    assert budget is None or budget < 0.8 * 6 * 2**30 or budget > 20 * 2**30  # the nanny's pause, or no limit


def test_tls(start, models, images, tmp_path):
    """With certificates of one's own, as Dask spells the flags; without them nobody is let in."""
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run([*made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    flags = ("--protocol", "tls", "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key)
    cluster = start(flags=flags)
    cluster.join("a", *flags)
    model, files = models(ModelSpec(), images("head")), [images("head")]
    with pytest.raises(UsageError, match="no scheduler answers"):
        predict(model, files, tmp_path / "out", scheduler_file=cluster.file)
    options = {"tls_ca_file": cert, "tls_cert": cert, "tls_key": key}
    assert len(predict(model, files, tmp_path / "out", scheduler_file=cluster.file, **options).run_report.done) == 1


def test_two_hundred_small_cases(start, models, images, tmp_path):
    cluster = start("a", "b")
    source = Path(images("small")[0])
    (tmp_path / "in").mkdir()
    cases = []
    for number in range(200):
        cases.append([str(tmp_path / "in" / f"c{number:03d}_0000.nii.gz")])
        os.link(source, cases[-1][0])
    model = models(ModelSpec(), images("head"))
    predictor = predict(model, cases, tmp_path / "out", scheduler_file=cluster.file)
    assert len(predictor.run_report.done) == 200
    assert len(recorded_names(tmp_path / "out")) == 200
    assert left_in(tmp_path / "out") == []


def test_two_commands_at_once_on_one_cluster_and_one_with_its_own_workers(start, models, cases, tmp_path):
    cluster = start("a", "b")
    model = models(ModelSpec(), cases[0])
    predict(model, cases, tmp_path / "one")
    (tmp_path / "in").mkdir()
    for files in cases:
        shutil.copy(files[0], tmp_path / "in")
    program = "from nnunet_lowmem.commands.cli import predict_entry_point as run; raise SystemExit(run())"
    fixed = ["-m", model, "-i", tmp_path / "in", "-f", "0", "-device", "cpu"]
    flags = [["--scheduler-file", cluster.file], ["--scheduler-file", cluster.file, "--split", "2"], ["--workers", "2"]]
    commands = [
        [
            sys.executable,
            "-c",
            f"if __name__ == '__main__':\n    {program}",
            *fixed,
            "-o",
            tmp_path / str(number),
            *more,
        ]
        for number, more in enumerate(flags)
    ]
    running = [subprocess.Popen(list(map(str, command)), env=ENVIRON) for command in commands]
    assert [process.wait(200) for process in running] == [0, 0, 0]
    for number in range(3):
        assert voxels(tmp_path / str(number)) == voxels(tmp_path / "one")
        assert left_in(tmp_path / str(number)) == []
