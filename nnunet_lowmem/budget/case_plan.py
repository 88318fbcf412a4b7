"""Plans of real cases: what the planner has to know, read from headers, plans and images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.budget.arrays import Budget, CaseFacts, ModelFacts, Placement, Stage
from nnunet_lowmem.budget.input_memory import InputBytes, Source, input_bytes
from nnunet_lowmem.budget.ladder import Recovery
from nnunet_lowmem.budget.planner import Plan, all_plans, certain, closest_plan, placed, plan_case
from nnunet_lowmem.errors import BudgetError, UsageError, of_kinds
from nnunet_lowmem.labels import rules
from nnunet_lowmem.labels.rules import CaseGeometry, LogitsResampling
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.preprocessing.normalisation import normalisers
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.system.out_of_memory import error_of
from nnunet_lowmem.types import Place, PreprocessedCase
from nnunet_lowmem.volumes.formats import read_header
from nnunet_lowmem.volumes.planes import spilled_array
from nnunet_lowmem.window.tiling import tile_grid

_SINGLE_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class ModelDescription:
    """nnU-Net's objects that describe a model, and how it is to be run.

    Attributes
    ----------
    plans, configuration, labels
        nnU-Net's managers.
    step_size : float
    device : str
        Type of the network's device.
    window_on_device : bool
    holds_logits : bool
        Somebody else makes the logits, or takes part in it: all of a case are in RAM at once.
    """

    plans: Any
    configuration: Any
    labels: Any
    step_size: float
    device: str
    window_on_device: bool
    holds_logits: bool = False


class CasePlanner:
    """Makes plans for the cases of one model.

    Parameters
    ----------
    description : ModelDescription
    model : ModelFacts
    """

    def __init__(self, description: ModelDescription, model: ModelFacts) -> None:
        self.description = description
        self.model = model

    def closest(self, facts: CaseFacts, budget: Budget) -> Plan:
        """Plan a case; what does not fit is seen by the plan itself."""
        return closest_plan(self.model, facts, budget, self.description.device, self.description.window_on_device)

    def placed(self, placement: Placement, facts: CaseFacts, budget: Budget) -> Plan:
        """Return the plan of a placement, with what the network takes for certain."""
        return placed(certain(self.model), facts, budget, self.description.device, placement)

    def plan(self, facts: CaseFacts, budget: Budget) -> Plan:
        """Plan a case, or refuse it.

        Raises
        ------
        BudgetError
            If no placement fits; of the kind that running out of it has.
        """
        try:
            return plan_case(self.model, facts, budget, self.description.device, self.description.window_on_device)
        except BudgetError as error:
            raise of_kinds(error, error_of(error.place)) from None

    def changed(self, **model_facts: Any) -> CasePlanner:
        """Return the planner for a model of which some facts are others."""
        return CasePlanner(self.description, replace(self.model, **model_facts))

    def fits_beside(self, facts: CaseFacts, budget: Budget, pending_bytes: int) -> bool:
        """Whether a case fits, placed as it is alone, while the files of the case before are written."""
        alone = self.changed(pending_bytes=0).closest(facts, budget)
        beside = self.changed(pending_bytes=pending_bytes).closest(facts, budget)
        return beside.fits_everywhere() and beside.placement == alone.placement

    def all(self, facts: CaseFacts, budget: Budget) -> tuple[Plan, ...]:
        """Return every plan there is of what is certain, fastest first."""
        described = self.description
        return tuple(all_plans(certain(self.model), facts, budget, described.device, described.window_on_device))

    def facts_of_files(
        self, name: str, files: Sequence[str], previous_stage: str | None, probabilities: bool
    ) -> CaseFacts:
        """Return upper bounds from the headers, as if nothing were cropped.

        Raises
        ------
        UsageError
            If the header cannot be read.
        """
        library = counted_by(self.description.plans.image_reader_writer_class)
        headers = [read_header(file, library) for file in files]
        stored_bytes = sum(header.voxels * header.dtype.itemsize for header in headers)
        dtype = min((header.dtype for header in headers), key=lambda dtype: dtype.itemsize)
        source = Source(len(files), dtype, stored_bytes, max(header.beside_bytes for header in headers))
        return self._upper_bounds(name, source, *headers[0].grid(), previous_stage is not None, probabilities)

    def facts_of_array(
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

    def facts_of_image(
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
        patch = tuple(self.description.configuration.patch_size)
        return replace(
            facts,
            grid=tile_grid((z, y, x), patch, self.description.step_size),
            image_bytes=_SINGLE_BYTES * math.prod(shape),
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
        described = self.description
        geometry = adapter.uncropped_geometry(shape, spacing, described.plans, described.configuration)
        in_order = [spacing[axis] for axis in described.plans.transpose_forward]
        inputs = input_bytes(source, geometry, in_order, has_previous_stage, described.plans, described.configuration)
        facts = self._facts(name, geometry, spacing, inputs, probabilities)
        stage_bytes = 2 * math.prod(geometry.network_shape) if has_previous_stage else 0
        return replace(facts, previous_stage_bytes=stage_bytes)

    def _facts(
        self, name: str, geometry: CaseGeometry, spacing: Sequence[float], inputs: InputBytes, probabilities: bool
    ) -> CaseFacts:
        described = self.description
        channels = len(normalisers(described.plans, described.configuration))
        streams, export = self._export(geometry, spacing, probabilities)
        network = math.prod(geometry.network_shape)
        # with several folds, the sum and those of one fold
        held = _HALF_BYTES * self.model.heads * network * min(self.model.folds, 2) if described.holds_logits else 0
        return CaseFacts(
            name=name,
            grid=tile_grid(geometry.network_shape, tuple(described.configuration.patch_size), described.step_size),
            original_shape=geometry.original_shape,
            cropped_shape=geometry.cropped_shape,
            streams=streams,
            reading_bytes=inputs.reading,
            preprocessing_bytes=inputs.preprocessing,
            image_bytes=channels * _SINGLE_BYTES * network,
            export_bytes=export,
            held_logits_bytes=held,
        )

    def _export(self, geometry: CaseGeometry, spacing: Sequence[float], probabilities: bool) -> tuple[bool, int]:
        """Whether slabs are labelled as they come, and what is needed where they cannot be."""
        described, heads = self.description, self.model.heads
        original, cropped, network = (
            math.prod(s) for s in (geometry.original_shape, geometry.cropped_shape, geometry.network_shape)
        )
        rule = adapter.label_rule(described.labels)
        properties = {"spacing": spacing, "shape_after_cropping_and_before_resampling": geometry.cropped_shape}
        resampling = adapter.logits_resampling(described.plans, described.configuration, geometry, properties)
        if rule is None or not resampling.per_head:
            # stock converts all logits at once: float64, halves, float32 of the activation
            return False, heads * (10 * network + 6 * cropped) + 12 * original
        if rules.streams(resampling, rule, probabilities):
            return True, 0
        by_softmax = rules.takes_softmax(rule, probabilities)
        # one head in the original grid
        head = _SINGLE_BYTES * original if by_softmax else 0
        return False, self._whole_heads(network, cropped, resampling, by_softmax) + head

    def _next_stages(self, case: PreprocessedCase) -> int:
        """Labels of all next stages, the copy that is written, and what is needed where heads cannot stream."""
        described, network = self.description, math.prod(case.image.shape[1:])
        rule = adapter.label_rule(described.labels)
        working, maps = [0], [0]
        for target in adapter.next_stage_targets(case, described.plans, described.configuration):
            maps.append(math.prod(target.stage.shape) * self.model.label_bytes)
            if not rules.streams(target.resampling, rule):
                by_softmax = rules.takes_softmax(rule)
                working.append(self._whole_heads(network, math.prod(target.stage.shape), target.resampling, by_softmax))
        return sum(maps) + max(maps) + max(working)

    def _whole_heads(self, network: int, cropped: int, resampling: LogitsResampling, by_softmax: bool) -> int:
        """Working arrays of labelling head after head; voxels of both grids are given."""
        group = 1 if resampling.tables is not None else min(self.model.heads, rules.HEADS_PER_CALL)
        resampled = _HALF_BYTES * cropped if group == 1 else group * 8 * (network + cropped)
        # largest logit, sum of exponentials, close calls
        decision = 12 * cropped if by_softmax else 6 * cropped
        return 2 * group * _HALF_BYTES * network + resampled + decision


@dataclass
class CasePlanning:
    """One case on its way: planned from its header, again when it is cropped, and when its image exists.

    Attributes
    ----------
    planner : CasePlanner
    budget : Budget
        With what was in use when the case began.
    folder : Path
        Where arrays are spilled.
    header : CaseFacts or None
        Upper bounds; None where no header tells.
    exact : CaseFacts or None
        What is known once the image is preprocessed.
    begun : Plan or None
        What preprocessing goes by.
    move_weights : callable
        Moves the weights of all folds to disk; called where a plan wants them there.
    """

    planner: CasePlanner
    budget: Budget
    folder: Path
    header: CaseFacts | None
    exact: CaseFacts | None = None
    begun: Plan | None = None
    move_weights: Callable[[], object] = object
    _spills_image: bool = False

    def expect(self, name: str, case: PreprocessedCase, probabilities: bool, reading_bytes: int) -> None:
        """Take a stored image, which is not read yet, for the header of the case; reading it takes that much more."""
        facts = self.planner.facts_of_image(name, case, probabilities)
        self.header = replace(facts, image_place=None, preprocessing_bytes=reading_bytes)

    def check(self) -> None:
        """Refuse what cannot fit whatever is cropped.

        Raises
        ------
        BudgetError
            If the case as it is, and the least that cropping may leave of it, both do not fit.
        """
        if self.header is None:
            return
        self.begun = self.planner.closest(self.header, self.budget)
        if not self.begun.fits_everywhere():
            shape = self.header.grid.tile_shape
            least = self.planner.with_network_shape(self.header, (1, *shape))
            least = replace(least, previous_stage_bytes=0, export_bytes=0, cropped_shape=shape)
            if not self.planner.closest(least, self.budget).fits_everywhere():
                self.planner.plan(self.header, self.budget)
        self._place_weights(self.begun)

    def _place_weights(self, plan: Plan) -> None:
        wanted = plan.placement.weights is Place.DISK and plan.fits(Place.DISK)
        if wanted and self.planner.model.kept_place is None:
            self.move_weights()
            self.planner = self.planner.changed(kept_place=Place.DISK)

    def forget_weights(self) -> None:
        """Hold the weights no longer: whoever replaces them wants their memory back."""
        self.move_weights = object

    def fits(self) -> bool:
        """Whether the case fits as its header has it, whatever cropping may save."""
        return self.header is not None and self.planner.closest(self.header, self.budget).fits_everywhere()

    @property
    def threads(self) -> int:
        """Threads that preprocessing may use."""
        return self.planner.model.threads if self.begun is None else self.begun.placement.threads

    def preprocessing(self, load: Callable[[], PreprocessedCase]) -> PreprocessedCase:
        """Return ``load()``, which goes by `threads` and `allocate`; once more with less where memory runs out.

        Raises
        ------
        MemoryExhaustedError
            If one thread and an image on disk did not help either.
        """
        if self.begun is None or self.header is None:
            return load()
        ladder = Recovery(self.begun, self.planner.all(self.header, self.budget), Stage.PREPROCESSING)
        ladder.listeners.append(self._step_down)
        return ladder.run(load)

    def _step_down(self, plan: Plan) -> None:
        self.begun, self._spills_image = plan, plan.placement.image is Place.DISK
        self._place_weights(plan)

    def plan(self, name: str, case: PreprocessedCase, probabilities: bool) -> Plan:
        """Plan what follows preprocessing.

        Raises
        ------
        BudgetError
            If no placement fits.
        """
        self.exact = self.planner.facts_of_image(name, case, probabilities, self.header)
        plan = self.planner.plan(self.exact, self.budget)
        self._place_weights(plan)
        return plan

    @property
    def is_unmeasured(self) -> bool:
        """Whether nobody has seen yet what the network takes for a tile."""
        return self.planner.model.unmeasured_bytes > 0

    def is_slowed(self, plan: Plan) -> bool:
        """Whether `plan`, the last one, places a thing elsewhere because files of the case before are being written."""
        assert self.exact is not None, "a case is planned before it is compared"
        return self.after_pending().closest(self.exact, self.budget).placement != plan.placement

    def after_pending(self) -> CasePlanner:
        """Return the planner for where the files of the case before are there when preprocessing is over."""
        return self.planner.changed(pending_until=Stage.PREPROCESSING)

    def recovery(self, plan: Plan) -> Recovery:
        """Return the ladder for the case that was planned last."""
        assert self.exact is not None, "a case is planned before it is predicted"
        plan = self.planner.placed(plan.placement, self.exact, self.budget)
        ladder = Recovery(plan, self.planner.all(self.exact, self.budget))
        ladder.listeners.append(self._place_weights)
        return ladder

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make the preprocessed image where the plan wants it; called when its size is known.

        Raises
        ------
        BudgetError
            If the cropped case does not fit.
        """
        if self.header is None:
            return np.empty(shape, dtype)
        plan = self.planner.plan(self.planner.with_network_shape(self.header, shape), self.budget)
        self._place_weights(plan)
        if self._spills_image or plan.placement.image is Place.DISK:
            return spilled_array(shape, dtype, self.folder)
        return np.empty(shape, dtype)
