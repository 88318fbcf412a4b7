"""Predict with stock nnU-Net, one case after the other, and write when each stage began and ended.

    python run.py stock_stages.json -- python stock_stages.py -m MODEL -i IMAGES -o OUT -f 0 --disable_tta

Stock's sequential API, so no pool and no pickled logits: the seconds are those of the work itself, the peak is lower
than the command's. Events go to the file named by ``nnUNet_lowmem_trace``, as `run.py` reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference import predict_from_raw_data as stock

TRACE = "nnUNet_lowmem_trace"


class Trace:
    """The case that is being worked on, and the file of events."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.number = 0

    def event(self, name: str) -> None:
        if self.file is not None:
            with open(self.file, "a") as lines:
                lines.write(json.dumps({"time": time.time(), "event": name, "case": str(self.number)}) + "\n")

    def around(self, function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
        def traced(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.event(before)
            result = function(*args, **kwargs)
            self.event(after)
            return result

        return traced

    def next_case(self, export: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any, **kwargs: Any) -> Any:
            result = export(*args, **kwargs)
            self.event("case_end")
            self.number += 1
            return result

        return traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", required=True, help="model folder")
    parser.add_argument("-i", required=True, help="folder of images")
    parser.add_argument("-o", required=True, help="folder for the label maps")
    parser.add_argument("-f", nargs="+", type=int, default=[0], help="folds")
    parser.add_argument("--disable_tta", action="store_true")
    args = parser.parse_args()
    trace = Trace(os.environ.get(TRACE))
    torch.set_num_threads(os.cpu_count() or 1)
    predictor = stock.nnUNetPredictor(use_mirroring=not args.disable_tta, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(args.m, tuple(args.f))
    preprocessor = predictor.configuration_manager.preprocessor_class
    preprocessor.run_case = trace.around(preprocessor.run_case, "preprocessing_start", "preprocessing_end")
    predict = predictor.predict_logits_from_preprocessed_data
    predictor.predict_logits_from_preprocessed_data = trace.around(predict, "first_tile", "prediction_end")
    export = trace.around(stock.export_prediction_from_logits, None, "export_end")
    stock.export_prediction_from_logits = trace.next_case(export)
    Path(args.o).mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(args.i, args.o)


if __name__ == "__main__":
    main()
