"""The child's side of a worker: run one job, tell its stages, send back its result or what went wrong.

Loaded in the worker before anything of the job is, so that the ties to the parent hold while heavy imports run.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from nnunet_lowmem.system import platform, signals

Report = Callable[[str], None]

#: `Connection` sends up to 16 KiB in one write, so a child that is stopped cannot leave half a message behind.
RESULT_LIMIT_BYTES = 16 * 2**10 - 64
#: Seconds between two looks at the parent's process id.
PARENT_CHECK_S = 1.0

_REPEAT_S = 0.2


@dataclass(frozen=True)
class Raised:
    """An exception of the job, in a form that always reaches the parent.

    Attributes
    ----------
    text : str
        Type and message.
    traceback_text : str
        The end of the formatted traceback.
    pickled : bytes
        The exception itself; empty where it cannot be pickled, or is too large.
    """

    text: str
    traceback_text: str
    pickled: bytes


def run_job(pipe: Connection, parent_pid: int, job: bytes) -> None:
    """Entry point of a worker's process.

    Parameters
    ----------
    pipe : Connection
        Takes pickled ``("stage", str)``, then ``("result", object)`` or ``("raised", Raised)``.
    parent_pid : int
        This process ends when that one does.
    job : bytes
        Pickled ``(target, argument)``.
    """
    _end_with_parent(parent_pid)
    signals.left_to_parent()
    message = _answer(job, _reporter(pipe))
    with contextlib.suppress(OSError):
        pipe.send_bytes(message)


def _end_with_parent(parent_pid: int) -> None:
    platform.end_with_parent()
    # covers other systems, and a parent that ended before the call above
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()


def _watch_parent(parent_pid: int) -> None:
    # the sentinel does not fire while a forked sibling holds its other end; the process id tells then
    parent = multiprocessing.parent_process()
    watched = [] if parent is None else [parent.sentinel]
    while os.getppid() == parent_pid and not wait(watched, PARENT_CHECK_S):
        pass
    os._exit(1)


def _reporter(pipe: Connection) -> Report:
    last_stage, last_time = "", -math.inf

    def report(stage: str) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        # a parent that does not read must not be flooded: a full pipe would hold up the job
        if stage != last_stage or now - last_time >= _REPEAT_S:
            last_stage, last_time = stage, now
            pipe.send_bytes(pickle.dumps(("stage", stage[:200])))

    return report


def _answer(job: bytes, report: Report) -> bytes:
    try:
        target, argument = pickle.loads(job)
        message = pickle.dumps(("result", target(argument, report)))
        if len(message) > RESULT_LIMIT_BYTES:
            raise ValueError(f"the result takes {len(message)} bytes, the limit is {RESULT_LIMIT_BYTES}; return paths")
        return message
    except BaseException as error:
        # its frames hold the arrays of the job, and to tell what happened takes memory, too
        traceback.clear_frames(error.__traceback__)
        text = f"{type(error).__qualname__}: {error}".removesuffix(": ")[:2000]
        trace = "".join(traceback.format_exception(error))[-6000:]
        return pickle.dumps(("raised", Raised(text, trace, _pickled(error))))


def _pickled(error: BaseException) -> bytes:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return b""
    return pickled if len(pickled) <= 4000 else b""
