"""The part of the predictor that writes the files of a case, and finds out beforehand whether they can be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.nnunet.rehearsing import rehearse
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.types import Shape3

Segmentation = NDArray[Any]
Result = Segmentation | tuple[Segmentation, NDArray[np.float32]] | None


class CaseWriting:
    """Writes through the model's own writer."""

    plans_manager: Any
    dataset_json: Any

    def _rehearse(
        self,
        output: str,
        properties: dict[str, Any],
        shape: Shape3,
        rule: LabelRule | None,
        clock: StageClock,
        folder: Path,
    ) -> None:
        """Let a case fail before it is computed if its label map, of `shape` in the network's axes, has no writer."""
        in_file = [shape[axis] for axis in self.plans_manager.transpose_backward]
        ending = self.dataset_json["file_ending"]
        with clock.failing_in("writing"):
            rehearse(self.plans_manager.image_reader_writer_class, output, ending, properties, in_file, rule, folder)

    def _write_files(self, result: Result, job: Job, properties: dict[str, Any]) -> None:
        assert job.output is not None, "a case without an output is not written"
        self._write(result, job.output, properties)
        if job.recipe is not None:
            job.recipe.write_record()

    def _write(self, result: Result, output: str, properties: dict[str, Any]) -> None:
        """Write through the model's own writer; each file appears under its name when it is complete."""
        assert result is not None
        segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
        if probabilities is not None:
            adapter.write_probabilities(probabilities, output + ".npz")
            adapter.write_properties(properties, output + ".pkl")
        adapter.write_segmentation(
            segmentation, properties, output + self.dataset_json["file_ending"], self.plans_manager
        )
