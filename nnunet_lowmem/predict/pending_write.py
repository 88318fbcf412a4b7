"""The files of one case, written in a thread while the next case is computed.

The thread begins when it is told to. Until then exactly the label map is held (nothing where the labels have left for
their file), so that what else is in use can be measured and the next case planned beside the writing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.budget.arrays import THREAD_BYTES

_LOOK_S = 1.0


class PendingWrite:
    """A case that is computed and not yet on the disk.

    Parameters
    ----------
    write : callable
        Writes the files, and forgets the label map when it returns.
    all_bytes : int
        RAM that is free again when they are there.
    further_bytes : int
        What of it is not in use before the writing begins.
    """

    def __init__(self, write: Callable[[], None], all_bytes: int = 0, further_bytes: int = 0) -> None:
        self.all_bytes = all_bytes
        self.further_bytes = further_bytes
        self._write: Callable[[], None] | None = write
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    @staticmethod
    def of(
        write: Callable[[], None], labels: NDArray[Any], cropped_shape: Sequence[int], writer_bytes: int
    ) -> PendingWrite:
        """Return that of a label map, which may lie on disk and is 0 beyond its cropped part.

        `writer_bytes` is what writing takes beside the map.
        """
        map_bytes = 0 if isinstance(labels, np.memmap) else labels.nbytes
        # nothing is written around the crop: those pages take no memory
        resident_bytes = min(map_bytes, math.prod(cropped_shape) * labels.itemsize)
        all_bytes = map_bytes + writer_bytes + THREAD_BYTES
        return PendingWrite(write, all_bytes, all_bytes - resident_bytes)

    @staticmethod
    def of_file(write: Callable[[], None], writer_bytes: int) -> PendingWrite:
        """Return that of a file that holds all labels, to be ended, verified and named."""
        all_bytes = writer_bytes + THREAD_BYTES
        return PendingWrite(write, all_bytes, all_bytes)

    @property
    def is_over(self) -> bool:
        """Whether the files are there, or failed."""
        return self._over.is_set()

    def start(self) -> None:
        """Begin, unless it has begun; where no thread can be had, write here and now."""
        if self._thread is not None:
            return
        # no daemon: a run that is interrupted twice still ends with whole files
        self._thread = threading.Thread(target=self._run, name="nnunet_lowmem writer", daemon=False)
        try:
            self._thread.start()
        except RuntimeError:
            self._run()

    def wait(self) -> None:
        """Return when it is over and the thread has ended."""
        self.start()
        assert self._thread is not None, "it has begun"
        while not self._over.wait(_LOOK_S):
            if not self._thread.is_alive():  # a signal came before it could begin
                self._run()
        if self._thread.is_alive():
            self._thread.join()

    def result(self) -> None:
        """Wait, and raise what went wrong, once."""
        self.wait()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its frames would hold it, and this one is among them

    def _run(self) -> None:
        """Write, unless that has begun elsewhere."""
        write, self._write = self._write, None
        if write is None:
            return
        try:
            write()
        except BaseException as error:  # whoever waits raises it
            self._error = error
            if threading.current_thread() is not self._thread and not isinstance(error, Exception):
                raise
        finally:
            del write
            self._over.set()
