"""From what a job names to the preprocessed case, with the threads and into the memory that the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.budget.facts import CaseFacts
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.predict.jobs import Array, Files, Item, Job, Refused
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.stored import image_bytes, stored
from nnunet_lowmem.preprocessing.case import preprocess_array, preprocess_case
from nnunet_lowmem.types import PreprocessedCase

#: Makes the preprocessed case of a job; the planning is of the case that is under way, if it is planned.
Load = Callable[[Job, Setup, CasePlanning | None], PreprocessedCase]


def load(job: Job, setup: Setup, planning: CasePlanning | None) -> PreprocessedCase:
    """Read and preprocess a case in this process, or take it as an iterator gave it.

    Raises
    ------
    UsageError
        If it cannot be right.
    BudgetError
        If it does not fit once it is cropped.
    """
    source = job.source
    if job.piece is not None and job.piece.stored is not None:
        assert planning is not None, "a piece is planned"
        room = planning.budget.disk_bytes
        fits_disk = room is None or image_bytes(job.piece.stored) < room
        return stored(job.piece.stored, planning.folder if fits_disk else None)
    options: dict[str, Any] = {
        "threads": 1 if planning is None else planning.threads,
        "allocate": np.empty if planning is None else planning.allocate,
        "verbose": setup.verbose_preprocessing,
        "accept_nan": setup.options.accept_nan,
    }
    model = (setup.plans_manager, setup.configuration_manager, setup.dataset_json)
    if isinstance(source, Files):
        if planning is not None:
            options |= {"spill": planning.spill(), "keeps_image": planning.keeps_image}
        options["spacing"] = setup.spacing
        return preprocess_case(source.images, source.stage, *model, **options)
    if isinstance(source, Array) and not source.by_adapter:
        return preprocess_array(source.image, source.stage, source.properties, *model, **options)
    if isinstance(source, Array):
        item = stock_calls.item_of_adapter(source.image, source.stage, source.properties, *model, setup.verbose)
        return _as_it_is(item["data"], item["data_properties"])
    if isinstance(source, Item):
        return _as_it_is(source.data, source.properties)
    assert isinstance(source, Refused), "who knows a data set loads its cases"
    raise source.kind(source.text)


def items_of(jobs: Iterable[Job], setup: Setup) -> Iterator[dict[str, Any]]:
    """Preprocess one case after the other in this process, and give what stock's iterators give."""
    for job in jobs:
        case = load(job, setup, None)
        data = stock_calls.network_input(case, setup.label_manager)
        yield {"data": data, "ofile": job.output, "data_properties": case.properties}


def _as_it_is(data: Any, properties: dict[str, Any]) -> PreprocessedCase:
    """Take a preprocessed image: a tensor, an array, or the path of a .npy file, which is removed once it is read."""
    if isinstance(data, str):
        path, data = Path(data), np.load(data)
        path.unlink()
    return PreprocessedCase(data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else data, None, properties)


def facts_of_job(sizes: CaseSizes, job: Job, probabilities: bool) -> CaseFacts | None:
    """Return upper bounds of a case by its headers, or by its array; None where there is neither.

    Raises
    ------
    UsageError
        If a header cannot be read, or the array is no image.
    """
    source = job.source
    if isinstance(source, Files):
        return sizes.of_files(job.name, source.images, source.stage, probabilities, source.roi)
    if isinstance(source, Array) and not source.by_adapter:
        return sizes.of_array(job.name, source.image, source.stage, source.properties, probabilities)
    return None
