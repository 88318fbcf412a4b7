"""Which cases a call about files is about, and where the outputs of each go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.nnunet import adapter, model_files
from nnunet_lowmem.predict.jobs import Job, jobs_of_files, of_folder
from nnunet_lowmem.predict.listeners import logging_prints
from nnunet_lowmem.predict.setup import Setup, checksum


def list_jobs(
    arguments: dict[str, Any],
    overwrite: bool,
    part: tuple[int, int],
    probabilities: bool,
    setup: Setup,
    manage: Callable[..., Any],
    is_listed: bool,
) -> list[Job]:
    """List the cases; beside the outputs is written what stock writes for a run as a whole.

    Parameters
    ----------
    arguments : dict
        Those of ``predict_from_files``, as stock records them.
    overwrite : bool
        Predict what is there already.
    part : (int, int)
        Which part of how many, from 0.
    probabilities : bool
        Are written, too.
    setup : Setup
    manage : callable
        The predictor's ``_manage_input_and_output_lists``.
    is_listed : bool
        That is somebody else's: it says by itself which cases there are.

    Raises
    ------
    UsageError
        If there is no such part, or segmentations of a cascade's first stage are missing.
    """
    part_id, parts = part
    if part_id > parts:
        raise twin(UsageError, AssertionError)(f"part_id counts from 0; {part_id} is above num_parts {parts}")
    source, ending = arguments["list_of_lists_or_source_folder"], setup.file_ending
    target = adapter.outputs(arguments["output_folder_or_list_of_truncated_output_files"])
    stage_folder = arguments["folder_with_segs_from_prev_stage"]
    previous_stage = setup.configuration_manager.previous_stage_name
    if previous_stage is not None and stage_folder is None:
        raise twin(UsageError, AssertionError)(
            f"this configuration is the second stage of a cascade and needs the segmentations of "
            f"{previous_stage!r}: give their folder with -prev_stage_predictions"
        )
    adapter.write_run_files(target, arguments, setup.dataset_json, setup.plans_manager.plans)
    folder = source if isinstance(source, str) else None
    if folder is not None:
        model_files.tell_skipped(folder, ending)
        source = source if is_listed else model_files.list_cases(folder, ending)
    with logging_prints():
        cases, outputs, stages = manage(
            source, target, stage_folder, overwrite or not is_listed, part_id, parts, probabilities
        )
    stages = stages or [None] * len(cases)
    if outputs is not None and len(outputs) > len(cases):  # nnU-Net 2.5 gives each part the names of all
        outputs = outputs[part_id::parts]
    model_files.check_previous_stage(cases, stages, ending)
    endings = [ending, ".npz", ".pkl"] if probabilities else [ending]
    jobs = jobs_of_files(cases, outputs, stages, endings, lambda: checksum(setup, probabilities))
    return jobs if folder is None else of_folder(jobs, folder, ending, overwrite)
