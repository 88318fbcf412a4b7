"""One case: from a preprocessed image to the segmentation in the file's axes, its probabilities, and its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from numpy.typing import NDArray

from nnunet_lowmem import export, model_files, nnunet_adapter
from nnunet_lowmem.budget import machine_budget
from nnunet_lowmem.cases import Job
from nnunet_lowmem.clock import StageClock, trace
from nnunet_lowmem.files import atomic_output
from nnunet_lowmem.labelling import LabelRule, LogitsSlab
from nnunet_lowmem.logits_predictor import LogitsPredictor
from nnunet_lowmem.planner import Budget, CaseFacts, Plan, plan_case
from nnunet_lowmem.preprocessing import preprocess_array, preprocess_case
from nnunet_lowmem.probabilities import label_and_export, npz_sink
from nnunet_lowmem.spill import PlaneStore
from nnunet_lowmem.threads import RowThreads
from nnunet_lowmem.tiling import tile_grid
from nnunet_lowmem.types import PreprocessedCase

logger = logging.getLogger(__name__)

Segmentation = NDArray[Any]
Result = Segmentation | tuple[Segmentation, NDArray[np.float32]] | None


class CasePredictor(LogitsPredictor):
    """The part of the predictor that takes one case from its files to its outputs."""

    def estimate(self, source_folder: str) -> Iterator[Plan]:
        """Plan every case of a folder from its header: upper bounds, since the nonzero crop is not known yet."""
        budget = machine_budget(self.max_ram, self.max_vram, self.device)
        facts = self._model_facts()
        file_ending = self.dataset_json["file_ending"]
        for files in model_files.list_cases(source_folder, file_ending):
            geometry = nnunet_adapter.uncropped_geometry(files, self.plans_manager, self.configuration_manager)
            case = CaseFacts(
                name=model_files.case_name(files, file_ending),
                grid=tile_grid(
                    geometry.network_shape, tuple(self.configuration_manager.patch_size), self.tile_step_size
                ),
                original_shape=geometry.original_shape,
                cropped_shape=geometry.cropped_shape,
                streams=nnunet_adapter.label_rule(self.label_manager) is not None,
            )
            yield plan_case(
                facts, case, replace(budget, binding=False), self.device.type, self.perform_everything_on_device
            )

    def _plan(self, case: PreprocessedCase, name: str, budget: Budget, streams: bool) -> Plan:
        geometry = nnunet_adapter.case_geometry(case.image.shape[1:], case.properties)
        facts = CaseFacts(name, self._grid(case), geometry.original_shape, geometry.cropped_shape, streams)
        plan = plan_case(self._model_facts(), facts, budget, self.device.type, self.perform_everything_on_device)
        if self.on_plan is not None:
            self.on_plan(plan)
        return plan

    def _segment(
        self, case: PreprocessedCase, job: Job, clock: StageClock, budget: Budget, folder: Path, probabilities: bool
    ) -> tuple[Result, Plan]:
        """Segmentation of a preprocessed case, in the axis order and grid of the file.

        Probabilities are returned, or written where the job has an output.
        """
        geometry = nnunet_adapter.case_geometry(case.image.shape[1:], case.properties)
        rule = nnunet_adapter.label_rule(self.label_manager)
        resampling = nnunet_adapter.logits_resampling(
            self.plans_manager, self.configuration_manager, geometry, case.properties
        )
        by_softmax = probabilities or (nnunet_adapter.TAKES_ARGMAX_OF_SOFTMAX and rule is not None and rule.ranked)
        streams = rule is not None and resampling.tables is not None and not by_softmax
        plan = self._plan(case, job.name, budget, streams)
        grid = self._grid(case)
        with ExitStack() as stack:
            threads = stack.enter_context(RowThreads(self.kernel_threads))
            stack.enter_context(clock.stage("prediction"))
            trace("first_tile", job.name)
            slabs = stack.enter_context(self._final_slabs(case, grid, plan, threads, folder))
            if rule is None:
                return self._convert_as_stock(slabs, case, clock, probabilities), plan
            if streams:
                labels = export.label_slabs(slabs, resampling, geometry, rule, threads, clock)
                return self._to_file_axes(labels), plan
            store = stack.enter_context(
                PlaneStore(self.label_manager.num_segmentation_heads, grid.image_shape, grid.roll_axis, folder)
            )
            export.store_slabs(slabs, store)
            heads = export.ResampledHeads(store, resampling, geometry.cropped_shape, threads)
            with clock.stage("export"):
                if not by_softmax:
                    return self._to_file_axes(export.label_heads(heads, geometry, rule)), plan
                if not probabilities:
                    return self._to_file_axes(label_and_export(heads, geometry, rule, None)), plan
                return self._probabilities(heads, geometry, rule, job, case.properties), plan

    def _to_file_axes(self, labels: NDArray[Any]) -> NDArray[Any]:
        return labels.transpose(self.plans_manager.transpose_backward)

    def _probabilities(
        self,
        heads: export.ResampledHeads,
        geometry: nnunet_adapter.CaseGeometry,
        rule: LabelRule,
        job: Job,
        properties: dict[str, Any],
    ) -> Result:
        """Return (segmentation, probabilities), or write the probabilities and return the segmentation."""
        backward = self.plans_manager.transpose_backward
        if job.output is None:
            collected: list[NDArray[np.float32]] = []
            labels = label_and_export(heads, geometry, rule, lambda head: collected.append(head.copy()))
            stacked = np.stack(collected).transpose([0, *(axis + 1 for axis in backward)])
            return self._to_file_axes(labels), stacked
        shape = tuple(geometry.original_shape[axis] for axis in backward)
        with (
            atomic_output(Path(job.output + ".npz")) as path,
            npz_sink(path, heads.heads, shape, backward, np.dtype(self.probabilities_dtype)) as sink,
        ):
            labels = label_and_export(heads, geometry, rule, sink)
        nnunet_adapter.write_properties(properties, job.output + ".pkl")
        return self._to_file_axes(labels)

    def _convert_as_stock(
        self, slabs: Iterator[LogitsSlab], case: PreprocessedCase, clock: StageClock, probabilities: bool
    ) -> Result:
        """Hold all logits and let stock convert them: for label managers whose rule is not known here."""
        logger.warning(
            "label manager %s is not nnU-Net's own: all logits are held for it, so memory is not bounded",
            type(self.label_manager).__name__,
        )
        shape = self._grid(case).image_shape
        logits = export.collect_slabs(slabs, self.label_manager.num_segmentation_heads, shape)
        with clock.stage("export"):
            return convert_predicted_logits_to_segmentation_with_correct_shape(  # type: ignore[no-any-return]  # stock's
                logits.cpu().numpy(),
                self.plans_manager,
                self.configuration_manager,
                self.label_manager,
                case.properties,
                return_probabilities=probabilities,
            )

    def _preprocess_files(self, files: list[str], previous_stage: str | None) -> PreprocessedCase:
        return preprocess_case(
            files,
            previous_stage,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            threads=self.kernel_threads,
            verbose=self.verbose_preprocessing,
            accept_nan=self.accept_nan,
        )

    def _preprocess_array(
        self, image: NDArray[Any], previous_stage: NDArray[Any] | None, properties: dict[str, Any]
    ) -> PreprocessedCase:
        return preprocess_array(
            image,
            previous_stage,
            properties,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            threads=self.kernel_threads,
            verbose=self.verbose_preprocessing,
            accept_nan=self.accept_nan,
        )

    # -- files -------------------------------------------------------------------------------------------------------

    def _write(self, result: Result, output: str, properties: dict[str, Any]) -> None:
        """Write through the model's own writer; each file appears under its name when it is complete."""
        assert result is not None
        segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
        if probabilities is not None:
            nnunet_adapter.write_probabilities(probabilities, output + ".npz")
            nnunet_adapter.write_properties(properties, output + ".pkl")
        nnunet_adapter.write_segmentation(
            segmentation, properties, output + self.dataset_json["file_ending"], self.plans_manager
        )
