"""One side of a comparison, in a process of its own.

``python -m nnunet_lowmem.commands.one_side stock|ours MODEL FLAGS``, started by `report.compare`, runs the real
command of either side. Stock's stages get timers around its own functions, in its worker processes, too: these import
the main module, which is this one, as ``__mp_main__``. Ours writes its spans itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from nnunet_lowmem.report.compare import DETERMINISTIC
from nnunet_lowmem.report.measured_command import TILES
from nnunet_lowmem.system.clock import trace


def _timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            trace(stage, time.perf_counter() - start_s)

    return timed


def time_stages_of_stock() -> None:
    """Put timers around preprocessing, sliding window and export of the nnU-Net in this process."""
    from nnunetv2.inference import export_prediction, predict_from_raw_data
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    DefaultPreprocessor.run_case = _timed(DefaultPreprocessor.run_case, "preprocessing")
    predictor = predict_from_raw_data.nnUNetPredictor
    predictor.predict_logits_from_preprocessed_data = _timed(predictor.predict_logits_from_preprocessed_data, TILES)
    export = _timed(export_prediction.export_prediction_from_logits, "export")
    # the pool sends the function by its name, so both modules must know the same one
    export_prediction.export_prediction_from_logits = predict_from_raw_data.export_prediction_from_logits = export


def _run_stock(model_folder: str, flags: list[str]) -> int:
    time_stages_of_stock()
    from nnunetv2.inference import predict_from_raw_data

    # the command for datasets knows the sequential mode, the one for model folders does not
    predict_from_raw_data.get_output_folder = lambda *names: model_folder
    sys.argv = ["nnUNetv2_predict", "-d", "model", "-c", "model", *flags]
    predict_from_raw_data.predict_entry_point()
    return 0


def _run_ours(model_folder: str, flags: list[str]) -> int:
    from nnunet_lowmem.commands.cli import predict_entry_point

    return predict_entry_point(["-m", model_folder, *flags])


def make_deterministic() -> None:
    """Let CUDA's libraries use deterministic algorithms only, and not try which is the fastest today.

    nnU-Net switches the trials on whenever a predictor is made, hence the class that does not listen.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic = False, True
    always_off = property(lambda module: False, lambda module, value: None)
    cudnn.__class__ = type("Cudnn", (type(cudnn),), {"benchmark": always_off})


def main() -> int:
    """Run the side that the arguments name; return its exit code."""
    side, model_folder, *flags = sys.argv[1:]
    if DETERMINISTIC in flags:
        flags.remove(DETERMINISTIC)
        make_deterministic()
    try:
        return {"stock": _run_stock, "ours": _run_ours}[side](model_folder, flags)
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            trace("end", 0.0, vram_bytes=torch.cuda.max_memory_reserved())


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__mp_main__":
    time_stages_of_stock()
