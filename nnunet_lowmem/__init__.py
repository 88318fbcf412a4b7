"""nnU-Net v2 prediction in bounded memory, with stock nnU-Net's labels.

``from nnunet_lowmem import LowMemPredictor`` gives a drop-in replacement for ``nnUNetPredictor``; beside it are the
errors that it raises and what it tells its callbacks. Importing this package imports neither torch nor nnU-Net; each
name is loaded when it is first asked for. ``enable`` puts the predictor in the place of ``nnUNetPredictor`` for tools
that know nothing of it, ``disable`` takes it back.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_lowmem.budget.plan import Plan
    from nnunet_lowmem.errors import (
        BudgetError,
        CasesFailedError,
        DamagedFileError,
        LowMemError,
        MemoryExhaustedError,
        ModelError,
        NetworkOutputError,
        NonFiniteLogitsError,
        UsageError,
        WorkerError,
        WriteError,
    )
    from nnunet_lowmem.nnunet.switching import disable, enable
    from nnunet_lowmem.predict.outcomes import CaseReport
    from nnunet_lowmem.predictor import LowMemPredictor
    from nnunet_lowmem.system.clock import Progress

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "CaseReport",
    "CasesFailedError",
    "DamagedFileError",
    "LowMemError",
    "LowMemPredictor",
    "MemoryExhaustedError",
    "ModelError",
    "NetworkOutputError",
    "NonFiniteLogitsError",
    "Plan",
    "Progress",
    "UsageError",
    "WorkerError",
    "WriteError",
    "__version__",
    "disable",
    "enable",
]

_ROOMS = {
    "CaseReport": "predict.outcomes",
    "LowMemPredictor": "predictor",
    "Plan": "budget.plan",
    "Progress": "system.clock",
    "disable": "nnunet.switching",
    "enable": "nnunet.switching",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
