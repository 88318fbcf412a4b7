"""One function on many machines: a task a call, which write files; the way of work that needs no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from nnunet_lowmem.cluster.connecting import connected
from nnunet_lowmem.errors import LowMemError, WorkerError
from nnunet_lowmem.options import Options
from nnunet_lowmem.system import signals

Made = TypeVar("Made")

# between two looks at a task, and at who is there
_WAIT_S, _LOOK_S = 0.1, 2.0


def on_workers(function: Callable[..., Made], calls: Sequence[tuple[Any, ...]], options: Options) -> Iterator[Made]:
    """Let workers call a function, and give what it returns, in the order of the calls.

    Parameters
    ----------
    function : callable
        That workers can import; done twice, it makes the same files.
    calls : sequence of tuples
        Arguments; the first is what it is about, in words.
    options : Options
        How the cluster is reached, and how long a worker is waited for.

    Raises
    ------
    WorkerError
        If the scheduler has gone, no worker comes, or some have gone with one call.
    LowMemError
        That the function raises.
    """
    with connected(options) as client:
        futures = [client.submit(function, *call, pure=False) for call in calls]
        try:
            for future, call in zip(futures, calls, strict=True):
                _wait_for(future, client, options.worker_timeout_s)
                yield _result(future, call[0])
        finally:
            with suppress(Exception):  # one may be on its way
                client.cancel(futures, force=True)


def _wait_for(future: Any, client: Any, most_s: float) -> None:
    looked_s = seen_s = time.monotonic()
    while not future.done():
        signals.check()
        time.sleep(_WAIT_S)
        now_s = time.monotonic()
        if now_s < looked_s + _LOOK_S:
            continue
        looked_s = now_s
        try:
            seen_s = now_s if client.nthreads() else seen_s
        except Exception as error:  # whatever Dask raises where nobody answers
            raise WorkerError(f"the scheduler has gone ({' '.join(str(error).split())})") from error
        if most_s and now_s > seen_s + most_s:
            raise WorkerError(f"no worker for {most_s:g} s (--worker_timeout): start one, or see why none joins")


def _result(future: Any, about: str) -> Any:
    try:
        return future.result()
    except LowMemError:
        raise
    except Exception as error:
        raise WorkerError(f"{about}: {type(error).__name__}: {' '.join(str(error).split())}") from error
