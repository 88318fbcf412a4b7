"""What a case will take, by its header alone, beside what stock nnU-Net takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.budget.planner import closest_plan, refused, smallest_ram_bytes
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.nnunet.model_files import check_numbers
from nnunet_lowmem.types import Place

# the command and one process each for preprocessing and export
_STOCK_PROCESSES_BYTES = 3 * 2**29


@dataclass(frozen=True)
class Estimate:
    """One case.

    Attributes
    ----------
    case : str
    arithmetic : str
        In which the network would be run, where that will be chosen; else empty.
    facts : CaseFacts or None
        None where the header cannot be read.
    plan : Plan or None
        The fastest that fits; where none does, the closest.
    problem : str or None
        Why the case cannot be predicted here.
    stock_bytes : int
        About what stock's command takes, with one process each for preprocessing and export.
    least_ram_bytes, least_ram_unspilled_bytes : int
        The smallest RAM budgets with which the case is predicted, with and without arrays on disk.
    read_bytes : int
        Of the files of images and mask.
    written_bytes : int
        Of the label map, at most: as it is where its file is not compressed.
    """

    case: str
    arithmetic: str = ""
    facts: CaseFacts | None = None
    plan: Plan | None = None
    problem: str | None = None
    stock_bytes: int = 0
    least_ram_bytes: int = 0
    least_ram_unspilled_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def tiles(self) -> int:
        """How many are computed for each fold, those that several columns need as often."""
        if self.facts is None or self.plan is None:
            return 0
        return self.facts.cut(self.plan.placement.columns).tiles

    @property
    def readable(self) -> bool:
        """Whether the header could be read."""
        return self.facts is not None

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts; sizes in bytes, shapes in the axis order of the network, of a part its own."""
        told: dict[str, Any] = {"case": self.case, "fits": self.problem is None, "problem": self.problem}
        if self.arithmetic:
            told["arithmetic"] = self.arithmetic
        if self.facts is None or self.plan is None:
            return told
        chosen = vars(self.plan.placement).items()
        return told | {
            "original_shape": self.facts.original_shape,
            "network_shape": self.facts.grid.image_shape,
            "tiles": self.tiles,
            "tiles_of_case": self.facts.tiles_of_case,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "placement": {name: value.value if isinstance(value, Place) else value for name, value in chosen},
            "projected_bytes": {place.value: self.plan.projected_bytes(place) for place in Place},
            "reserved_bytes": {place.value: self.plan.budget.reserved(place) for place in Place},
            "budget_bytes": {place.value: self.plan.budget.limit(place) for place in Place},
            "stage": self.plan.fullest_stage(Place.RAM).value,
            "least_ram_bytes": self.least_ram_bytes,
            "least_ram_unspilled_bytes": self.least_ram_unspilled_bytes,
            "stock_bytes": self.stock_bytes,
        }


def estimates(
    cases: Iterable[tuple[str, list[str], str | None]],
    sizes_of: Callable[[list[str]], CaseSizes],
    model: ModelFacts,
    budget: Budget,
    probabilities: bool,
    file_ending: str | None,
    arithmetic: str = "",
    mask_of: Callable[[list[str]], str | None] = lambda files: None,
) -> Iterator[Estimate]:
    """Estimate cases, each given as name, files and file of the previous stage; `mask_of` finds the mask of files."""
    for name, files, previous_stage in cases:
        try:
            if file_ending is not None:  # else they are no channels by their names
                check_numbers(files, file_ending)
            sizes, mask = sizes_of(files), mask_of(files)
            facts = sizes.of_files(name, files, previous_stage, probabilities, mask)
            whole = facts
            if sizes.bbox is not None:
                whole = replace(sizes, bbox=None).of_files(name, files, previous_stage, probabilities)
            read_bytes = sizes.stored_bytes(files if mask is None else [*files, mask])
        except UsageError as error:
            yield Estimate(name, arithmetic, problem=str(error))
            continue
        plan = closest_plan(model, facts, budget)
        spilled, unspilled = (smallest_ram_bytes(model, facts, budget, spill) for spill in (True, False))
        problem = None if plan.fits_everywhere() else refused(model, facts, plan)
        written_bytes = math.prod(facts.original_shape) * model.label_bytes
        stocks = stock_bytes(model, whole)
        yield Estimate(name, arithmetic, facts, plan, problem, stocks, spilled, unspilled, read_bytes, written_bytes)


def stock_bytes(model: ModelFacts, facts: CaseFacts) -> int:
    """Return about what stock takes while it exports.

    All logits as halves, once more for the other process, as float64, and resampled as halves. Measured: 7.8 GiB for
    512 x 512 x 250 and 15 classes, 15.9 GiB for 256 x 256 x 200 and 118 classes in a single process.
    """
    network, cropped = math.prod(facts.grid.image_shape), math.prod(facts.cropped_shape)
    return model.heads * ((2 + 2 + 8) * network + 2 * cropped) + _STOCK_PROCESSES_BYTES
