"""The errors that this package raises on purpose.

Every message says what happened, with both numbers where two disagree, in which case and stage, and what to change.
Each class carries the exit code that the command line returns for it.

Clients catch what stock raises: `FileNotFoundError`, `RuntimeError`, torch's error, ... So an error of ours is also of
the kind that stock raises in that place, by a `twin` of its class; where another error has led to it, of that error's
kind, with it as the cause (`because`).
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar


class LowMemError(Exception):
    """Base of all errors raised on purpose; anything else is a bug or comes from nnU-Net, torch or the system."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as it stands: a KeyError would quote it, an OSError put its number first."""
        return Exception.__str__(self)


class UsageError(LowMemError):
    """The request cannot be carried out as it stands: a wrong flag, a missing folder, an unusable device."""

    exit_code = 2


class BudgetError(LowMemError):
    """The planned peak does not fit the budget; raised before any work starts.

    Attributes
    ----------
    place : Place
        Where it does not fit.
    """

    exit_code = 3
    place: Any = None


class MemoryExhaustedError(LowMemError):
    """Memory ran out although the plan fits, and every step down the ladder has been taken."""


class ModelError(UsageError):
    """The model folder is incomplete or contradicts itself."""


class NonFiniteLogitsError(LowMemError, RuntimeError):
    """The accumulated logits hold infinity or NaN; stock nnU-Net raises RuntimeError for infinity, too."""


class NetworkOutputError(LowMemError, RuntimeError):
    """The network made something else of a tile than logits of its shape; stock raises RuntimeError, too."""


class WorkerError(LowMemError):
    """A worker process failed, died or stalled."""


class DamagedFileError(LowMemError):
    """A file ends too early, contradicts its own checksum, or is not what it should be."""


class WriteError(LowMemError, OSError):
    """An output file could not be written whole; nothing is left under its final name."""


class CasesFailedError(LowMemError):
    """Some cases of a run failed; the others are done.

    Attributes
    ----------
    report : RunReport
        What is done, failed and skipped; set by whoever raises this.
    results : list
        One result per case as the method returns it, None for those that failed.
    """

    report: Any = None
    results: Any = None


# -- of the kind that stock raises -------------------------------------------------------------------------------------

Ours = TypeVar("Ours", bound=LowMemError)

# by their names: these cannot be made of a message alone
_NOT_OF_A_MESSAGE = ("UnicodeError", "UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError")
# the one kind beside Python's own; known by its name, since torch need not be loaded
_OF_TORCH = "OutOfMemoryError"


def twin(ours: type[Ours], *kinds: type[BaseException]) -> type[Ours]:
    """Return the class that is one of ours and of other kinds, too; it has our name, and its errors can be pickled.

    Parameters
    ----------
    ours : type
    *kinds : type
        Python's or torch's, or derived from these: the nearest of them counts, and all of which a twin is.
    """
    own: Any
    own, known = getattr(ours, "_twin_of", (ours, ()))
    others = [each for kind in kinds for each in (kind, *getattr(kind, "_twin_of", (kind, ()))[1])]
    every = (own, *dict.fromkeys([*known, *map(_nearest, others)]))
    narrow = (kind for kind in every[1:] if not any(other is not kind and issubclass(other, kind) for other in every))
    made: type[Ours] = _made(own, tuple(narrow))
    return made


@cache
def _made(own: Any, kinds: tuple[type[BaseException], ...]) -> Any:
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        twins = {**names, "_twin_of": (own, kinds), "__reduce__": _reduced}
        return type(own.__name__, (own, *kinds), twins) if kinds else own
    except TypeError:  # such objects are laid out in memory in different ways
        return _made(own, kinds[:-1])


def _nearest(kind: type[BaseException]) -> type[BaseException]:
    known = (
        cls
        for cls in kind.__mro__
        if cls.__name__ == _OF_TORCH or (cls.__module__ == "builtins" and cls.__name__ not in _NOT_OF_A_MESSAGE)
    )
    return next(known)


def _reduced(error: Any) -> tuple[Any, ...]:
    return _again, (*error._twin_of, error.args), error.__dict__


def _again(own: Any, kinds: tuple[type[BaseException], ...], arguments: tuple[Any, ...]) -> Any:
    return _made(own, kinds)(*arguments)


def because(ours: type[Ours], message: str, cause: BaseException) -> Ours:
    """Make an error of ours whose cause is another, and which is of its kind, too."""
    error = twin(ours, type(cause))(message)
    error.__cause__ = cause
    if isinstance(cause, OSError) and isinstance(error, OSError):
        error.errno, error.strerror, error.filename = cause.errno, cause.strerror, cause.filename
    return error


def missing(ours: type[Ours], message: str, path: object) -> Ours:
    """Make an error of ours about a file or folder that is not there; it is a `FileNotFoundError`, too."""
    return because(ours, message, FileNotFoundError(errno.ENOENT, "No such file or directory", str(path)))


@contextmanager
def also(*kinds: type[BaseException]) -> Iterator[None]:
    """Let errors of ours that leave the block be of other kinds, too: of what stock raises where it is called from."""
    try:
        yield
    except LowMemError as error:
        raise of_kinds(error, *kinds) from error.__cause__


def of_kinds(error: Ours, *kinds: type[BaseException]) -> Ours:
    """Return an error of ours, or one that says the same and is of other kinds, too."""
    cls = twin(type(error), *kinds)
    if isinstance(error, cls):
        return error
    again = cls(*error.args)
    again.__dict__.update(error.__dict__)
    again.__cause__ = error.__cause__
    return again.with_traceback(error.__traceback__)


def without_frames(error: BaseException) -> None:
    """Let go of the frames of an error, and of what led to it: they hold the arrays of a case."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
            waiting += [link.__cause__, link.__context__]
