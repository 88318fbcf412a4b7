"""nnU-Net looks here if ``nnUNet_extTrainer`` names this folder: any trainer with LowMem behind its name.

``nnUNetTrainerLowMem`` is ``nnUNetTrainer`` with a validation in bounded memory, ``nnUNetTrainer_250epochsLowMem`` is
``nnUNetTrainer_250epochs`` with it, and so on. nnU-Net before 2.8 does not look outside of itself: there, a copy of
this file in ``nnunetv2/training/nnUNetTrainer`` does the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_lowmem.training import LowMemValidation

try:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as _find
except ImportError:  # new in nnU-Net 2.8

    def _find(name: str) -> Any:
        folder = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
        return recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")


_SUFFIX = "LowMem"


def __getattr__(name: str) -> type:
    trainer = _find(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) and name != _SUFFIX else None
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (LowMemValidation, trainer), {"__module__": __name__})
