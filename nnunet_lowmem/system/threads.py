"""One thread pool for the compiled kernels, owned by whoever opens it; and how many threads torch may use meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_CHUNKS_PER_THREAD = 8


class RowThreads:
    """Runs kernels that take a range of rows, split over threads in its ``with`` block, else in the caller's.

    numba's own parallel loops are not used: their threading layer is shared by the whole process and clashes with
    torch's OpenMP and with kernels called from two threads.

    Several may open it at the same time, as threads that share a predictor do; the last to leave ends the threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._users = 0
        self._lock = Lock()

    def __enter__(self) -> RowThreads:
        with self._lock:
            self._users += 1
            if self._pool is None and self.threads > 1:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="nnunet-lowmem-kernel")
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            ended, self._pool = (None, self._pool) if self._users else (self._pool, None)
        if ended is not None:
            ended.shutdown(cancel_futures=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowThreads:
        """Return itself: a copy of a network works with the threads of the network."""
        return self

    def run(self, kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
        """Call ``kernel(*arguments, start, stop)`` until all of [0, rows) is done."""
        pool = self._pool
        if pool is None:
            kernel(*arguments, 0, rows)
            return
        chunk = max(1, -(-rows // (self.threads * _CHUNKS_PER_THREAD)))
        starts = range(0, rows, chunk)
        futures = [pool.submit(kernel, *arguments, start, min(start + chunk, rows)) for start in starts]
        for future in futures:
            future.result()


@contextmanager
def torch_threads(most: int, least: int = 1) -> Iterator[None]:
    """Run the network on stock's number of threads, or `least` if more: its output on the CPU depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(least, min(most, threads)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
