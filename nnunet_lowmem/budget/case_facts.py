"""What the planner has to know of a case: by headers, by an array, or by the preprocessed image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_lowmem.budget.arrays import HALF_BYTES, SINGLE_BYTES, CaseFacts, ModelFacts
from nnunet_lowmem.budget.input_memory import InputBytes, Source, input_bytes
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels import rules
from nnunet_lowmem.labels.rules import CaseGeometry, LogitsResampling
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.preprocessing.case import network_grid
from nnunet_lowmem.preprocessing.normalisation import normalisers
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.types import Place, PreprocessedCase
from nnunet_lowmem.volumes.formats import read_header
from nnunet_lowmem.window.tiling import tile_grid


@dataclass(frozen=True)
class CaseSizes:
    """Finds the facts of cases for one model.

    Attributes
    ----------
    plans, configuration, labels
        nnU-Net's managers.
    step_size : float
        Between tiles, as a share of the patch.
    model : ModelFacts
        Of which heads, folds and the bytes of a label count.
    holds_logits : bool
        Somebody else makes the logits, or takes part in it: all of a case are in RAM at once.
    """

    plans: Any
    configuration: Any
    labels: Any
    step_size: float
    model: ModelFacts
    holds_logits: bool = False

    def of_files(self, name: str, files: Sequence[str], previous_stage: str | None, probabilities: bool) -> CaseFacts:
        """Return upper bounds from the headers, as if nothing were cropped.

        Raises
        ------
        UsageError
            If the header cannot be read.
        """
        library = counted_by(self.plans.image_reader_writer_class)
        headers = [read_header(file, library) for file in files]
        stored_bytes = sum(header.voxels * header.dtype.itemsize for header in headers)
        dtype = min((header.dtype for header in headers), key=lambda dtype: dtype.itemsize)
        source = Source(len(files), dtype, stored_bytes, max(header.beside_bytes for header in headers))
        return self._upper_bounds(name, source, *headers[0].grid(), previous_stage is not None, probabilities)

    def of_array(
        self, name: str, image: Any, previous_stage: Any, properties: dict[str, Any], probabilities: bool
    ) -> CaseFacts:
        """Return upper bounds by an array that is not preprocessed, as if nothing were cropped.

        Raises
        ------
        UsageError
            If the array is no image.
        """
        shape, spacing = getattr(image, "shape", ()), properties.get("spacing", ())
        if not isinstance(image, np.ndarray) or len(shape) != 4 or len(spacing) != 3:  # nnU-Net will say it
            raise UsageError(f"an image of shape (channels, x, y, z) is needed, with a spacing: {shape}, {spacing}")
        stage = previous_stage is not None
        source = Source(0, image.dtype, image.nbytes, 0)
        return self._upper_bounds(name, source, shape[1:], spacing, stage, probabilities)

    def of_image(
        self, name: str, case: PreprocessedCase, probabilities: bool, before: CaseFacts | None = None
    ) -> CaseFacts:
        """Return what is known once the image is preprocessed; `before` tells what that took."""
        geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
        inputs = InputBytes(0, 0) if before is None else InputBytes(before.reading_bytes, before.preprocessing_bytes)
        place = Place.DISK if isinstance(case.image, np.memmap) else Place.RAM
        stage_bytes = 0 if case.previous_stage is None else case.previous_stage.nbytes
        facts = self._facts(name, geometry, case.properties["spacing"], inputs, probabilities)
        return replace(
            facts,
            image_bytes=case.image.nbytes,
            image_place=place,
            previous_stage_bytes=stage_bytes,
            next_stages_bytes=self._next_stages(case),
        )

    def with_network_shape(self, facts: CaseFacts, shape: Sequence[int]) -> CaseFacts:
        """Return `facts` for the network grid that cropping has led to."""
        z, y, x = shape[-3:]
        patch = tuple(self.configuration.patch_size)
        return replace(
            facts,
            grid=tile_grid((z, y, x), patch, self.step_size),
            image_bytes=SINGLE_BYTES * math.prod(shape),
        )

    def _upper_bounds(
        self,
        name: str,
        source: Source,
        shape: Sequence[int],
        spacing: Sequence[float],
        has_previous_stage: bool,
        probabilities: bool,
    ) -> CaseFacts:
        forward = self.plans.transpose_forward
        grid = network_grid([shape[axis] for axis in forward], [spacing[axis] for axis in forward], self.configuration)
        geometry = CaseGeometry.uncropped(grid.new_shape, grid.shape)
        inputs = input_bytes(source, grid, has_previous_stage, self.plans, self.configuration)
        facts = self._facts(name, geometry, spacing, inputs, probabilities)
        stage_bytes = 2 * math.prod(geometry.network_shape) if has_previous_stage else 0
        return replace(facts, previous_stage_bytes=stage_bytes)

    def _facts(
        self, name: str, geometry: CaseGeometry, spacing: Sequence[float], inputs: InputBytes, probabilities: bool
    ) -> CaseFacts:
        channels = len(normalisers(self.plans, self.configuration))
        streams, export = self._export(geometry, spacing, probabilities)
        network = math.prod(geometry.network_shape)
        # with several folds, the sum and those of one fold
        held = HALF_BYTES * self.model.heads * network * min(self.model.folds, 2) if self.holds_logits else 0
        return CaseFacts(
            name=name,
            grid=tile_grid(geometry.network_shape, tuple(self.configuration.patch_size), self.step_size),
            original_shape=geometry.original_shape,
            cropped_shape=geometry.cropped_shape,
            streams=streams,
            reading_bytes=inputs.reading,
            preprocessing_bytes=inputs.preprocessing,
            image_bytes=channels * SINGLE_BYTES * network,
            export_bytes=export,
            held_logits_bytes=held,
        )

    def _export(self, geometry: CaseGeometry, spacing: Sequence[float], probabilities: bool) -> tuple[bool, int]:
        """Whether slabs are labelled as they come, and what is needed where they cannot be."""
        heads = self.model.heads
        original, cropped, network = (
            math.prod(s) for s in (geometry.original_shape, geometry.cropped_shape, geometry.network_shape)
        )
        rule = adapter.label_rule(self.labels)
        properties = {"spacing": spacing, "shape_after_cropping_and_before_resampling": geometry.cropped_shape}
        resampling = adapter.logits_resampling(self.plans, self.configuration, geometry, properties)
        if rule is None or not resampling.per_head:
            # stock converts all logits at once: float64, halves, float32 of the activation
            return False, heads * (10 * network + 6 * cropped) + 12 * original
        if rules.streams(resampling, rule, probabilities):
            return True, 0
        by_softmax = rules.takes_softmax(rule, probabilities)
        # one head in the original grid
        head = SINGLE_BYTES * original if by_softmax else 0
        return False, self._whole_heads(network, cropped, resampling, by_softmax) + head

    def _next_stages(self, case: PreprocessedCase) -> int:
        """Labels of all next stages, the copy that is written, and what is needed where heads cannot stream."""
        network = math.prod(case.image.shape[1:])
        rule = adapter.label_rule(self.labels)
        working, maps = [0], [0]
        for target in adapter.next_stage_targets(case, self.plans, self.configuration):
            maps.append(math.prod(target.stage.shape) * self.model.label_bytes)
            if not rules.streams(target.resampling, rule):
                by_softmax = rules.takes_softmax(rule)
                working.append(self._whole_heads(network, math.prod(target.stage.shape), target.resampling, by_softmax))
        return sum(maps) + max(maps) + max(working)

    def _whole_heads(self, network: int, cropped: int, resampling: LogitsResampling, by_softmax: bool) -> int:
        """Working arrays of labelling head after head; voxels of both grids are given."""
        group = 1 if resampling.tables is not None else min(self.model.heads, rules.HEADS_PER_CALL)
        resampled = HALF_BYTES * cropped if group == 1 else group * 8 * (network + cropped)
        # largest logit, sum of exponentials, close calls
        decision = 12 * cropped if by_softmax else 6 * cropped
        return 2 * group * HALF_BYTES * network + resampled + decision
