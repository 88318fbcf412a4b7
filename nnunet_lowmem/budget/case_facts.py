"""What the planner has to know of a case: by headers, by an array, or by the preprocessed image."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lowmem.boxes import box_within, check_mask_shape
from nnunet_lowmem.budget.arrays import HALF_BYTES, SINGLE_BYTES
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.input_memory import InputBytes, Source, input_bytes
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels import rules
from nnunet_lowmem.labels.parts import Part, part_of
from nnunet_lowmem.labels.rules import CaseGeometry, LogitsResampling
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.nnunet.label_writing import Leaves, writer_bytes
from nnunet_lowmem.nnunet.read_by import writer_of
from nnunet_lowmem.preprocessing.grids import network_grid, passes_over
from nnunet_lowmem.preprocessing.normalisation import normalisers
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.preprocessing.sources import AsRead
from nnunet_lowmem.preprocessing.volume_io import reader_of_labels
from nnunet_lowmem.types import BBox, Box, Place, PreprocessedCase, Shape3, Wanted, shape3
from nnunet_lowmem.volumes.formats import read_header
from nnunet_lowmem.volumes.headers import Header
from nnunet_lowmem.volumes.selection import SIGNS
from nnunet_lowmem.window.tiling import TileGrid, tile_grid


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
    bbox : BBox or None
        The box that is asked for of every case, in the axes of its file.
    roi : path, array or None
        The option; what it is for a case that is in files is told with them.
    file_ending : str
        Of label maps.
    spacing : (float, float, float) or None
        mm, in the place of what files say.
    on_network_grid : bool
        Labels stay on the grid of the network.
    """

    plans: Any
    configuration: Any
    labels: Any
    step_size: float
    model: ModelFacts
    holds_logits: bool = False
    bbox: BBox | None = None
    roi: Any = None
    file_ending: str = ""
    spacing: Sequence[float] | None = None
    on_network_grid: bool = False

    def part(
        self,
        geometry: CaseGeometry,
        spacing: Sequence[float],
        wanted: Wanted | None,
        as_a_whole: bool | None = None,
        within: Box | None = None,
    ) -> Part:
        """Return what is computed of a case; `spacing` is the file's, mm. See `part_of`."""
        properties = {"spacing": spacing, "shape_after_cropping_and_before_resampling": geometry.cropped_shape}
        resampling = adapter.logits_resampling(self.plans, self.configuration, geometry, properties)
        if self.on_network_grid:
            resampling = resampling.to_same_grid(geometry.network_shape)
        grid = tile_grid(geometry.network_shape, tuple(self.configuration.patch_size), self.step_size)
        if as_a_whole is None:
            as_a_whole = self.holds_logits or adapter.label_rule(self.labels) is None
        return part_of(grid, geometry, resampling, wanted, as_a_whole, within)

    def of_files(
        self, name: str, files: Sequence[str], previous_stage: str | None, probabilities: bool, roi: str | None = None
    ) -> CaseFacts:
        """Return upper bounds from the headers, as if nothing were cropped.

        Of a box its tiles are counted as if nothing were cropped; of a region what all of a case takes.

        Raises
        ------
        UsageError
            If the header cannot be read.
        """
        library = counted_by(self.plans.image_reader_writer_class)
        headers = [read_header(file, library) for file in files]
        shape, steps = headers[0].grid()
        spacing, stage = self.spacing or steps, previous_stage is not None
        source = Source.of(headers, passes_over(shape, spacing, self.plans.transpose_forward, self.configuration))
        facts = self._upper_bounds(name, source, shape, spacing, stage, probabilities)
        return facts if roi is None else self._with_mask(facts, roi, headers[0])

    def _with_mask(self, facts: CaseFacts, roi: str, image: Header | None = None) -> CaseFacts:
        """Count a mask, which is read first."""
        mask = read_header(roi, counted_by(reader_of_labels(self.plans.image_reader_writer_class)))
        shape, spacing = mask.grid()
        if image is not None:
            check_mask_shape(shape, image.grid()[0], of_headers=True)
        grid = network_grid(shape, spacing, self.configuration)
        read = input_bytes(Source.of([mask]), grid, False, self.plans, self.configuration)
        return replace(facts, region_bytes=mask.voxels, region_reading_bytes=read.facts.kept_bytes + read.reading)

    def stored_bytes(self, files: Sequence[str]) -> int:
        """Return the bytes of files, and of those that they name."""
        library = counted_by(self.plans.image_reader_writer_class)
        headers = [read_header(file, library) for file in files]
        found = set[Path]()
        for file, header in zip(files, headers, strict=True):
            layout = header.layout
            parts = () if layout is None else (*(part.path for part in layout.parts), *layout.beside[-1:])
            found |= {Path(part) for part in parts} | ({header.path} if os.path.isfile(file) else set())
        # the last file beside a store is in the folder of its array
        stored = (file.parent.rglob("*") if file.name in SIGNS else [file] for file in found)
        return sum(each.stat().st_size for each in {*chain.from_iterable(stored)} if each.is_file())

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
        facts = self._upper_bounds(name, source, shape[1:], spacing, stage, probabilities)
        if isinstance(self.roi, str | os.PathLike):
            return self._with_mask(facts, os.fspath(self.roi))
        return facts if self.roi is None else replace(facts, region_bytes=math.prod(shape[1:]))

    def of_image(
        self,
        name: str,
        case: PreprocessedCase,
        probabilities: bool,
        before: CaseFacts | None = None,
        part: Part | None = None,
    ) -> CaseFacts:
        """Return what is known once the image is preprocessed; `before` tells what that took, `part` what is wanted."""
        geometry = adapter.case_geometry(case.image.shape[1:], case.properties)
        part = self.part(geometry, case.properties["spacing"], case.wanted) if part is None else part
        image, inputs = case.image, InputBytes(0, 0)
        if before is not None:
            inputs = InputBytes(before.reading_bytes, before.preprocessing_bytes, before.input)
        stage_bytes = 0 if case.previous_stage is None else case.previous_stage.nbytes
        mask = None if case.wanted is None else case.wanted.mask
        facts = self._facts(name, part, geometry.network_shape, inputs, probabilities)
        return replace(
            facts,
            image_bytes=image.nbytes,
            image_place=Place.DISK if isinstance(image, np.memmap) else Place.RAM,
            input=replace(inputs.facts, is_image=isinstance(image, AsRead)),
            previous_stage_bytes=stage_bytes,
            next_stages_bytes=self._next_stages(case),
            may_be_cut=facts.may_be_cut and not case.next_stages,
            region_bytes=0 if mask is None else mask.nbytes,
        )

    def with_network_shape(self, facts: CaseFacts, shape: Sequence[int]) -> CaseFacts:
        """Return `facts` for the network grid that cropping has led to."""
        z, y, x = shape[-3:]
        patch = tuple(self.configuration.patch_size)
        grid = tile_grid((z, y, x), patch, self.step_size)
        if facts.tiles < facts.tiles_of_case:
            grid = _wherever(grid, facts.grid.image_shape)
        return replace(facts, grid=grid, image_bytes=SINGLE_BYTES * math.prod(shape))

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
        geometry = CaseGeometry.uncropped(grid.new_shape, grid.new_shape if self.on_network_grid else grid.shape)
        inputs = input_bytes(source, grid, has_previous_stage, self.plans, self.configuration)
        wanted = None
        if self.bbox is not None:
            box = box_within(self.bbox, shape)
            wanted = Wanted((box[forward[0]], box[forward[1]], box[forward[2]]))
        part = self.part(geometry, spacing, wanted)
        facts = self._facts(name, part, geometry.network_shape, inputs, probabilities)
        if facts.tiles < facts.tiles_of_case:
            whole = tile_grid(geometry.network_shape, tuple(self.configuration.patch_size), self.step_size)
            facts = replace(facts, grid=_wherever(whole, part.grid.image_shape))
        stage_bytes = 2 * math.prod(geometry.network_shape) if has_previous_stage else 0
        return replace(facts, previous_stage_bytes=stage_bytes)

    def _facts(
        self, name: str, part: Part, network_shape: Shape3, inputs: InputBytes, probabilities: bool
    ) -> CaseFacts:
        """Return the facts of a part of a case whose network grid has this shape."""
        channels = len(normalisers(self.plans, self.configuration))
        streams, export = self._export(part, probabilities)
        network, shape = math.prod(network_shape), part.geometry.original_shape
        backward = self.plans.transpose_backward
        in_file = [shape[axis] for axis in backward]
        writer_class = type(writer_of(self.plans))
        leaves, rule = Leaves(), adapter.label_rule(self.labels)
        if rule is not None and streams and not part.needs_all:
            leaves = Leaves.of(writer_class, self.file_ending, shape, rule, backward, part.grid.roll_axis)
        # with several folds, the sum and those of one fold
        held = HALF_BYTES * self.model.heads * network * min(self.model.folds, 2) if self.holds_logits else 0
        return CaseFacts(
            name=name,
            grid=part.grid,
            original_shape=part.geometry.original_shape,
            cropped_shape=part.geometry.cropped_shape,
            streams=streams,
            reading_bytes=inputs.reading,
            preprocessing_bytes=inputs.preprocessing,
            input=replace(inputs.facts, is_image=inputs.facts.is_image and not self.holds_logits),
            image_bytes=channels * SINGLE_BYTES * network,
            export_bytes=export,
            held_logits_bytes=held,
            writer_bytes=writer_bytes(writer_class, self.file_ending, in_file, self.model.label_bytes),
            tiles=part.grid.tile_count,
            tiles_of_case=part.tiles_of_case,
            may_be_cut=streams and not part.needs_all,
            leaves=leaves.whole,
            leaves_in_columns=leaves.in_columns,
        )

    def _export(self, part: Part, probabilities: bool) -> tuple[bool, int]:
        """Whether slabs are labelled as they come, and what is needed where they cannot be."""
        heads, geometry, resampling = self.model.heads, part.geometry, part.resampling
        original, cropped, network = (
            math.prod(s) for s in (geometry.original_shape, geometry.cropped_shape, geometry.network_shape)
        )
        rule = adapter.label_rule(self.labels)
        if part.is_cut:  # what is asked for of the label map, beside the whole one
            original += math.prod(part.shape)
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


def _wherever(whole: TileGrid, box_shape: Shape3) -> TileGrid:
    """Return a grid that is at least as large as that of a box of this shape, wherever it lies among the tiles.

    Where tiles begin depends on the crop; those of a box reach less than a tile beyond it on each side.
    """
    shape = [min(size, wanted + 2) for size, wanted in zip(whole.image_shape, box_shape, strict=True)]
    reach = [
        min(size, wanted + 2 * tile)
        for size, wanted, tile in zip(whole.image_shape, shape, whole.tile_shape, strict=True)
    ]
    part = whole.part((slice(0, reach[0]), slice(0, reach[1]), slice(0, reach[2])))
    return replace(part, image_shape=shape3(shape))
