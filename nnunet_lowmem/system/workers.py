"""Supervised processes: one spawned process per job, its own pipe, and limits on time without progress.

A worker is never waited for without a limit and never outlives its parent; however it fails, one typed error tells
which case, in which stage, and what the system says about the process. Arrays travel as files: what goes to a worker
and comes back is a path or a small dict.

Life is a report of the job or CPU time that grows, in the process and its descendants; a thread that only wakes up now
and then uses too little of it to count. Busy for ever is caught by a limit per stage.

Covered: exceptions, crashes, SIGKILL and SIGSTOP, ``os._exit``, reads that never return, a parent that is killed, a
parent that is suspended (its own pause is not held against the worker), scripts without a ``__main__`` guard,
notebooks, a tiny ``/dev/shm``. Not covered: a process that the kernel cannot end (a dead network mount) is left behind
after `KILL_S`; descendants of a worker outlive a SIGKILL of the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from nnunet_lowmem.errors import WorkerError
from nnunet_lowmem.system import platform, signals
from nnunet_lowmem.system.process_tree import ProcessTree, exit_words, oom_kills
from nnunet_lowmem.system.stalls import ProgressClock, WorkerLimits
from nnunet_lowmem.system.worker_child import Raised, Report, run_job

Argument = TypeVar("Argument")
Result = TypeVar("Result")

#: What a worker gets to end by itself, and after SIGTERM.
GRACE_S = 0.5
#: What the kernel gets to take down a killed process with all its memory.
KILL_S = 10.0
#: A job must fit into an empty pipe, or starting it would wait for the child to read.
JOB_LIMIT_BYTES = 48 * 2**10


class JobError(WorkerError):
    """A job did not come to its end; the subclass says how.

    Attributes
    ----------
    case, stage : str
        Where it happened; the stage is the last one reported, ``start`` before the first.
    retryable : bool
        A fresh worker may do better: it stalled or died, and memory is not known to be the cause.
    original : BaseException or None
        The exception of the job itself, where it could be sent over; its traceback is the text of ``__cause__``.
    """

    case = ""
    stage = "start"
    retryable = False
    original: BaseException | None = None


class WorkerStartError(JobError):
    """No process could be started for the job; nothing has run."""


class WorkerStalledError(JobError):
    """The worker made no progress, or stayed too long in one stage, and was ended."""

    retryable = True


class WorkerDiedError(JobError):
    """The worker's process ended without a result."""

    retryable = True


class WorkerRaisedError(JobError):
    """The job raised an exception."""


class ChildTraceback(Exception):  # noqa: N818
    """The traceback of a worker as text; never raised, only the cause of an error, so that Python prints it."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def can_spawn() -> str | None:
    """Return why this process cannot start workers, in one line, or None if nothing speaks against it."""
    this = multiprocessing.current_process()
    if this.daemon:
        return "this process is itself a daemonic multiprocessing worker, which may not have children"
    if getattr(this, "_inheriting", False):
        return "this process is a multiprocessing child that still imports the main script (no __main__ guard)"
    if getattr(sys, "frozen", False):
        return "this program is frozen into one executable, which would start again in place of a worker"
    python = os.fsdecode(multiprocessing.spawn.get_executable() or "")
    if not os.access(python, os.X_OK):
        return f"there is no Python to start: sys.executable is {python!r}"
    return None


class Worker(Generic[Argument, Result]):
    """One job in a process of its own, which starts at once; a context manager, or call `close`.

    A worker ends with the thread that started it, because Linux ties the one to the other.

    Parameters
    ----------
    target : callable ``target(argument, report) -> result``
        Function of an importable module, not of the main script, which a worker never imports. ``report(stage)`` tells
        the stage, or that there is progress within it.
    argument : object
        Picklable, at most `JOB_LIMIT_BYTES`; what `target` returns is at most `worker_child.RESULT_LIMIT_BYTES`.
    case : str
        Named in every message.
    limits : WorkerLimits, optional
        How long it may take, looked at while `result` waits and by each `poll`.

    Raises
    ------
    WorkerStartError
        If no process can be started, or the job is too large or cannot be pickled.
    """

    def __init__(
        self,
        target: Callable[[Argument, Report], Result],
        argument: Argument,
        *,
        case: str,
        limits: WorkerLimits | None = None,
    ) -> None:
        self.case = case
        self.stage = "start"
        self._thread = threading.current_thread()
        self._oom_kills = oom_kills()
        self._answer: Result
        self._failure: JobError | None = None
        self._finished = self._closed = False
        try:
            self._process, self._pipe = _spawn(_packed(target, argument), case)
        except WorkerStartError as error:
            self._place(error)
            raise
        self.pid = self._process.pid or 0
        self._watched: list[Connection | int] = [self._pipe, self._process.sentinel]
        self._tree = ProcessTree(self.pid)
        self._clock = ProgressClock(limits or WorkerLimits(), time.monotonic())

    def __enter__(self) -> Worker[Argument, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def poll(self) -> bool:
        """Look once without waiting; true when `result` would return or raise at once.

        Worth calling now and then while the parent is busy: a stalled worker is found, and ended, that much sooner.
        """
        if not self._finished:
            self._look()
        return self._finished

    def result(self) -> Result:
        """Wait for the job and return what it returned.

        Raises
        ------
        WorkerRaisedError, WorkerDiedError, WorkerStalledError
            If it did not come to its end; the process is gone by then.
        """
        while not self.poll():
            self._wait()
        if self._failure is not None:
            raise self._failure
        return self._answer

    def close(self) -> None:
        """End the process if it still runs (SIGTERM, then SIGKILL), and its descendants; may be called again."""
        if self._closed:
            return
        if not (self._finished and self._has_ended(GRACE_S)):
            self._process.terminate()
            self._has_ended(GRACE_S)
        self._end()
        if not self._finished:
            self._fail(WorkerDiedError("was closed before it had finished"))

    def _look(self) -> None:
        # asked before the pipe is emptied: whatever it sent while it lived is in there
        ended = self._has_ended(0)
        self._empty_pipe()
        if self._finished:
            return
        self._clock.look(time.monotonic(), self._tree.cpu_s())
        if ended:
            self._fail(self._death())
        elif self._clock.overdue():
            self._fail(self._stall())

    def _empty_pipe(self) -> None:
        while not self._finished and self._pipe in self._watched and self._pipe.poll():
            try:
                self._take(*pickle.loads(self._pipe.recv_bytes()))
            except (EOFError, OSError):
                self._watched.remove(self._pipe)
            except Exception as error:
                self._fail(WorkerRaisedError(f"gave a result that cannot be unpickled: {error!r}"))

    def _take(self, kind: str, content: Any) -> None:
        if kind == "stage":
            self._clock.report(time.monotonic(), new_stage=content != self.stage)
            self.stage = content
        elif kind == "result":
            self._answer, self._finished = content, True
        else:
            self._fail(_raised_error(content))

    def _wait(self) -> None:
        ready = wait(self._watched, self._clock.look_s)
        # the sentinel is ready a moment before the process can be waited for, or because the job has closed all files
        if self._process.sentinel in ready and not self._has_ended(0.1):
            self._watched.remove(self._process.sentinel)

    def _has_ended(self, timeout_s: float) -> bool:
        # Process.join would wait for ever if the child had closed its end of the sentinel; someone else may have waited
        deadline = time.monotonic() + timeout_s
        while self._process.exitcode is None and self._tree.alive():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    def _death(self) -> WorkerDiedError:
        code = self._process.exitcode
        if code != -platform.KILLED:
            return WorkerDiedError(f"ended without a result ({exit_words(code)})")
        before, now = self._oom_kills, oom_kills()
        if before is not None and now is not None and now > before:
            error = WorkerDiedError(
                f"was killed (SIGKILL) because memory ran out: the kernel counts {now} such kills, {before} when it "
                "started. Run without workers (-npp 0) or with more memory"
            )
            error.retryable = False
            return error
        if not self._thread.is_alive():
            return WorkerDiedError("was killed (SIGKILL) because the thread that started it ended")
        count = "cannot be read" if now is None else f"stayed at {now}: something else may have sent the signal"
        told = f"was killed (SIGKILL), probably because memory ran out; the kernel's count of such kills {count}"
        return WorkerDiedError(told)

    def _stall(self) -> WorkerStalledError:
        return WorkerStalledError(
            f"{self._clock.overdue()}; its process was {self._tree.state()}, held {self._tree.holds()}, and was ended. "
            "If the job is only slow, raise the limit with --worker_timeout SECONDS (0 turns it off)"
        )

    def _fail(self, error: JobError) -> None:
        """Keep the error for `result` to raise; no process is left after it."""
        self._place(error)
        self._failure, self._finished = error, True
        self._end()

    def _place(self, error: JobError) -> None:
        error.case, error.stage = self.case, self.stage
        error.args = (f"case {self.case}: in stage {self.stage!r} the worker {error}",)

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._tree.note_descendants()
        if not self._has_ended(0):
            self._process.kill()
            self._has_ended(KILL_S)
        self._tree.end_descendants(GRACE_S)
        self._pipe.close()
        try:
            self._process.close()
        except ValueError:
            # it cannot be ended, or somebody else has waited for it: at exit Python would wait for it for ever
            multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]


def _raised_error(raised: Raised) -> WorkerRaisedError:
    error = WorkerRaisedError(f"failed: {raised.text}")
    error.__cause__ = ChildTraceback(raised.traceback_text)
    with contextlib.suppress(Exception):
        error.original = pickle.loads(raised.pickled) if raised.pickled else None
    return error


def _packed(target: Callable[[Argument, Report], Result], argument: Argument) -> bytes:
    reason = can_spawn()
    if reason is not None:
        raise WorkerStartError(f"could not be started: {reason}")
    try:
        job = pickle.dumps((target, argument))
    except Exception as error:
        raise WorkerStartError(f"could not be started, its job cannot be pickled: {error}") from error
    if len(job) > JOB_LIMIT_BYTES:
        raise WorkerStartError(
            f"could not be started: its job takes {len(job)} bytes, the limit is {JOB_LIMIT_BYTES}; pass paths"
        )
    return job


def _spawn(job: bytes, case: str) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run_job, args=(writer, os.getpid(), job), name=f"worker {case}", daemon=True)
    try:
        with _main_left_out(), signals.held_back():
            process.start()
    except (OSError, RuntimeError) as error:
        reader.close()
        raise WorkerStartError(f"could not be started: {error}") from error
    finally:
        writer.close()
    return process, reader


_main_lock = threading.Lock()


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
    """Hide where the main module comes from, so that spawn does not import it in the child.

    No job needs it, and importing it would run a script without a ``__main__`` guard a second time.
    """
    main = vars(sys.modules["__main__"])
    with _main_lock:
        hidden = {name: main.pop(name) for name in main.keys() & {"__spec__", "__file__"}}
        main["__spec__"] = None
        try:
            yield
        finally:
            main.update(hidden)
