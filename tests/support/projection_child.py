"""Predicts a folder in a process of its own and tells, as JSON, what was projected and what was measured."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
import time
from pathlib import Path

import numpy as np

from nnunet_lowmem.system import allocator

if __name__ == "__main__":
    allocator.own_process()  # as a command does, before torch is there

import torch

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.budget.planner import all_plans, certain
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.network.trial import Trial
from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.predict import case, ways
from nnunet_lowmem.system.memory_held import PeakSampler
from nnunet_lowmem.types import Place


class Log(logging.Handler):
    """Keeps what is told."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def data_bytes() -> int:
    return 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x).split()[1])


class WatchedPlanning(CasePlanning):
    """Keeps the latest planning that has begun; limits it where that is asked for."""

    latest: CasePlanning
    limit = False
    short_of_memory = False

    def check(self) -> None:
        """Let no more be taken than the budget of the case leaves."""
        WatchedPlanning.latest = self
        super().check()
        if self.limit:
            left = self.budget.ram_bytes - self.budget.reserved_ram_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + left,) * 2)

    def allocate(self, shape, dtype):
        """No room for an image in RAM. The error is made up: what the kernel refuses depends on what was freed."""
        image = super().allocate(shape, dtype)
        if self.short_of_memory and not isinstance(image, np.memmap):
            raise MemoryError(f"no room for {image.nbytes} bytes")
        return image


def slow_writer() -> None:
    """A writer that has all it needs and is not done before the next case is well under way."""
    real = label_writing.write_segmentation

    def write_slowly(segmentation, *arguments):
        copy = np.array(segmentation)
        real(segmentation, *arguments)
        time.sleep(6)
        del copy

    label_writing.write_segmentation = write_slowly


def predict_arrays(predictor: LowMemPredictor, images: str, output: str) -> None:
    """Read the case as a client does, and give its array, in memory order of its own."""
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images(sorted(map(str, Path(images).iterdir())))
    Path(output).mkdir()
    predictor.predict_from_list_of_npy_arrays([np.asfortranarray(array)], None, [properties], [f"{output}/case0"])


def first_image(folder: str) -> Path:
    """An image serves as a mask as well: few of its voxels are 0."""
    return min(Path(folder).iterdir())


def choose_bfloat16() -> None:
    """Run both ways as ever, and take bfloat16 whatever they show: with a tiny network it may be slower."""
    real = ways.try_both

    def try_both(*arguments, **keywords):
        real(*arguments, **keywords)
        return Trial(2.0, 1.0, 0.01, 1.0)

    ways.try_both = try_both
    ways.choices.remembered = lambda _: None
    ways.choices.remember = lambda *_: None


def main() -> None:
    options = json.loads(sys.argv[1])
    told = []

    def tell(report) -> None:
        placement = report.plan.placement
        told.append(
            {
                "projected": report.plan.projected_bytes(Place.RAM),
                "budget": report.plan.budget.ram_bytes,
                "reserved": report.plan.budget.reserved_ram_bytes,
                "measured": report.peak_bytes,
                "stages": report.measured_bytes,
                "planned": {
                    s.value: report.plan.planned_bytes(Place.RAM, s) for s in type(report.plan.fullest_stage(Place.RAM))
                },
                "placement": {name: getattr(value, "value", value) for name, value in vars(placement).items()},
                "allocations": [(a.name, a.place.value, a.size_bytes) for a in report.plan.allocations],
            }
        )

    if options.get("fast") == "bfloat16":
        choose_bfloat16()
    if options.get("slow_writer"):
        slow_writer()
    predictor = LowMemPredictor(
        device=torch.device("cpu"),
        use_mirroring=options.get("mirroring", False),
        allow_tqdm=False,
        max_ram=options.get("max_ram"),
        tmp_dir=options["tmp_dir"],
        on_case=tell,
        prefetch=options.get("prefetch"),
        kernel_threads=options.get("threads", 2),
        report=options.get("report", False),
        fast=options.get("fast", False),
        bbox=options.get("bbox"),
        roi=first_image(options["images"]) if options.get("region") else None,
    )
    with PeakSampler(0.005) as sampler:
        predictor.initialize_from_trained_model_folder(options["model"], options.get("folds", [0]))
    WatchedPlanning.limit = bool(options.get("limit"))
    WatchedPlanning.short_of_memory = bool(options.get("short_of_memory"))
    case.CasePlanning = WatchedPlanning
    logging.getLogger("nnunet_lowmem").addHandler(log := Log(logging.WARNING))
    error = None
    try:
        predict = predict_arrays if options.get("arrays") else LowMemPredictor.predict_from_files
        predict(predictor, options["images"], options["output"])
    except CasesFailedError as failure:
        error = str(failure)
    outputs = sorted(Path(options["output"]).glob("*.nii.gz"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs]
    left = [str(path) for path in Path(options["tmp_dir"]).iterdir()]
    planning = WatchedPlanning.latest
    plans = all_plans(certain(planning.model), planning.header, planning.budget)
    least = min(plan.projected_bytes(Place.RAM) for plan in plans)
    pages = [path.name for path in Path(options["output"]).glob("*.html")]
    found = {"outputs": digests, "left": left, "error": error, "log": log.told, "pages": pages}
    found["loading"] = sampler.peak_bytes()
    print(json.dumps({"least": least, "cases": told, **found}))


if __name__ == "__main__":
    main()
