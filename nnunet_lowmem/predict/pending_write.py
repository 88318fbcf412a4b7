"""The files of one case, written in a thread while the next case is computed.

The thread begins when it is told to. Until then exactly the label map is held, so that what else is in use can be
measured and the next case planned beside the writing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_S = 1.0


class PendingWrite:
    """A case that is computed and not yet on the disk.

    Parameters
    ----------
    write : callable
        Writes the files, and forgets the label map when it returns.
    map_bytes : int
        RAM that the label map may take.
    resident_bytes : int
        What of it has been written to, and is in use for certain.
    writer_bytes : int
        What writing takes beside it.
    """

    def __init__(self, write: Callable[[], None], map_bytes: int, resident_bytes: int, writer_bytes: int) -> None:
        self.map_bytes = map_bytes
        self.resident_bytes = resident_bytes
        self.writer_bytes = writer_bytes
        self._write: Callable[[], None] | None = write
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

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
