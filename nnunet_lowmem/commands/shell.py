"""What a command owes the shell that runs it: exit codes, one line per error, signals, and pipes that may close."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from nnunet_lowmem.errors import LowMemError
from nnunet_lowmem.names import shown
from nnunet_lowmem.system import signals

# of the dynamic linker, of the C library, of torch's allocator
_NO_MEMORY = ("failed to map segment", "annot allocate memory", "DefaultCPUAllocator")
_ENDED_BY = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}


def guarded(command: Callable[[], int], verbose: bool) -> int:
    """Run a command; turn exceptions into one line and an exit code.

    Parameters
    ----------
    command : callable
        Returns the exit code.
    verbose : bool
        Show tracebacks, too.
    """
    # go on in silence when whoever reads has gone: a run of hours is not about its messages
    out, err = contextlib.redirect_stdout(_Lasting(sys.stdout)), contextlib.redirect_stderr(_Lasting(sys.stderr))
    with out, err, _messages(verbose), signals.ending_on_signals():
        try:
            return command()
        except (signals.InterruptedBySignal, KeyboardInterrupt) as interrupt:
            number = int(getattr(interrupt, "number", signal.SIGINT))
            tell(_ENDED_BY.get(number, f"terminated ({signal.Signals(number).name})"))
            return 128 + number
        except Exception as error:
            if verbose:
                traceback.print_exc()
            known = isinstance(error, LowMemError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            hint = "" if known or verbose else " (--verbose shows where)"
            tell(f"error: {shown(text)}{'' if known else limit_of_memory(error)}{hint}")
            return error.exit_code if isinstance(error, LowMemError) else 1


def limit_of_memory(error: Exception) -> str:
    """Say which limit binds where memory could not be had, or address space for a library."""
    out = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not out and not any(words in str(error) for words in _NO_MEMORY):
        return ""
    try:  # with hardly any memory left
        from nnunet_lowmem.system.memory_limits import binding_now

        binding = binding_now()
    except Exception:
        return ""
    return f"; memory could not be had: {binding}" if binding else ""


def tell(line: str) -> None:
    """Say something that is no result."""
    sys.stderr.write(line + "\n")


@contextlib.contextmanager
def _messages(verbose: bool) -> Iterator[None]:
    """Show what this package logs: warnings on stderr, what it does on stdout."""
    logger = logging.getLogger("nnunet_lowmem")
    loud, quiet = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stdout)
    loud.setLevel(logging.WARNING)
    quiet.addFilter(lambda record: record.levelno < logging.WARNING)
    for handler in (loud, quiet):
        handler.setFormatter(_OneLine())
    former_level = logger.level
    logger.handlers += [loud, quiet]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.handlers = [handler for handler in logger.handlers if handler not in (loud, quiet)]
        logger.setLevel(former_level)


class _OneLine(logging.Formatter):
    """What is done, and ``warning: what happened``; what is for finding faults, tracebacks, as it stands."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno < logging.INFO:
            return text
        return shown(text) if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {shown(text)}"


class _Lasting:
    """A text stream whose reader may go; everything but writing is the stream's own."""

    def __init__(self, stream: TextIO | None) -> None:
        # Python gives none where the shell has closed it
        self._stream: Any = stream if stream is not None else io.StringIO()

    def write(self, text: str) -> int:
        """Write as far as somebody reads; what the stream cannot encode as Python writes it."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._silence()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write them all."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush as far as somebody reads."""
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Lead the stream nowhere; what it still holds would fail once more when Python ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
