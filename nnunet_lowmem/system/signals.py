"""Signals that ask a process to end, as exceptions that cannot get lost.

Python raises the exception of a signal wherever it happens to be, and swallows it where that is a finaliser or a
callback from C. So the signal is remembered, too, and `check`, called between tiles and stages, raises it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from types import FrameType

from nnunet_lowmem.system import platform

# a terminal, a shell or a scheduler sends these to all processes of a group or of a job
_TO_GROUPS = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGBREAK", "SIGUSR1", "SIGUSR2")
# the others that end a process which does not say otherwise, among them limits and timers of its own
_TO_ONE = ("SIGTERM", "SIGXCPU", "SIGALRM", "SIGVTALRM", "SIGPROF")
# for which nobody sets a handler in C: all that is taken where the system does not tell of such handlers
_NOT_CAUGHT_IN_C = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")

_pending: list[int] = []


class InterruptedBySignal(SystemExit):
    """A signal asks the run to end; the exit code is the shell's, 128 + its number.

    Parameters
    ----------
    number : int
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Raise `InterruptedBySignal` in the block on every signal that would end this process.

    A signal that is ignored when the block begins stays so: ``nohup`` and ``command &`` in a script mean it. So does a
    handler that somebody else has set, but for SIGINT and SIGTERM. The former handlers come back afterwards. Does
    nothing in a thread other than the main one, which is the only one that may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = platform.caught_signals()
    names = _NOT_CAUGHT_IN_C if caught is None else _TO_GROUPS + _TO_ONE
    numbers = [number for number in platform.signals_named(names) if _would_end(number, caught or ())]
    former = {number: signal.signal(number, _raise) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _pending.clear()


def _would_end(number: signal.Signals, caught: Container[int]) -> bool:
    handler = signal.getsignal(number)
    if number in (signal.SIGINT, signal.SIGTERM):
        return handler not in (signal.SIG_IGN, None)
    return handler is signal.SIG_DFL and number not in caught


@contextmanager
def held_back() -> Iterator[None]:
    """Start a process in the block that gets no signal which is sent to a group until it calls `left_to_parent`."""
    with platform.blocked_signals(platform.signals_named(_TO_GROUPS)):
        yield


def left_to_parent() -> None:
    """Ignore, in a worker, the signals that its parent is sent, too: the parent alone decides what they mean."""
    numbers = platform.signals_named(_TO_GROUPS)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    platform.unblock_signals(numbers)


def check() -> None:
    """Raise the exception of a signal that has come, in case it was swallowed."""
    if _pending:
        raise InterruptedBySignal(_pending[0])


def _raise(number: int, frame: FrameType | None) -> None:
    # a second signal must not cut short the clearing up after the first
    if not _pending:
        _pending.append(number)
        raise InterruptedBySignal(number)
