"""Cases of one command on a cluster: the way of `predict.runs.predict_cases` where many machines work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nnunet_lowmem.cluster.attempts import Task
from nnunet_lowmem.cluster.connecting import connected
from nnunet_lowmem.cluster.dispatching import Dispatcher
from nnunet_lowmem.cluster.members import Members
from nnunet_lowmem.cluster.splitting import Splitting
from nnunet_lowmem.cluster.tasks import TOKEN, Sent
from nnunet_lowmem.errors import UsageError, WorkerError, WriteError
from nnunet_lowmem.options import OF_CLUSTERS, OPTIONS, Arithmetic
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.lookup import replaced
from nnunet_lowmem.predict.case import case_sizes
from nnunet_lowmem.predict.cases import Outcomes
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.loading import facts_of_job
from nnunet_lowmem.predict.logits import TileNetwork
from nnunet_lowmem.predict.prepared import most_parts
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.volume_jobs import setup_for
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.owned_folders import PARTIAL, make_owned_folder, remove_owned_folder, remove_stale
from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.types import Result
from nnunet_lowmem.volumes.selection import is_remote

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
# what a client hears of cases in this process
_STAYS_HERE = ("on_plan", "on_case", "on_progress", "report")
_OF_STOCK = (
    *("tile_step_size", "use_gaussian", "use_mirroring", "perform_everything_on_device"),
    *("verbose", "verbose_preprocessing"),
)


def predict_cases(
    predictor: Any, jobs: Sequence[Job], setup: Setup, probabilities: bool, outcomes: Outcomes
) -> list[Result]:
    """Let workers predict each job and note how it went.

    Parameters
    ----------
    predictor : LowMemPredictor
    jobs : sequence of Job
        Of files, each with an output.
    setup : Setup
        The predictor's.
    probabilities : bool
        Are written, too.
    outcomes : Outcomes
        Gets to know how each case went.

    Returns
    -------
    list of None
        All that is made is in files.

    Raises
    ------
    UsageError
        If this cannot be done on a cluster, or the workers are not as they have to be.
    WorkerError
        If the scheduler has gone.
    """
    _check(predictor, jobs)
    ways, splitting = Ways(setup), Splitting(str(setup.options.split))
    with outcomes, connected(setup.options) as client, _folders(jobs) as folders:
        arithmetic = ways.arithmetic() if setup.arithmetic is Arithmetic.BFLOAT16 and not ways.is_undecided else None
        sent = _sent(predictor, setup, folders[0], arithmetic)
        model, mixed = Path(sent.model[0]), setup.options.allow_mixed
        members = Members(client, folders, model, setup.device.type, mixed)
        logger.info("cases go to %s", _in_words(client))
        tasks = _tasks(jobs, setup, probabilities)
        dispatched = sent, probabilities, setup.options.worker_timeout_s, outcomes.listeners, splitting
        with Dispatcher(client, members, *dispatched) as dispatcher:
            try:
                for job, report in dispatcher.run(tasks, ways.is_undecided):
                    for done in report.done:
                        outcomes.predicted(StageClock(job.name), done, None)
                    for failed in report.failed:
                        outcomes.note_failed(failed)
            finally:
                for turn in dispatcher.turns:
                    outcomes.note_turn(turn)
    return [None] * len(jobs)


def _in_words(client: Any) -> str:
    try:
        told = client.sync(client.scheduler.identity, n_workers=0, callback_timeout=_ANSWER_S)
    except Exception as error:  # whatever Dask raises where nobody answers
        raise WorkerError(f"the scheduler does not answer: {' '.join(str(error).split())}") from error
    return str(client.dashboard_link if "dashboard" in told.get("services", {}) else client.scheduler.address)


def _check(predictor: Any, jobs: Sequence[Job]) -> None:
    """Refuse what does not reach workers.

    Raises
    ------
    UsageError
    """
    if predictor.came_from is None:
        raise UsageError("workers read the model by themselves: use initialize_from_trained_model_folder")
    if any(job.output is None for job in jobs):
        raise UsageError("workers write files: give an output folder or output files")
    if others := replaced(predictor, *Step):
        raise UsageError(
            f"{', '.join(others)} is replaced in this process, which does not reach the workers of a cluster"
        )
    if not isinstance(predictor.roi, str | os.PathLike | None):
        raise UsageError("workers read masks by themselves: give a file or a folder as roi")


def _sent(predictor: Any, setup: Setup, folder: Path, arithmetic: Arithmetic | None) -> Sent:
    arguments = {name: getattr(predictor, name) for name in _OF_STOCK} | {"allow_tqdm": False}
    arguments["device"] = setup.device.type  # which card is a worker's affair
    for option in OPTIONS:
        if option.name not in (*_STAYS_HERE, *OF_CLUSTERS):
            value = getattr(predictor, option.name)
            arguments[option.name] = os.path.abspath(value) if option.name in ("tmp_dir", "roi") and value else value
    if predictor.workers is not None:  # each has a share, which its limit tells
        arguments["max_ram"] = None
    if setup.options.fast:  # the network's own kernels are among them
        arguments["kernel_threads"] = predictor.kernel_threads or usable_cores()
    model_folder, *how = predictor.came_from
    # as many as this process would take: sums depend on it
    threads = min(TileNetwork(setup).most_threads(), torch.get_num_threads())
    return Sent(type(predictor), (os.path.abspath(model_folder), *how), arguments, threads, arithmetic, folder)


def _everywhere(job: Job) -> Job:
    """Return a job with paths that mean the same in any working folder."""
    files, recipe = job.files, job.recipe
    if files is not None:
        stage, roi = (None if file is None else os.path.abspath(file) for file in (files.stage, files.roi))
        images = [image if is_remote(image) else os.path.abspath(image) for image in files.images]
        job = replace(job, source=replace(files, images=images, stage=stage, roi=roi))
    if recipe is not None:
        outputs, inputs = (
            tuple(Path(os.path.abspath(file)) for file in side) for side in (recipe.outputs, recipe.inputs)
        )
        recipe = replace(recipe, outputs=outputs, inputs=inputs)
    return replace(job, output=None if job.output is None else os.path.abspath(job.output), recipe=recipe)


def _tasks(jobs: Sequence[Job], setup: Setup, probabilities: bool) -> list[Task]:
    """Return one task a case, with its tiles by the header; 0 where these are for a worker to find out."""
    model, tasks = TileNetwork(setup).facts(), []
    for job in jobs:
        facts = None
        with suppress(UsageError):
            facts = facts_of_job(case_sizes(setup_for(setup, job), model), job, probabilities)
        tasks.append(Task(_everywhere(job), 0))
        if facts is not None:
            tasks[-1].size = setup.weights.folds * facts.tiles
            rows = len(facts.grid.starts[facts.grid.roll_axis])
            tasks[-1].may_be_cut, tasks[-1].most_parts = facts.may_be_cut and rows > 1, most_parts(facts.grid)
    return tasks


@contextmanager
def _folders(jobs: Sequence[Job]) -> Iterator[list[Path]]:
    """Give a hidden folder in each folder of outputs, which workers have to see; they go with the command."""
    parents = dict.fromkeys(Path(os.path.abspath(job.output or "")).parent for job in jobs)
    folders: list[Path] = []
    try:
        for parent in parents:
            try:
                folders.append(make_owned_folder(parent, PARTIAL[0]))
                (folders[-1] / TOKEN).write_text(str(folders[-1]))
            except OSError as error:
                raise WriteError(f"no folder can be made in {parent}: {error.strerror or error}") from error
        yield folders
    finally:
        for folder in folders:
            remove_owned_folder(folder)
            remove_stale(folder.parent)  # of workers of this machine that were killed
