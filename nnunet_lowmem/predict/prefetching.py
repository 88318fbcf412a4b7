"""Preprocess the next case in a supervised process while the current one is predicted.

The array comes over as a file in the temporary folder, so that nothing large is pickled and ``/dev/shm`` is not used. A
worker that stalls or dies is replaced once by a fresh one; where no process can be started, the case is preprocessed in
this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.preprocessing.case import preprocess_case
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.system.stalls import WorkerLimits
from nnunet_lowmem.system.worker_child import Report
from nnunet_lowmem.system.workers import JobError, Worker, WorkerStartError
from nnunet_lowmem.types import PreprocessedCase
from nnunet_lowmem.volumes.formats import read_header

logger = logging.getLogger(__name__)

#: Stock's preprocessing takes 15 s for 512 x 512 x 250.
VOXELS_PER_HOUR = 2**28


class Prefetcher:
    """At most one worker, one case ahead, once it has been released; to be closed.

    A worker is ended after ``worker_timeout_s`` seconds without progress; with 0 never, nor for being busy too long.

    Parameters
    ----------
    jobs : sequence of Job
        What is to be predicted, in this order; the worker preprocesses any of it but the first.
    setup : Setup
        Of the first case; not kept.
    folder : Path
        Temporary folder for the arrays.
    """

    def __init__(self, jobs: Sequence[Job], setup: Setup, folder: Path) -> None:
        self.jobs = jobs
        model_file = folder / "model.pkl"
        model_file.write_bytes(pickle.dumps((setup.plans_manager, setup.configuration_manager, setup.dataset_json)))
        self._argument = {
            "model": model_file,
            "folder": folder,
            "threads": max(1, setup.kernel_threads // 2),
            "accept_nan": setup.options.accept_nan,
        }
        self._library = counted_by(setup.plans_manager.image_reader_writer_class)
        self._stall_s = setup.options.worker_timeout_s
        self._read_files: list[Path] = []
        self._is_released = False
        self._following: Job | None = None
        self._job: Job | None = None
        self._worker: Worker[dict[str, Any], dict[str, str]] | None = None

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._job = None

    def release(self) -> None:
        """Let the worker begin, with the case after the one that was loaded last."""
        self._is_released = True
        self._start_following()

    def load(self, job: Job, here: Callable[[], PreprocessedCase]) -> PreprocessedCase:
        """Return the preprocessed case, from the worker if that has it, else of ``here()``; the worker goes on.

        Raises
        ------
        WorkerError
            If the job failed in the worker, and in a fresh one where another try made sense.
        """
        place = next(number for number, other in enumerate(self.jobs) if other is job)
        self._following = self.jobs[place + 1] if place + 1 < len(self.jobs) else None
        try:
            case = self._take(job, here)
        except Exception:
            self._start_following()  # a case that fails costs the next one nothing
            raise
        self._start_following()
        return case

    def _start_following(self) -> None:
        if self._following is not None and self._is_released:
            self._start(self._following)

    def _start(self, job: Job) -> None:
        """Begin with `job` in the background, if it is one of files and a process can be started."""
        self.close()
        if job.files is None:
            return
        argument = {**self._argument, "files": (job.files.images, job.files.stage)}
        limits = self._limits(job.files.images)
        try:
            self._worker = Worker(preprocess_to_files, argument, case=job.name, limits=limits)
            self._job = job
        except WorkerStartError as error:
            logger.warning("%s; preprocessing goes on in this process", error)

    def _limits(self, images: Sequence[str]) -> WorkerLimits:
        """No total limit below an hour, and an hour per `VOXELS_PER_HOUR`: a hundred times what is usual."""
        if self._stall_s == 0:
            return WorkerLimits(0, 0)
        voxels = 0
        with contextlib.suppress(UsageError):  # the worker will tell
            voxels = max(read_header(file, self._library).voxels for file in images)
        return WorkerLimits(self._stall_s, 3600 * max(1.0, voxels / VOXELS_PER_HOUR))

    def _take(self, job: Job, here: Callable[[], PreprocessedCase]) -> PreprocessedCase:
        if self._worker is None or self._job is not job:
            return here()
        try:
            return self._read(self._worker.result())
        except JobError as error:
            if error.original is not None:
                raise error.original from error
            if not error.retryable:
                raise
            logger.warning("%s; trying once more in a fresh worker", error)
        self._start(job)
        return here() if self._worker is None else self._read(self._worker.result())

    def _read(self, paths: dict[str, str]) -> PreprocessedCase:
        """Map the image; its file goes with the mapping, on Windows when the next one is read."""
        image = np.load(paths["image"], mmap_mode="r")
        previous_stage, properties = pickle.loads(Path(paths["properties"]).read_bytes())
        self._read_files += map(Path, paths.values())
        self._read_files = [path for path in self._read_files if not _is_removed(path)]
        return PreprocessedCase(image, previous_stage, properties)


def preprocess_to_files(argument: dict[str, Any], report: Report) -> dict[str, str]:
    """Preprocess one case and leave it in files; runs in the worker."""
    report("preprocessing")
    plans_manager, configuration_manager, dataset_json = pickle.loads(argument["model"].read_bytes())
    files, previous_stage = argument["files"]
    image_path = argument["folder"] / f"case-{os.getpid()}.npy"
    properties_path = image_path.with_suffix(".pkl")

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        return np.lib.format.open_memmap(image_path, mode="w+", dtype=dtype, shape=shape)

    case = preprocess_case(
        files,
        previous_stage,
        plans_manager,
        configuration_manager,
        dataset_json,
        threads=argument["threads"],
        accept_nan=argument["accept_nan"],
        allocate=allocate,
    )
    report("handing over")
    if not isinstance(case.image, np.memmap):  # a preprocessor that is not nnU-Net's own allocates by itself
        np.save(image_path, np.asarray(case.image))
    properties_path.write_bytes(pickle.dumps((case.previous_stage, case.properties)))
    return {"image": str(image_path), "properties": str(properties_path)}


def _is_removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.unlink()
    return not path.exists()
