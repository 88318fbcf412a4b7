"""Cases in a row, each planned beside what else goes on: the worker of the next cases, the files of the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.helpers import empty_cache

from nnunet_lowmem.budget.arrays import WORKER_BYTES
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.budget.machine import vram_limit
from nnunet_lowmem.budget.planner import closest_plan
from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.labels import heads
from nnunet_lowmem.labels.counting import counted
from nnunet_lowmem.nnunet import adapter, label_writing, stock_calls
from nnunet_lowmem.nnunet.read_by import writer_of
from nnunet_lowmem.predict.case import CaseRun, Predicted
from nnunet_lowmem.predict.cases import Outcomes
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.loading import Load, facts_of_job, load
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.predict.pending_write import PendingWrite
from nnunet_lowmem.predict.prefetching import Prefetcher
from nnunet_lowmem.predict.provenance import Made, label_volumes
from nnunet_lowmem.predict.records import stated
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.unfinished import forget, forget_pieces
from nnunet_lowmem.predict.volume_jobs import setup_for
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.system import signals
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.system.owned_folders import temporary_folder
from nnunet_lowmem.types import Place, PreprocessedCase, Result

logger = logging.getLogger(__name__)


def predict_cases(
    jobs: Iterable[Job],
    setup: Callable[[], Setup],
    probabilities: bool,
    outcomes: Outcomes,
    *,
    may_prefetch: bool = False,
    load: Load = load,
) -> list[Result]:
    """Predict each job and note how it went.

    Parameters
    ----------
    jobs : iterable of Job
    setup : callable
        Returns the `Setup` of now; asked for each case.
    probabilities : bool
        Are wanted, too.
    outcomes : Outcomes
        Gets to know how each case went.
    may_prefetch : bool
        Preprocess the next case in a process meanwhile, if that is wished and there is room for it.
    load : Load
        Reads and preprocesses in this process.

    Returns
    -------
    list
        One result per job, None for those that failed or were written.

    Raises
    ------
    ModelError
        At once, since it would fail every case.
    Exception
        At once, if somebody else's code raised it and that ends a run; where cases do not keep going that of the first
        that fails.
    """
    first = setup()
    options, device = first.options, first.device
    with ExitStack() as stack:
        stack.callback(empty_cache, device)
        stack.callback(stock_calls.forget_importance)
        stack.enter_context(vram_limit(options.max_vram, device))
        folder = stack.enter_context(temporary_folder(options.tmp_dir))
        prefetcher, ahead = None, {}
        # beside a GPU; on the CPU a worker would take the cores that the network needs
        is_wished = device.type != "cpu" if options.prefetch is None else options.prefetch
        if may_prefetch and is_wished and isinstance(jobs, Sequence) and len(jobs) > 1 and not any(map(_is_own, jobs)):
            prefetcher = stack.enter_context(closing(Prefetcher(jobs, first, folder)))
            ahead = {job.output: _inputs(job) for job in jobs}  # its worker reads before a case begins
        del first
        return _Run(setup, folder, probabilities, outcomes.listeners, outcomes, load, prefetcher, ahead).predict(jobs)


def _is_own(job: Job) -> bool:
    """Whether a case is read by our own reader of volumes, of which what is read is not all kept anyway."""
    return job.files is not None and job.files.selection is not None


def _inputs(job: Job) -> list[list[str | int]]:
    """Return the states of what is read for a case that is recorded."""
    return [] if job.recipe is None else stated(job.recipe.inputs)


def clock_of(case: str, listeners: Sequence[Listener], *first: Callable[[Any], object]) -> StageClock:
    """Return the clock of a case that all listeners follow; memory is measured where one of them asks for it."""
    sampler = PeakSampler(stage="preprocessing") if any(listener.measures for listener in listeners) else None
    return StageClock(case, [*first, *(listener.progress for listener in listeners)], sampler)


@contextmanager
def followed(clock: StageClock, listeners: Sequence[Listener]) -> Iterator[None]:
    """Let all listeners follow one case."""
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener.case(clock.case, clock.sampler))
        if clock.sampler is not None:
            stack.enter_context(clock.sampler)
        yield


@dataclass
class _Run:
    _setup: Callable[[], Setup]
    _folder: Path
    _probabilities: bool
    _listeners: Sequence[Listener]
    _outcomes: Outcomes
    _load: Load
    _prefetcher: Prefetcher | None
    _ahead: dict[str | None, list[list[str | int]]]
    _is_prefetching_decided: bool = False
    _worker_bytes: int = 0
    _latest: PendingWrite | None = None

    def predict(self, jobs: Iterable[Job]) -> list[Result]:
        results, outcomes = [], self._outcomes
        known = jobs[1:] if isinstance(jobs, Sequence) else ()  # nobody waits for what an iterator gives next
        try:
            with outcomes:
                for job, following in zip_longest(jobs, known):
                    signals.check()
                    clock = clock_of(job.name, self._listeners, outcomes.settle_if_written)
                    try:
                        result, report = self._predict(job, following, clock)
                    except ModelError:
                        raise
                    except Exception as error:
                        if not outcomes.ends_run(clock, error):
                            outcomes.settle()
                        outcomes.failed(clock, error)
                        result = None
                    else:
                        outcomes.predicted(clock, report, self._latest)
                    results.append(result)
                outcomes.settle()
        finally:
            self._keep_latest()
        return results

    def _keep_latest(self) -> None:
        """Let the files of the last case be written, however the run ends; most failures have been told of."""
        latest, self._latest = self._latest, None
        try:
            if latest is not None:
                latest.result()
        except Exception as error:
            logger.error("the case that was finished last could not be written: %s", error)

    def _predict(self, job: Job, following: Job | None, clock: StageClock) -> tuple[Result, CaseReport]:
        setup = setup_for(self._setup(), job)
        run = CaseRun(setup, job, clock, self._folder, self._probabilities, self._listeners, self._settle_beside)
        read = self._ahead.pop(job.output, None) or _inputs(job)
        with followed(clock, self._listeners), ExitStack() as output:
            with clock.stage("preprocessing"):
                planning = self._planning(run)
                case = run.preprocessed(self._loaded, planning)
            predicted = run.predicted(case, planning, output)
            result, case = predicted.result, predicted.case
            made = self._made(run, predicted, read)
            before, self._latest = self._latest, None
            if before is not None and not before.is_over:
                with clock.stage("writing", 1):  # one at a time
                    before.wait()
            if predicted.plan.placement.label_map is None:
                self._publish_or_hold_back(made, following, output)
            elif job.output is not None and result is not None:
                self._write_or_hold_back(made, following, result)
                self._draw(run, case, result)
                result = None
        peaks = clock.sampler.peaks_bytes() if clock.sampler is not None else {}
        counts = predicted.tiles
        tiles = counts["reused"], made.arithmetic.value, counts["computed"], counts["of_case"]
        report = CaseReport(job.name, job.output, clock.seconds, predicted.plan, peaks, *tiles, made.labels)
        return heads.plain(result), report

    def _made(self, run: CaseRun, predicted: Predicted, read: list[list[str | int]]) -> Made:
        """Return what is told of a case, whose labels are counted."""
        voxels, result, properties = {}, predicted.result, predicted.case.properties
        with run.clock.stage("writing", 1):
            if result is not None:
                voxels = counted(result[0] if isinstance(result, tuple) else result)
            elif predicted.counts is not None:
                voxels = predicted.counts.voxels()
        labels = label_volumes(voxels, run.setup, properties)
        arithmetic = Ways(run.setup).arithmetic()
        return Made(
            run.setup, run.job, run.clock, arithmetic, predicted.plan, predicted.tiles, labels, properties, read
        )

    def _loaded(self, job: Job, setup: Setup, planning: CasePlanning | None) -> PreprocessedCase:
        here = partial(self._load, job, setup, planning)
        return here() if self._prefetcher is None else self._prefetcher.load(job, here)

    # -- what goes on beside -----------------------------------------------------------------------------------------

    def _planning(self, run: CaseRun) -> CasePlanning:
        """Plan a case by its header; beside the writing of the one before, unless that slows it down."""
        run.check()
        pending = self._latest if self._latest is not None and not self._latest.is_over else None
        planning = run.planning(self._worker_bytes, pending)
        if pending is not None:
            if planning.fits() and not planning.is_slowed():
                pending.start()
            else:
                pending.wait()
                planning = run.planning(self._worker_bytes, None)
        planning.check()
        return planning

    def _settle_beside(self, planning: CasePlanning) -> None:
        """Decide on the worker of the next cases; wait for the files of the one before where they are in the way."""
        if not self._is_prefetching_decided:
            self._is_prefetching_decided = True
            self._start_prefetching(planning)
        if self._latest is not None and planning.is_slowed():
            self._latest.wait()
        if self._latest is None or self._latest.is_over:
            planning.forget_pending()

    def _start_prefetching(self, planning: CasePlanning) -> None:
        """Preprocess the next cases in a process from now on, if every case fits beside it; its plans count it then.

        Decided once in a run, when it is known what the network takes.
        """
        prefetcher = self._prefetcher
        if prefetcher is None or planning.header is None:
            return
        facts = []
        for job in prefetcher.jobs:
            with suppress(UsageError):  # told of when its turn comes
                case = facts_of_job(planning.sizes, job, self._probabilities)
                if case is not None:  # else one that cannot be right
                    # the worker reads into RAM, and puts the image on disk
                    given = replace(case.input, place=Place.RAM)
                    facts.append(replace(case, image_place=Place.DISK, input=given))
        sizes = (case.input.kept_bytes + max(case.reading_bytes, case.preprocessing_bytes) for case in facts)
        largest = max(sizes, default=0)
        model = replace(planning.model, worker_bytes=WORKER_BYTES + largest)
        if all(closest_plan(model, case, planning.budget).fits_everywhere() for case in facts):
            self._worker_bytes = model.worker_bytes
            planning.learn(worker_bytes=model.worker_bytes)
            prefetcher.release()

    # -- files -------------------------------------------------------------------------------------------------------

    def _write_or_hold_back(self, made: Made, following: Job | None, result: Result) -> None:
        """Write the files now, or beside the next case, if that is one of files."""
        writes = partial(self._write, made, result)
        if following is not None and following.files is not None and isinstance(result, np.ndarray):
            cropped_shape = made.properties["shape_after_cropping_and_before_resampling"]
            written_bytes = self._writer_bytes(made.setup, result.shape)
            self._latest = PendingWrite.of(writes, result, cropped_shape, written_bytes)
            return
        with made.clock.stage("writing"):
            writes()

    def _publish_or_hold_back(self, made: Made, following: Job | None, output: ExitStack) -> None:
        """Let a file that holds all labels appear now, or beside the next case."""
        if following is None or following.files is None:
            with made.clock.stage("writing"):
                self._publish(made, output)
            return
        backward, shape = made.setup.plans_manager.transpose_backward, made.properties["shape_before_cropping"]
        written_bytes = self._writer_bytes(made.setup, [int(shape[axis]) for axis in backward])
        self._latest = PendingWrite.of_file(partial(self._publish, made, output.pop_all()), written_bytes)

    def _writer_bytes(self, setup: Setup, shape: Sequence[int]) -> int:
        rule = adapter.label_rule(setup.label_manager)
        label_bytes = 2 if rule is None else rule.dtype.itemsize
        writer = type(writer_of(setup.plans_manager))
        return label_writing.writer_bytes(writer, setup.file_ending, shape, label_bytes)

    def _write(self, made: Made, result: Result) -> None:
        """Write what is not written yet as the model's own writer does; each file appears when it is complete."""
        made.begin_writing()
        output, setup = made.job.output, made.setup
        assert output is not None, "a case without an output is not written"
        assert result is not None
        segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
        if probabilities is not None:
            adapter.write_probabilities(probabilities, output + ".npz")
            adapter.write_properties(made.properties, output + ".pkl")
        path = output + setup.file_ending
        label_writing.write_segmentation(segmentation, made.properties, path, setup.plans_manager)
        self._tell_written(made)

    def _publish(self, made: Made, output: ExitStack) -> None:
        """Let a file that holds all labels appear."""
        made.begin_writing()
        output.close()
        self._tell_written(made)

    def _tell_written(self, made: Made) -> None:
        for listener in self._listeners:
            listener.written(made)
        recipe = made.job.recipe
        if recipe is not None:
            forget(recipe.outputs[0])
            if made.job.piece is None:  # else who has cut the case does it, once it knows
                forget_pieces(recipe.outputs[0])

    def _draw(self, run: CaseRun, case: PreprocessedCase, result: Result) -> None:
        """Let listeners keep what shows the labels; what is wrong with it costs a warning and not the case."""
        drawing = [listener for listener in self._listeners if listener.draws]
        segmentation = result[0] if isinstance(result, tuple) else result
        if not drawing or segmentation is None:
            return
        with run.clock.stage("report"):
            try:
                for listener in drawing:
                    listener.draw(run.setup, run.job, case, segmentation)
            except Exception as error:
                logger.warning("case %s: no slices for the report: %s: %s", run.job.name, type(error).__name__, error)
