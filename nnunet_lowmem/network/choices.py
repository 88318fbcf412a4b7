"""What has been found of a model on this machine, kept beside the compiled kernels: a file that can be made again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from nnunet_lowmem.network.trial import Trial
from nnunet_lowmem.system import compiler, platform

_logger = logging.getLogger(__name__)


def key_of(model: Any, tile_shape: tuple[int, ...]) -> str:
    """Return the name of a choice: it depends on the model, described by JSON-like data, on tiles and machine."""
    told = {"model": model, "tile": list(tile_shape)} | machine()
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def machine() -> dict[str, Any]:
    """Return what the bits of a network's output depend on beside the network, on the CPU."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        # what oneDNN is allowed to use
        "onednn": [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")],
    }


def remembered(key: str) -> Trial | None:
    """Return what was found before, if that can be read."""
    file = _file(key)
    try:
        return None if file is None else Trial(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _logger.debug("%s cannot be read, and is made again: %s", file, error)
        return None


def remember(key: str, trial: Trial) -> None:
    """Keep what was found; where that cannot be written it is found again the next time."""
    file = _file(key)
    if file is None:
        return
    try:
        compiler.keep(file, json.dumps(trial.as_json()).encode())
    except OSError as error:
        _logger.debug("%s cannot be written: %s", file, error)


def _file(key: str) -> Path | None:
    folder = compiler.cache_folder()
    return None if folder is None else folder / f"arithmetic-{key}.json"
