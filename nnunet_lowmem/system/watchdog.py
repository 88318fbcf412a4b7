"""The main process under the same clock as its workers: a stage without progress says where it is, and goes on waiting.

Progress is a step of a stage or CPU time that grows, anywhere in the process tree but in the watch itself. Nothing is
ended here: who waits for a network file system or a driver may still get it. Where no terminal shows bars, the same
thread says in plain lines, now and then, how far the case is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.memory_held import process_tree_bytes
from nnunet_lowmem.system.process_tree import ProcessTree
from nnunet_lowmem.system.stalls import ProgressClock, WorkerLimits

logger = logging.getLogger(__name__)


class StallWatch:
    """A context manager with one thread that looks at the clock; off where the limit is 0 and no lines are wanted.

    Parameters
    ----------
    limits : WorkerLimits
    device : str
        Named in what is logged.
    line_s : float
        Seconds between two lines that say how far the case is; 0: none.
    observed_s : callable
        Returns the CPU seconds that other observers have taken so far: they are no progress, either.
    """

    def __init__(
        self, limits: WorkerLimits, device: str, line_s: float = 0.0, observed_s: Callable[[], float] = float
    ) -> None:
        self._clock = ProgressClock(limits, time.monotonic())
        self._line_s, self._line_due = line_s, time.monotonic() + line_s
        self._device = device
        self._observed_s = observed_s
        self._progress = Progress("between cases", "none", 0, 1)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._tree = ProcessTree(os.getpid())
        on = limits.stall_s > 0 or line_s > 0
        self._thread = threading.Thread(target=self._run, name="nnunet_lowmem stall watch", daemon=True) if on else None

    def __enter__(self) -> StallWatch:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def note(self, progress: Progress) -> None:
        """Note how far the case is."""
        with self._lock:
            new_stage = (progress.case, progress.stage) != (self._progress.case, self._progress.stage)
            self._progress = progress
            self._clock.report(time.monotonic(), new_stage=new_stage)

    def _run(self) -> None:
        while not self._stopped.wait(min(self._clock.look_s, self._line_s or self._clock.look_s)):
            with self._lock:
                now = time.monotonic()
                # looking takes CPU time, too, and more of it the longer nothing else happens
                cpu_s = self._tree.cpu_s()
                self._clock.look(now, None if cpu_s is None else cpu_s - time.thread_time() - self._observed_s())
                overdue = self._clock.overdue()
                if overdue:
                    self._clock.report(now, new_stage=True)  # say it once per limit
            if overdue:
                self._tell(overdue)
            if self._line_s and now >= self._line_due:
                self._line_due = now + self._line_s
                at, held = self._progress, format_gib(process_tree_bytes())
                logger.info("case %s: %s, %d of %d, %s", at.where, at.stage, at.done, at.total, held)

    def _tell(self, overdue: str) -> None:
        logger.warning(
            "case %s, %s: the main process %s; it is %s and holds %s, device %s. It goes on waiting. Its threads:\n%s",
            self._progress.case,
            self._progress.stage,
            overdue,
            self._tree.state(),
            self._tree.holds(),
            self._device,
            _stacks(),
        )


def _stacks() -> str:
    """Return where every Python thread is, except the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(told)
