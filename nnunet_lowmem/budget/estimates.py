"""What a case will take, by its header alone, beside what stock nnU-Net takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.input_memory import STOCK_NETWORK_BYTES, STOCK_VOXEL_BYTES
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
    model : ModelFacts or None
    stock : StockBytes or None
        Stage by stage.
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
    model: ModelFacts | None = None
    stock: StockBytes | None = None

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
        stock = StockBytes.of(model, whole, len(sizes.configuration.normalization_schemes))
        sizes_told = stock.largest, spilled, unspilled, read_bytes, written_bytes
        yield Estimate(name, arithmetic, facts, plan, problem, *sizes_told, model, stock)


@dataclass(frozen=True)
class StockBytes:
    """About what stock's command takes in its stages, with one process each for preprocessing and export.

    Attributes
    ----------
    preprocessing, prediction, export : int
        Of RAM, where the network runs on the CPU.
    vram : int
        Of a GPU during prediction; where that is not there, stock begins the case again in RAM.
    """

    preprocessing: int
    prediction: int
    export: int
    vram: int

    @property
    def largest(self) -> int:
        """Return the peak."""
        return max(self.preprocessing, self.prediction, self.export)

    @classmethod
    def of(cls, model: ModelFacts, facts: CaseFacts, image_channels: int) -> StockBytes:
        """Count the large arrays; the other channels of a cascade's network are labels, made in its grid.

        Preprocessing: as `input_memory` counts nnU-Net's own. Prediction: all logits as halves, and while infinity is
        looked for once more without sign, and a mask; a tile and weights; of several folds the sum, in RAM. Export: all
        logits as halves, once more for the other process and, where they are resampled, as float64 and the result as
        halves. Measured: 7.8 GiB for 512 x 512 x 250 and 15 classes, 15.9 GiB for 256 x 256 x 200 and 118 classes in a
        single process.
        """
        network, cropped = math.prod(facts.grid.image_shape), math.prod(facts.cropped_shape)
        original = math.prod(facts.original_shape)
        preprocessing = image_channels * (STOCK_VOXEL_BYTES * original + STOCK_NETWORK_BYTES * network)
        preprocessing += (model.channels - image_channels) * (4 + 4) * network
        image = 4 * model.channels * network
        on_device = model.heads * (2 + 2 + 1) * network + image + model.weight_bytes + model.activation_bytes
        prediction = on_device + model.folds * model.weight_bytes + 2 * model.heads * network * (model.folds > 1)
        resampled = facts.grid.image_shape != facts.cropped_shape
        export = model.heads * ((2 + 2) * network + resampled * (8 * network + 2 * cropped))
        return cls(
            preprocessing + _STOCK_PROCESSES_BYTES,
            prediction + _STOCK_PROCESSES_BYTES,
            export + _STOCK_PROCESSES_BYTES,
            on_device,
        )
