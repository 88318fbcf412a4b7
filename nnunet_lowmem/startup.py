"""Imported when Python starts, if the variable ``nnUNet_predictor`` is set; see ``setup.py`` for who imports it."""

from __future__ import annotations

import logging
import os

from nnunet_lowmem.nnunet.switching import VARIABLE, Choice, want
from nnunet_lowmem.system import allocator


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows the lines of this package on stderr where nobody else does: neither the program nor our command."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger("nnunet_lowmem").handlers == [self] and not logging.getLogger().handlers:
            super().emit(record)


def start() -> None:
    """Do what the environment asks for."""
    logger = logging.getLogger("nnunet_lowmem")
    if name := os.environ.get(VARIABLE):
        if not any(isinstance(handler, _LastResort) for handler in logger.handlers):
            logger.setLevel(logging.INFO)
            logger.addHandler(_LastResort())
        allocator.own_process()
        want(Choice(name))


start()
