"""What becomes of cases: one that fails costs itself and nothing else."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.boxes import box_within
from nnunet_lowmem.errors import CasesFailedError, LowMemError, UsageError, WorkerError, WriteError, of_kinds, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.predict.jobs import Job, refused
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.outcomes import CaseReport, FailedCase, RunReport, SkippedCase, Turn
from nnunet_lowmem.predict.pending_write import PendingWrite
from nnunet_lowmem.predict.records import Records, latest_arithmetic
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.atomic_files import require_free_bytes
from nnunet_lowmem.system.clock import Progress, StageClock
from nnunet_lowmem.system.memory_limits import free_disk_bytes
from nnunet_lowmem.system.placing import place_of
from nnunet_lowmem.volumes.formats import read_header

logger = logging.getLogger(__name__)

# deflate never shrinks anything to less
_GREATEST_COMPRESSION = 1032
_UNCOMPRESSED_ENDINGS = (".nii",)


@dataclass(frozen=True)
class Failing:
    """What becomes of a run when something fails.

    Attributes
    ----------
    keep_going : bool
        Whether the other cases are predicted when one fails.
    foreign_ends_run : bool
        Whether what other people's code raises (`overrides.foreign`) ends the run whatever `keep_going` says; else it
        fails the case.
    in_workers : bool
        Whether stock preprocesses in processes of its own: it raises a RuntimeError, whatever has ended them.
    """

    keep_going: bool = True
    foreign_ends_run: bool = True
    in_workers: bool = False

    def kind(self, stage: str, error: Exception | None) -> type[Exception]:
        """Return the class that stock raises where `error` has left a stage."""
        return RuntimeError if self.in_workers and stage == "preprocessing" else type(error or Exception())


class Outcomes:
    """Notes how cases went, in their order; the files of the latest may still be being written. A context manager.

    However the block ends, nothing is being written after it.

    Parameters
    ----------
    report : RunReport
        Filled case by case.
    failing : Failing
    listeners : sequence of Listener
        Of the run, in the order in which they are told; told of each case once its files are there.
    """

    def __init__(self, report: RunReport, failing: Failing, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners
        self._report, self._failing = report, failing
        self._latest: tuple[StageClock, CaseReport, PendingWrite | None] | None = None

    def __enter__(self) -> Outcomes:
        return self

    def __exit__(self, *raised: object) -> None:
        with suppress(Exception):  # one is on its way
            self.settle(tells=False)

    def predicted(self, clock: StageClock, case_report: CaseReport, pending: PendingWrite | None) -> None:
        """Take a case, whose files are there unless they are `pending`."""
        try:
            self.settle()
        finally:
            self._latest = clock, case_report, pending
        if pending is None:
            self.settle()

    def settle_if_written(self, progress: Progress) -> None:
        """Note the case before the one that makes progress, if its files are there by now."""
        if self._latest is None:
            return
        clock, _, pending = self._latest
        if clock.case != progress.case and (pending is None or pending.is_over):
            self.settle()

    def settle(self, tells: bool = True) -> None:
        """Wait for the files of the latest case and note how it went; its stage counts what there was to wait."""
        if self._latest is None:
            return
        clock, case_report, pending = self._latest
        try:
            if pending is not None:
                with clock.failing_in("writing"), clock.stage("writing") if tells else nullcontext():
                    pending.result()
            self._latest = None
            for listener in self.listeners:
                with foreign(clock):
                    listener.done(case_report)
        except Exception as error:
            if pending is not None and self._latest is not None:
                pending.wait()  # a listener may have raised earlier
                self._latest = None
            elif self.ends_run(clock, error):
                self._report.done.append(case_report)  # its files are there, whatever the callback says
            self.failed(clock, error)
        else:
            self._report.done.append(case_report)

    def ends_run(self, clock: StageClock, error: Exception) -> bool:
        """Whether somebody else's code has raised it, or what led to it, and that ends the run."""
        return self._failing.foreign_ends_run and clock.foreign_cause(error) is not None

    def failed(self, clock: StageClock, error: Exception) -> None:
        """Note a failure, or raise it."""
        cause = clock.foreign_cause(error)
        clock.blame_others(None)
        stage = clock.failed_stage or "start"
        try:
            if cause is not None and self._failing.foreign_ends_run:
                raise cause
            if not self._failing.keep_going:
                if isinstance(error, LowMemError):
                    error = of_kinds(error, self._failing.kind(stage, error))
                if isinstance(error, UsageError):  # one that the user can mend
                    error.args = (f"case {clock.case}, {stage}: {error}",)
                raise error
        finally:
            del cause
        failed = FailedCase.of(clock.case, stage, error)
        self._report.failed.append(failed)
        logger.error("%s", failed.in_words())
        logger.debug("%s", failed.traceback_text)

    def note_turn(self, turn: Turn) -> None:
        """Note what a worker has done."""
        self._report.turns.append(turn)

    def note_failed(self, failed: FailedCase) -> None:
        """Note a case that has failed in another process, or raise that it has.

        Raises
        ------
        WorkerError
            Where the others are not to be predicted.
        """
        self._report.failed.append(failed)
        logger.error("%s", failed.in_words())
        logger.debug("%s", failed.traceback_text)
        if not self._failing.keep_going:
            error = WorkerError(failed.in_words())
            error.exit_code = failed.exit_code
            raise error

    def raise_failures(self, results: list[Any] | None) -> None:
        """Raise one error for all cases that failed, if any.

        Raises
        ------
        CasesFailedError
            With the report and the results of the others; its cause is the first failure, at which stock stops, and it
            is of the kind that stock raises there.
        """
        report = self._report
        if not report.failed:
            return
        first = report.failed[0]
        error = twin(CasesFailedError, self._failing.kind(first.stage, first.error))(report.failures_in_words())
        error.__cause__ = first.error
        error.exit_code, error.report, error.results = report.exit_code, report, results
        raise error


def without_those_done(jobs: Sequence[Job], report: RunReport) -> list[Job]:
    """Leave out the cases whose output is there, whole, and made from the same input; note them as skipped."""
    remaining, records = [], Records()
    for job in jobs:
        if job.recipe is None:  # one that cannot be right
            remaining.append(job)
            continue
        standing = job.recipe.standing(records)
        if standing.keeps:
            report.skipped.append(SkippedCase(job.name, standing.value))
            logger.info("case %s: skipped, %s", job.name, standing.value)
        elif job.recipe.outputs[0].is_dir():
            told = f"{shown(str(job.recipe.outputs[0]))} is there, but {standing.value}: remove it to have it made anew"
            remaining.append(refused(job, UsageError(told)))
        else:
            remaining.append(replace(job, continues=True))
            logger.info("case %s is predicted: %s", job.name, standing.value)
    return remaining


def keep_arithmetic(jobs: Sequence[Job], setup: Setup) -> None:
    """Run the network as it was run for the files that are there, made by the same model and options.

    Raises
    ------
    UsageError
        If it cannot be run so here, or was not run in the same way for all of them.
    """
    if setup.arithmetic is not Arithmetic.BFLOAT16:  # all others are what is asked for
        return
    recipes = {job.recipe.outputs[0].parent: job.recipe for job in jobs if job.recipe is not None}
    found = {folder: known for folder, recipe in recipes.items() if (known := latest_arithmetic(recipe)) is not None}
    ways = Ways(setup)
    for folder, arithmetic in found.items():
        ways.take(arithmetic)
        if (possible := ways.arithmetic()) is not arithmetic or len(set(found.values())) > 1:
            others = ", ".join(sorted({known.value for known in found.values()} | {possible.value}))
            raise UsageError(
                f"the files in {folder} were made with the network in {arithmetic.value}, and would be continued "
                f"otherwise ({others}): predict into another folder, or make those files again"
            )
        logger.info("fast bfloat16: the network is run as for the files in %s: %s", folder, arithmetic.value)


def require_space(jobs: Sequence[Job], setup: Setup, probabilities: bool) -> None:
    """Refuse a run whose files cannot fit the disk, however well they compress; say how large probabilities can get.

    Raises
    ------
    WriteError
        With the bytes needed and free.
    """
    rule = adapter.label_rule(setup.label_manager)
    voxel_bytes = 1 if rule is None else rule.dtype.itemsize
    probability_bytes = setup.heads * np.dtype(setup.options.probabilities_dtype).itemsize if probabilities else 0
    shrinks = 1 if setup.file_ending in _UNCOMPRESSED_ENDINGS else _GREATEST_COMPRESSION
    for folder, voxels in _voxels_by_folder(jobs, setup).items():
        require_free_bytes(
            folder, voxels * voxel_bytes // shrinks + voxels * probability_bytes // _GREATEST_COMPRESSION
        )
        if probability_bytes:
            _tell_size_of_probabilities(folder, voxels * probability_bytes)


def _voxels_by_folder(jobs: Sequence[Job], setup: Setup) -> dict[Path, int]:
    """Voxels that will be written to each folder, by headers."""
    voxels: dict[Path, int] = {}
    bbox = setup.bbox
    for job in jobs:
        if job.recipe is None or job.files is None or setup.on_network_grid:  # which grid that is, the crop decides
            continue
        with suppress(UsageError, WriteError):  # what cannot be read, or written, is told of when its turn comes
            # a header that promises more than its file can hold needs no space
            library = counted_by(setup.plans_manager.image_reader_writer_class)
            shape, _ = read_header(job.files.images[0], job.files.selection or library).grid()
            if bbox is not None:
                shape = [within.stop - within.start for within in box_within(bbox, shape)]
            folder = place_of(job.recipe.outputs[0]).parent
            voxels[folder] = voxels.get(folder, 0) + math.prod(shape)
    return voxels


def _tell_size_of_probabilities(folder: Path, size_bytes: int) -> None:
    with suppress(UsageError):  # a file system that cannot be asked
        free = free_disk_bytes(folder)
        logger.log(
            logging.INFO if free >= size_bytes else logging.WARNING,
            "probabilities may take as much as %s in %s, where %s are free; they compress little",
            format_gib(size_bytes),
            folder,
            format_gib(free),
        )
