"""One thread pool for the compiled kernels, owned by whoever opens it; and how many threads torch may use meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_CHUNKS_PER_THREAD = 8


class RowThreads:
    """Runs kernels that take a range of rows, split over threads in its ``with`` block, else in the caller's.

    numba's own parallel loops are not used: their threading layer is shared by the whole process and clashes with
    torch's OpenMP and with kernels called from two threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> RowThreads:
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="nnunet-lowmem-kernel")
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RowThreads:
        """Return itself: a copy of a network works with the threads of the network."""
        return self

    def run(self, kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
        """Call ``kernel(*arguments, start, stop)`` until all of [0, rows) is done."""
        if self._pool is None:
            kernel(*arguments, 0, rows)
            return
        chunk = max(1, -(-rows // (self.threads * _CHUNKS_PER_THREAD)))
        starts = range(0, rows, chunk)
        futures = [self._pool.submit(kernel, *arguments, start, min(start + chunk, rows)) for start in starts]
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
