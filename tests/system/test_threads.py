"""The pool of the kernels: shared by whoever opens it, ended by the last to leave."""

from __future__ import annotations

import threading

import numpy as np

from nnunet_lowmem.system.threads import RowThreads


def mark(out: np.ndarray, start: int, stop: int) -> None:
    out[start:stop] += 1


def pool_threads() -> int:
    return sum(thread.name.startswith("nnunet-lowmem-kernel") for thread in threading.enumerate())


def test_all_rows_are_done_once_with_and_without_a_pool():
    before = pool_threads()
    for threads in (1, 3):
        rows = RowThreads(threads)
        out = np.zeros(101)
        rows.run(mark, 101, out)
        with rows:
            rows.run(mark, 101, out)
        assert (out == 2).all()
    assert pool_threads() == before


def test_the_last_to_leave_ends_the_threads():
    """As two threads that predict with one predictor do: the first to end left the other without a pool."""
    before, rows, out = pool_threads(), RowThreads(2), np.zeros(64)
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with rows:
            inside.set()
            assert left.wait(10)
            rows.run(mark, 64, out)

    thread = threading.Thread(target=other)
    with rows:
        thread.start()
        assert inside.wait(10)
        rows.run(mark, 64, out)
    assert pool_threads() > before
    left.set()
    thread.join(10)
    assert (out == 2).all()
    assert pool_threads() == before
