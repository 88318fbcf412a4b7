"""Stock's way over an iterator of preprocessed cases, where somebody else makes the iterator, or takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.lookup import IN_WORKERS_BEFORE, tell
from nnunet_lowmem.predict.case import CasePredictor
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.writing import Result


def predict_iterated(
    predictor: CasePredictor, jobs: Sequence[Job], arguments: dict[str, Any], probabilities: bool
) -> list[Result] | None:
    """Let the predictor's own methods make and take the items.

    Parameters
    ----------
    predictor : CasePredictor
    jobs : sequence of Job
        Cases of files; at least one.
    arguments : dict
        Those of ``predict_from_files``: the numbers of processes count.
    probabilities : bool
    """
    items: Any = items_of(predictor, jobs)
    if tell(predictor, Step.FILES, Step.READING, *IN_WORKERS_BEFORE):
        for job in jobs:
            if job.files is None:  # one that cannot be right: it says why
                job.load()
        read = [job.files for job in jobs if job.files is not None]
        items = predictor._internal_get_data_iterator_from_lists_of_filenames(
            [files for files, _ in read],
            [stage for _, stage in read],
            None if jobs[0].output is None else [job.output for job in jobs],
            max(1, arguments["num_processes_preprocessing"]),
        )
    tell(predictor, Step.ITERATION)
    exporting = arguments["num_processes_segmentation_export"]
    return predictor.predict_from_data_iterator(items, probabilities, exporting)  # type: ignore[no-any-return]  # stock's


def items_of(predictor: CasePredictor, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Preprocess one case after the other in this process, and give what stock's iterators give."""
    predictor._planning = None  # nothing is planned: the folder of what was planned last is gone
    for job in jobs:
        case = job.load()
        data = stock_calls.network_input(case, predictor.label_manager)
        yield {"data": data, "ofile": job.output, "data_properties": case.properties}
