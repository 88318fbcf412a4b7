"""Who gets which case when: the largest first, one for each worker; what a worker that is lost costs.

Dask would put a task whose worker has died onto the next one, and count; a case that kills workers would kill several.
So each task is bound to a worker, is taken back where that is gone, and tried once elsewhere. A thread cannot be ended
from outside: each attempt has a file, and looks between tiles whether it is still there.
"""

from __future__ import annotations

import logging
import os
import queue
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from nnunet_lowmem.cluster.attempts import Attempt, Task, Whole, failed
from nnunet_lowmem.cluster.members import Member, Members
from nnunet_lowmem.cluster.splitting import Splitting
from nnunet_lowmem.cluster.tasks import Cutting, Sent, forget, perform
from nnunet_lowmem.errors import BudgetError, LowMemError, ModelError, UsageError, WorkerError
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.listeners import Listener
from nnunet_lowmem.predict.outcomes import RunReport, Turn
from nnunet_lowmem.predict.prepared import Cut
from nnunet_lowmem.system import signals
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.owned_folders import BEAT_S

logger = logging.getLogger(__name__)

# between two looks at the workers, and at what has ended
_LOOK_S, _WAIT_S = 1.0, 0.1
# how long a scheduler may be silent, and a report may travel
_SILENT_S, _TRAVEL_S = 10.0, 10.0
# how long workers may take to say what they are, where others could begin, and where nobody could
_BEGIN_S, _SLOW_S = 60.0, 600.0
# until a nanny has started another worker; reports that cannot be fetched
_RETURN_S, _FETCHES = 20.0, 2
# what Dask says of a task whose worker has gone, where it is told to give up at once
_OF_LOST_WORKERS = ("KilledWorker", "NoValidWorkerError")
# until tasks have noticed that nobody waits, and until one that was given to a worker that paused has begun
_LEAVE_S, _PAUSED_S = 30.0, 60.0
#: How often a worker may go with a case; how often a case may be given to one at all.
MOST_LOST, MOST_STARTS = 2, 6


class Dispatcher:
    """Lets workers predict cases, and gives reports as they come; a context manager.

    When the block ends, nobody waits for a task, and all that see that leave their cases.

    Parameters
    ----------
    client : distributed.Client
    members : Members
    sent : Sent
    probabilities : bool
    waits_s : float
        For a first worker, and for another one where all have gone; 0 for ever.
    listeners : sequence of Listener
        Told of the progress of each case, in this thread.
    splitting : Splitting

    Attributes
    ----------
    turns : list of Turn
        What workers have done.
    """

    def __init__(
        self,
        client: Any,
        members: Members,
        sent: Sent,
        probabilities: bool,
        waits_s: float,
        listeners: Sequence[Listener],
        splitting: Splitting,
    ) -> None:
        self._client, self._members, self._sent, self._probabilities = client, members, sent, probabilities
        self._waits_s, self._listeners, self._splitting = waits_s, listeners, splitting
        self._topic = f"nnunet_lowmem-{uuid.uuid4().hex}"
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._running: dict[Any, Attempt] = {}
        self.turns: list[Turn] = []
        self._there: list[Member] = []
        self._began_s = self._looked_s = self._seen_s = self._beat_s = time.monotonic()
        self._lost_s = float("-inf")
        self._silent_since_s: float | None = None

    def __enter__(self) -> Dispatcher:
        events = self._events  # all that the client keeps of this
        self._client.subscribe_topic(self._topic, lambda event: events.put(event[1]))
        return self

    def __exit__(self, *raised: object) -> None:
        left = dict(self._running)
        for attempt in left.values():
            with suppress(Exception):
                self._give_up(attempt)
        with suppress(Exception):  # one may be on its way, and a cluster that has gone needs nothing
            if self._is_connected():
                self._wait_for(left, _LEAVE_S)
                busy = [attempt.member.in_words() for future, attempt in left.items() if not future.done()]
                if busy:
                    logger.warning("workers that have not left their cases yet: %s", ", ".join(busy))
                self._client.cancel(list(left), force=True)
                self._client.unsubscribe_topic(self._topic)
                alone = {"allow_other_workers": False, "pure": False}
                forgotten = [self._client.submit(forget, workers=[other.address], **alone) for other in self._there]
                self._wait_for(forgotten, _TRAVEL_S)
                self._client.cancel(forgotten, force=True)
        self._running.clear()

    @staticmethod
    def _wait_for(futures: Collection[Any], most_s: float) -> None:
        until = time.monotonic() + most_s
        while time.monotonic() < until and not all(future.done() for future in futures):
            time.sleep(_WAIT_S)

    def run(self, tasks: Sequence[Task], is_undecided: bool) -> Iterator[tuple[Job, RunReport]]:
        """Yield each case with a report in which it is done or failed.

        Parameters
        ----------
        tasks : sequence of Task
        is_undecided : bool
            The first case decides in which arithmetic all others are computed.

        Raises
        ------
        UsageError
            If a worker is not as it has to be, or there is none to begin with.
        ModelError
            If the model is not the command's on two workers, or on the only one.
        WorkerError
            If the scheduler has gone.
        """
        waiting = sorted(tasks, key=lambda task: -task.size)
        while waiting or self._running:
            signals.check()
            self._beat()
            self._look()
            if self._is_connected() and not (is_undecided and self._running):
                self._send(waiting, is_undecided)
            for task, heard in chain(self._ended(waiting), self._hopeless(waiting)):
                report = self._splitting.heard(task, heard, waiting)
                if report is None:
                    continue
                if is_undecided and report.done:
                    is_undecided = False
                    self._sent = replace(self._sent, arithmetic=Arithmetic(report.done[0].arithmetic))
                if report.failed and task.whole is not None:
                    self._leave_others(task.whole)
                yield task.job if task.whole is None else task.whole.job, report
            self._tell()
            time.sleep(_WAIT_S)

    # -- the cluster -------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Show those that work that somebody waits for them."""
        now_s = time.monotonic()
        if now_s < self._beat_s + BEAT_S:
            return
        self._beat_s = now_s
        for attempt in self._running.values():
            with suppress(OSError):
                os.utime(self._sent.folder / attempt.name)

    def _is_connected(self) -> bool:
        return bool(self._client.status == "running")

    def _look(self) -> None:
        """Look who is there, now and then."""
        now_s = time.monotonic()
        if now_s < self._looked_s + (_LOOK_S if self._there else _WAIT_S):
            return
        self._looked_s = now_s
        try:
            if not self._is_connected():
                raise OSError(f"the connection is {self._client.status}")
            self._there = self._members.now()
        except LowMemError:
            raise
        except Exception as error:  # whatever Dask raises where nobody answers
            self._silent_since_s = now_s if self._silent_since_s is None else self._silent_since_s
            if now_s < self._silent_since_s + _SILENT_S and self._client.status != "closed":
                return
            raise WorkerError(
                f"the scheduler has gone ({' '.join(str(error).split())}): cases that are finished are there, "
                "--continue_prediction goes on"
            ) from error
        self._silent_since_s = None
        if self._running or self._candidates() or (self._members.is_waiting and now_s < self._began_s + _SLOW_S):
            self._seen_s = now_s

    def _candidates(self) -> list[Member]:
        """Workers that take tasks now."""
        return [member for member in self._there if member.is_ready]

    def _send(self, waiting: list[Task], is_undecided: bool) -> None:
        """Give each idle worker the largest task that it may have; one alone as long as something is undecided."""
        if self._members.is_strict and self._members.is_waiting and time.monotonic() < self._began_s + _BEGIN_S:
            return  # whether all are alike is known before the first case
        busy, most = {attempt.member.key for attempt in self._running.values()}, 1 if is_undecided else len(waiting)
        for member in self._candidates():
            task = next((task for task in waiting if task.may_run_on(member)), None)
            if member.key in busy or task is None or most < 1:
                continue
            cutting = None if is_undecided else self._cutting(task, waiting)
            name = f"attempt-{uuid.uuid4().hex}"
            (self._sent.folder / name).touch()
            try:
                future = self._client.submit(
                    perform, self._sent, task.job, self._probabilities, cutting, member.on_machine, self._topic, name,
                    key=f"{task.job.name}-{name}", workers=[member.address], allow_other_workers=False,
                    resources=dict(member.resources) or None, pure=False, retries=0,
                )  # fmt: skip
            except Exception as error:  # whatever Dask raises where the connection has just been closed
                logger.debug("case %s could not be sent: %s", task.job.name, error)
                return
            self._members.is_strict = False
            waiting.remove(task)
            task.starts, most = task.starts + 1, most - 1
            what = f"{task.job.name}{task.suffix if cutting is None else ', prepared'}"
            followed = ExitStack()
            for listener in self._listeners:
                followed.enter_context(listener.case(task.job.name, None))
            self._running[future] = Attempt(task, member, name, what, time.monotonic(), time.time(), followed)
            logger.debug("case %s goes to worker %s", task.job.name, member.in_words())

    def _cutting(self, task: Task, waiting: Sequence[Task]) -> Cutting | None:
        cases = {id(other.whole or other) for other in (*waiting, *(entry.task for entry in self._running.values()))}
        return self._splitting.cutting(task, len(cases), sum(map(task.may_run_on, self._candidates())))

    def _give_up(self, attempt: Attempt) -> None:
        attempt.followed.close()
        with suppress(OSError):
            (self._sent.folder / attempt.name).unlink()

    # -- cases -------------------------------------------------------------------------------------------------------

    def _ended(self, waiting: list[Task]) -> Iterator[tuple[Task, RunReport]]:
        if not self._is_connected():
            return
        errors: list[LowMemError] = []
        for future, attempt in list(self._running.items()):
            if future not in self._running:  # its case has failed meanwhile
                continue
            report = self._of_one(future, attempt, waiting, errors)
            if report is not None and (report.done or report.failed):
                yield attempt.task, report
        for error in errors:
            raise error

    def _of_one(
        self, future: Any, attempt: Attempt, waiting: list[Task], errors: list[LowMemError]
    ) -> RunReport | None:
        """Return what has become of a case; None where it goes on, or begins again."""
        task, member = attempt.task, attempt.member
        there = {other.key: other for other in self._there}
        if future.done() and future.status == "finished":
            try:
                report: RunReport | Cut = future.result(timeout=_TRAVEL_S)
            except Exception as error:  # the worker has gone before it could be fetched
                logger.debug("case %s: no report: %s", task.job.name, error)
                attempt.unfetched += 1
                if attempt.unfetched < _FETCHES:
                    return None
                self._leave(future, attempt)
                return self._again(attempt, waiting, "has a report that cannot be fetched")
            self._leave(future, attempt, is_done=isinstance(report, Cut) or bool(report.done))
            if isinstance(report, Cut):
                waiting[:0] = self._splitting.pieces(task, report)
                return None
            if not report.done and not report.failed:  # it believes that nobody waits
                return self._again(attempt, waiting, "has left it")
            return self._report(task, member, report, waiting)
        if future.done() and future.status == "error":
            raised = future.exception(timeout=_TRAVEL_S)
            self._leave(future, attempt)
            if raised is None or type(raised).__name__ in _OF_LOST_WORKERS:
                return self._lost(attempt, waiting)
            return self._of_error(attempt, raised, waiting, errors)
        if future.done() and future.status != "finished":  # the connection was lost, and with it what it was for
            self._leave(future, attempt)
            task.starts -= 1
            return self._again(attempt, waiting, "was out of reach")
        if member.key not in there:
            self._leave(future, attempt)
            return self._lost(attempt, waiting)
        waited_s = time.monotonic() - attempt.began_s
        if not attempt.is_heard and not there[member.key].is_ready and waited_s > _PAUSED_S:
            self._leave(future, attempt)
            return self._again(attempt, waiting, "takes no tasks")
        return None

    def _lost(self, attempt: Attempt, waiting: list[Task]) -> RunReport | None:
        task = attempt.task
        task.lost_with.append(attempt.member)
        self._lost_s = time.monotonic()
        if len(task.lost_with) < MOST_LOST:
            return self._again(attempt, waiting, "has gone")
        names = ", then ".join(lost.in_words() for lost in task.lost_with)
        told = f"worker {names} has gone while it was predicted: killed, out of memory, or cut off"
        return failed(task, WorkerError(told))

    def _leave_others(self, whole: Whole) -> None:
        for future, attempt in [entry for entry in self._running.items() if entry[1].task.whole is whole]:
            self._leave(future, attempt)

    def _leave(self, future: Any, attempt: Attempt, *, is_done: bool = False) -> None:
        del self._running[future]
        self.turns.append(attempt.turn(is_done=is_done))
        self._give_up(attempt)
        with suppress(Exception):  # of a connection that has just been lost
            self._client.cancel([future], force=True)

    def _again(self, attempt: Attempt, waiting: list[Task], why: str) -> RunReport | None:
        task, member = attempt.task, attempt.member
        if task.starts >= MOST_STARTS:
            told = f"was begun {task.starts} times, and not finished; the last worker, {member.in_words()}, {why}"
            return failed(task, WorkerError(told))
        logger.warning("case %s: worker %s %s; once more", task.job.name, member.in_words(), why)
        waiting.insert(0, task)
        return None

    def _of_error(
        self, attempt: Attempt, error: BaseException, waiting: list[Task], errors: list[LowMemError]
    ) -> RunReport | None:
        task, member = attempt.task, attempt.member
        if isinstance(error, ModelError):
            self._members.refuse(member, error)
            self._there = [other for other in self._there if other.key != member.key]
            task.misread += 1
            if any(map(task.may_run_on, self._candidates())) and task.misread < MOST_LOST:
                waiting.insert(0, task)
                return None
            errors.append(error)
            return None
        told = f"worker {member.in_words()}: {type(error).__name__}: {error}"
        return failed(task, WorkerError(told))

    def _report(self, task: Task, member: Member, report: RunReport, waiting: list[Task]) -> RunReport | None:
        """Return what has become of a case; None where a larger worker is to try it."""
        outputs = task.job.recipe.outputs if task.job.recipe and task.writes else ()
        missing = [path for path in outputs if not path.exists()]
        if report.done and missing:
            told = f"worker {member.in_words()} has written {missing[0]}, which is not there for this machine"
            return failed(task, WorkerError(told))
        if not report.failed or report.failed[0].exit_code != BudgetError.exit_code:
            return report
        task.too_small, task.refused = max(member.limit, task.too_small or 0), report.failed[0]
        waiting.append(task)  # `_hopeless` gives it up where nobody has more
        return None

    def _hopeless(self, waiting: list[Task]) -> Iterator[tuple[Task, RunReport]]:
        """Give up cases that nobody can have who is there, and all where nobody has come for long."""
        now_s = time.monotonic()
        # a larger one may be about to come, or to come back
        is_waiting = self._members.is_waiting and now_s < self._began_s + _SLOW_S
        if self._there and not is_waiting and now_s > self._lost_s + _RETURN_S:
            for task in [task for task in waiting if task.refused and not any(map(task.may_run_on, self._there))]:
                if task not in waiting:  # its case has failed meanwhile
                    continue
                waiting.remove(task)
                assert task.refused is not None, "it was looked for"
                yield task, RunReport(failed=[task.refused])
            if not self._running and waiting and not any(t.may_run_on(m) for t in waiting for m in self._there):
                for task in waiting:  # better by the one that has gone with it, and is there again, than never
                    task.lost_with.clear()
        if not self._waits_s or now_s < self._seen_s + self._waits_s or self._running:
            return
        told = f"no worker for {self._waits_s:g} s (--worker_timeout): start one, or see why none joins"
        if self._there or self._members.is_waiting:
            told = f"no worker took a case for {self._waits_s:g} s (--worker_timeout): all are busy or paused"
        if self._members.is_strict:
            raise UsageError(told)
        while waiting:
            task = waiting.pop()
            yield task, failed(task, WorkerError(told))

    def _tell(self) -> None:
        attempts = {attempt.name: attempt for attempt in self._running.values()}
        while not self._events.empty():
            event = self._events.get()
            attempt = attempts.get(event["attempt"])
            if attempt is None:
                continue
            attempt.is_heard = True
            told = Progress(**{entry.name: event[entry.name] for entry in fields(Progress)})
            for listener in self._listeners:
                listener.progress(replace(told, worker=attempt.member.in_words()))
