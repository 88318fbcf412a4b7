"""Somebody else's code in the middle of ours: the network and its hooks, overridden methods, callbacks.

What they raise ends a run at once and reaches the caller as the very object that it is, as in stock. So a client
cancels by an exception of its own, whatever becomes of cases that fail. The commands count it as a failure of the case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnunet_lowmem.errors import LowMemError
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.out_of_memory import is_out_of_memory


@contextmanager
def foreign(clock: StageClock | None) -> Iterator[None]:
    """Let the clock of a case know what somebody else's code in the block raises.

    Memory that ran out is no such thing: it is tried again with less, and may cost the case; nor is an error of ours
    that passes through. Without a clock there is no run to be ended.
    """
    try:
        yield
    except Exception as error:
        if clock is not None and not (is_out_of_memory(error) or isinstance(error, LowMemError)):
            clock.blame_others(error)
        raise
