"""SIGINT and SIGTERM as exceptions that cannot get lost.

Python raises the exception of a signal wherever it happens to be, and swallows it where that is a finaliser or a
callback from C. So the signal is remembered, too, and `check`, called between tiles and stages, raises it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
    """Raise `InterruptedBySignal` in the block on SIGINT and SIGTERM; the former handlers come back afterwards.

    Does nothing in a thread other than the main one, which is the only one that may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, _raise) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _pending.clear()


def check() -> None:
    """Raise the exception of a signal that has come, in case it was swallowed."""
    if _pending:
        raise InterruptedBySignal(_pending[0])


def _raise(number: int, frame: FrameType | None) -> None:
    # a second signal must not cut short the clearing up after the first
    if not _pending:
        _pending.append(number)
        raise InterruptedBySignal(number)
