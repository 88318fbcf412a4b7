"""Trainers whose validation at the end of training runs in bounded memory, and which are stock's in all else."""

from __future__ import annotations

from typing import Any

from nnunet_lowmem.predictor import LowMemPredictor


class LowMemValidation:
    """A mixin for any nnU-Net trainer: ``class MyTrainerLowMem(LowMemValidation, MyTrainer): pass``.

    Notes
    -----
    A class that adds nothing but the mixin takes the name of its trainer, since nnU-Net names results and checkpoints
    after the class: so folds that are already trained are found, and checkpoints load where this package is not
    installed. A class that has anything of its own is another trainer and keeps its own name.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = [name for name in vars(cls) if name == "__init__" or not name.startswith("__")]
        if LowMemValidation in cls.__bases__ and not own:
            cls.__name__ = next(base.__name__ for base in cls.__bases__ if base is not LowMemValidation)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as the trainer does: the same files, the same ``summary.json``."""
        if not LowMemPredictor.perform_actual_validation(self, save_probabilities):
            super().perform_actual_validation(save_probabilities)  # type: ignore[misc]  # the trainer's
