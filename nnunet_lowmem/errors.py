"""The errors that this package raises on purpose.

Every message says what happened, with both numbers where two disagree, in which case and stage, and what to change.
Each class carries the exit code that the command line returns for it.
"""

from __future__ import annotations

from typing import Any


class LowMemError(Exception):
    """Base of all errors raised on purpose; anything else is a bug or comes from nnU-Net, torch or the system."""

    exit_code = 1


class UsageError(LowMemError):
    """The request cannot be carried out as it stands: a wrong flag, a missing folder, an unusable device."""

    exit_code = 2


class BudgetError(LowMemError):
    """The planned peak does not fit the budget; raised before any work starts."""

    exit_code = 3


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
