"""A scheduler and workers in processes of their own, and what tests of them share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from oracle import make_predictor, read_voxels

from nnunet_lowmem import LowMemPredictor

ENVIRON = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False",
}


class Cluster:
    """A scheduler and workers, by name, in processes of their own."""

    def __init__(self, folder: Path, stack: ExitStack, flags: Sequence[Any]) -> None:
        self.folder, self.file, self._stack = folder, folder / "scheduler.json", stack
        self.workers: dict[str, subprocess.Popen] = {}
        fixed = ("--scheduler-file", self.file, "--port", "0", "--no-dashboard")
        self.scheduler = self._start("dask_scheduler", *fixed, *flags)
        until = time.monotonic() + 30
        while not self.file.exists():
            assert time.monotonic() < until, "no scheduler"
            time.sleep(0.1)

    def _start(self, program: str, *flags: Any, **environ: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *map(str, flags)]
        with (self.folder / f"{program}.log").open("a") as log:
            process = subprocess.Popen(command, env={**ENVIRON, **environ}, stdout=log, stderr=log, cwd=self.folder)
        self._stack.callback(self._end, process)
        return process

    def _end(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()

    def join(self, name: str, *flags: Any, **environ: str) -> None:
        fixed = ("--scheduler-file", self.file, "--name", name, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        self.workers[name] = self._start("dask_worker", *fixed, *flags, **environ)

    def kill(self, name: str) -> None:
        self.workers[name].kill()
        self.workers[name].wait()


def predict(
    model: str, cases: list[list[str]], folder: Path, folds: Any = (0,), probabilities: bool = False, **options: Any
) -> LowMemPredictor:
    folder.mkdir(exist_ok=True)
    predictor = make_predictor(LowMemPredictor, model, folds, **options)
    outputs = [str(folder / Path(files[0]).name.removesuffix("_0000.nii.gz")) for files in cases]
    predictor.predict_from_files(cases, outputs, save_probabilities=probabilities, overwrite=False)
    return predictor


def voxels(folder: Path) -> dict[str, bytes]:
    return {file.name: read_voxels(file).tobytes() for file in sorted(folder.glob("*.nii.gz"))}


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".partial", "lowmem_partial"))]


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def when(stage: str, action: Callable[[str], None]) -> Callable[[Any], None]:
    """Do something once, when a case is in that stage; it is told the worker."""
    done: list[str] = []

    def follow(progress: Any) -> None:
        if progress.stage == stage and not done and progress.worker:
            done.append(progress.worker)
            action(progress.worker.split(" ")[0])

    return follow
