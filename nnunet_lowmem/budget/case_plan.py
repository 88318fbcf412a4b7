"""One case on its way: planned by its header, again when it is cropped, and when its image exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.budget.arrays import Budget, Stage
from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.ladder import Recovery
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.budget.planner import all_plans, certain, closest_plan, placed, plan_case
from nnunet_lowmem.errors import BudgetError, of_kinds
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.network.tile_memory import TileBytes
from nnunet_lowmem.system.out_of_memory import error_of
from nnunet_lowmem.types import Allocate, Place, PreprocessedCase
from nnunet_lowmem.volumes.mapped import spilled_array


@dataclass
class CasePlanning:
    """Plans one case, and again whenever more is known of it.

    Attributes
    ----------
    sizes : CaseSizes
    model : ModelFacts
        What is known of the model by now.
    budget : Budget
        With what was in use when the case began.
    folder : Path
        Where arrays are spilled.
    header : CaseFacts or None
        Upper bounds; None where no header tells.
    move_weights : callable
        Moves the weights of all folds to disk; called where a plan wants them there.
    pending_bytes : int
        Counted as in use: what the files of the case before take, as long as they are being written.
    exact : CaseFacts or None
        What is known once the image is preprocessed.
    begun : Plan or None
        What preprocessing goes by.
    """

    sizes: CaseSizes
    model: ModelFacts
    budget: Budget
    folder: Path
    header: CaseFacts | None
    move_weights: Callable[[], object] = object
    pending_bytes: int = 0
    exact: CaseFacts | None = None
    begun: Plan | None = None
    _spills_image: bool = False

    def expect(self, name: str, case: PreprocessedCase, probabilities: bool, reading_bytes: int) -> None:
        """Take a stored image, which is not read yet, for the header of the case; reading it takes that much more."""
        facts = self.sizes.of_image(name, case, probabilities)
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
        self.begun = closest_plan(self.model, self.header, self.budget)
        if not self.begun.fits_everywhere():
            shape = self.header.grid.tile_shape
            least = self.sizes.with_network_shape(self.header, (1, *shape))
            least = replace(least, previous_stage_bytes=0, export_bytes=0, cropped_shape=shape)
            if not closest_plan(self.model, least, self.budget).fits_everywhere():
                self._plan(self.header)
        self._place_weights(self.begun)

    def _plan(self, facts: CaseFacts) -> Plan:
        try:
            return plan_case(self.model, facts, self.budget)
        except BudgetError as error:  # of the kind that running out of it has
            raise of_kinds(error, error_of(error.place)) from None

    def _place_weights(self, plan: Plan) -> None:
        wanted = plan.placement.weights is Place.DISK and plan.fits(Place.DISK)
        if wanted and self.model.kept_place is None:
            self.move_weights()
            self.learn(kept_place=Place.DISK)

    def learn(self, **facts: Any) -> None:
        """Note facts of the model that have become known."""
        self.model = replace(self.model, **facts)

    def has_room(self, tile: TileBytes) -> bool:
        """Whether the case as it is fits with a network that takes so much for a tile."""
        assert self.exact is not None, "a case is planned before its network is tried"
        model = replace(self.model, activation_bytes=tile.certain, unmeasured_bytes=tile.uncertain)
        return closest_plan(model, self.exact, self.budget).fits_everywhere()

    def keeps(self, output_bytes: int) -> bool:
        """Count the output of a tile that is kept, if that fits and puts nothing elsewhere; return whether it does."""
        assert self.exact is not None, "a case is planned before its tiles are looked at"
        without = closest_plan(self.model, self.exact, self.budget)
        plan = closest_plan(replace(self.model, reused_bytes=output_bytes), self.exact, self.budget)
        if keeps := plan.fits_everywhere() and plan.placement == without.placement:
            self.learn(reused_bytes=output_bytes)
        return keeps

    def fits(self) -> bool:
        """Whether the case fits as its header has it, whatever cropping may save."""
        return self.header is not None and closest_plan(self.model, self.header, self.budget).fits_everywhere()

    def is_slowed(self) -> bool:
        """Whether a thing has to be elsewhere because files of the case before are being written."""
        facts = self.exact or self.header
        if facts is None or not self.pending_bytes:
            return False
        alone = closest_plan(self.model, facts, self.budget.with_in_use(-self.pending_bytes))
        return alone.placement != closest_plan(self.model, facts, self.budget).placement

    def forget_pending(self) -> None:
        """Note that the files of the case before are there."""
        self.budget, self.pending_bytes = self.budget.with_in_use(-self.pending_bytes), 0

    @property
    def threads(self) -> int:
        """Threads that preprocessing may use."""
        return self.model.threads if self.begun is None else self.begun.placement.threads

    def preprocessing(self, load: Callable[[], PreprocessedCase]) -> PreprocessedCase:
        """Return ``load()``, which goes by `threads` and `allocate`; once more with less where memory runs out.

        Raises
        ------
        MemoryExhaustedError
            If one thread and an image on disk did not help either.
        """
        if self.begun is None or self.header is None:
            return load()
        plans = all_plans(certain(self.model), self.header, self.budget)
        return Recovery(self.begun, plans, self._step_down, Stage.PREPROCESSING).run(load)

    def _step_down(self, plan: Plan) -> None:
        self.begun, self._spills_image = plan, plan.placement.image is Place.DISK
        self._place_weights(plan)

    def plan(
        self, name: str, case: PreprocessedCase, probabilities: bool, part: Part | None = None, leaves: bool = False
    ) -> Plan:
        """Plan what follows preprocessing, of the part that is wanted; whether its labels may leave, is known by then.

        Raises
        ------
        BudgetError
            If no placement fits.
        """
        self.exact = self.sizes.of_image(name, case, probabilities, self._as_begun(self.header), part)
        if not leaves:
            self.exact = self.exact.kept()
        plan = self._plan(self.exact)
        self._place_weights(plan)
        return plan

    def recovery(self, plan: Plan) -> Recovery:
        """Return the ladder for the case that was planned last."""
        assert self.exact is not None, "a case is planned before it is predicted"
        model = certain(self.model)
        plan = placed(model, self.exact, self.budget, plan.placement)
        plans = all_plans(model, self.exact, self.budget, plan.placement.columns)
        return Recovery(plan, plans, self._place_weights)

    def _as_begun(self, facts: CaseFacts | None) -> CaseFacts | None:
        """Return facts of a case whose input is where preprocessing began with it."""
        if facts is None or self.begun is None:
            return facts
        return replace(facts, input=replace(facts.input, place=self.begun.placement.input))

    @property
    def keeps_image(self) -> bool:
        """Whether there is to be a preprocessed image beside the input."""
        return self.header is None or not self.header.input.is_image or self.spill() is None

    def spill(self) -> Allocate | None:
        """Return what makes arrays for an input that is not kept in RAM; None where it is."""
        if self.begun is None or self.begun.placement.input is not Place.DISK:
            return None
        return lambda shape, dtype: spilled_array(shape, dtype, self.folder)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make the preprocessed image where the plan wants it; called when its size is known.

        Raises
        ------
        BudgetError
            If the cropped case does not fit.
        """
        if self.header is None:
            return np.empty(shape, dtype)
        facts = self._as_begun(self.sizes.with_network_shape(self.header, shape))
        assert facts is not None, "there is a header"
        # there is to be one, whatever the header says
        plan = self._plan(replace(facts, input=replace(facts.input, is_image=False)))
        self._place_weights(plan)
        if self._spills_image or plan.placement.image is Place.DISK:
            return spilled_array(shape, dtype, self.folder)
        return np.empty(shape, dtype)
