"""Where every large array of a case will live, and what that adds up to: a pure function of numbers.

The plan is made before any work starts. It can be printed without running, is asserted in tests, and is what an error
shows when a case does not fit. Executors take their decisions from the plan and make none of their own.

Words: *reserved* is what the process already holds (libraries, weights); *projected* is reserved plus the planned
allocations of the fullest stage; *budget* is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.tiling import TileGrid
from nnunet_lowmem.types import Shape3

HALF_BYTES = 2
SINGLE_BYTES = 4
# winner index, gap exponent and magnitude exponent of a surveyed voxel
_SURVEY_BYTES = 4
# what compilers and libraries take when they are first used, after "reserved" was measured
_LIBRARY_BYTES = 256 * 2**20
# a sum over folds below this stays in RAM: a file would save nothing that matters
_SMALL_BYTES = 64 * 2**20


class Place(Enum):
    """Where an array lives."""

    RAM = "RAM"
    VRAM = "VRAM"
    DISK = "disk"


class Stage(Enum):
    """Stages of a case that follow each other; export runs inside prediction, slab by slab."""

    PREPROCESSING = "preprocessing"
    PREDICTION = "prediction"
    WRITING = "writing"


@dataclass(frozen=True)
class Budget:
    """Limits in bytes, and what is already in use; None means no limit is known (no such device).

    Attributes
    ----------
    ram_bytes, vram_bytes : int or None
    reserved_ram_bytes, reserved_vram_bytes : int
    binding : bool
        The limits were asked for, so that a plan beyond them is refused.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    reserved_ram_bytes: int = 0
    reserved_vram_bytes: int = 0
    binding: bool = False

    def limit(self, place: Place) -> int | None:
        """Return the limit of a place."""
        return {Place.RAM: self.ram_bytes, Place.VRAM: self.vram_bytes, Place.DISK: None}[place]

    def reserved(self, place: Place) -> int:
        """Return what is in use before the plan begins."""
        return {Place.RAM: self.reserved_ram_bytes, Place.VRAM: self.reserved_vram_bytes, Place.DISK: 0}[place]


@dataclass(frozen=True)
class ModelFacts:
    """What the planner needs to know of a model.

    Attributes
    ----------
    heads, channels, folds : int
    weight_bytes : int
        One fold's weights.
    activation_bytes : int
        Peak of the network on one tile, the head's output included.
    mirrored : bool
        Test-time mirroring keeps two more copies of the head's output.
    label_bytes : int
        Of one voxel of the label map.
    """

    heads: int
    channels: int
    folds: int
    weight_bytes: int
    activation_bytes: int
    mirrored: bool
    label_bytes: int


@dataclass(frozen=True)
class CaseFacts:
    """What the planner needs to know of a case.

    Attributes
    ----------
    name : str
    grid : TileGrid
    original_shape, cropped_shape : int, 3
    streams : bool
        The resampling of logits is known as tables, so that no head is needed as a whole.
    """

    name: str
    grid: TileGrid
    original_shape: Shape3
    cropped_shape: Shape3
    streams: bool


@dataclass(frozen=True)
class Allocation:
    """One large array: what, where, how large, and in which stages it is alive."""

    name: str
    place: Place
    size_bytes: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Plan:
    """Placement of one case.

    Attributes
    ----------
    case : str
    window_on_device : bool
    fold_sum_on_disk : bool
    allocations : tuple of Allocation
    budget : Budget
    """

    case: str
    window_on_device: bool
    fold_sum_on_disk: bool
    allocations: tuple[Allocation, ...]
    budget: Budget

    def planned_bytes(self, place: Place, stage: Stage) -> int:
        """Sum of the allocations of a stage in a place."""
        return sum(a.size_bytes for a in self.allocations if a.place is place and stage in a.stages)

    def fullest_stage(self, place: Place) -> Stage:
        """Stage with the largest sum in a place."""
        return max(Stage, key=lambda stage: self.planned_bytes(place, stage))

    def projected_bytes(self, place: Place) -> int:
        """Peak of a place: reserved plus the fullest stage."""
        return self.budget.reserved(place) + self.planned_bytes(place, self.fullest_stage(place))

    def excess_bytes(self) -> int:
        """How far the projected peaks are beyond their limits, added up."""
        limits = [(place, self.budget.limit(place)) for place in Place]
        return sum(max(0, self.projected_bytes(place) - limit) for place, limit in limits if limit is not None)

    def fits(self, place: Place) -> bool:
        """Whether the projected peak of a place is within its limit."""
        limit = self.budget.limit(place)
        return limit is None or self.projected_bytes(place) <= limit


def plan_case(model: ModelFacts, case: CaseFacts, budget: Budget, device: str, window_on_device: bool = True) -> Plan:
    """Choose the fastest placement that fits the budget.

    Parameters
    ----------
    model : ModelFacts
    case : CaseFacts
    budget : Budget
    device : str
        Type of the network's device: "cpu", "cuda" or "mps".
    window_on_device : bool
        False keeps the window in RAM whatever fits (``--not_on_device``).

    Raises
    ------
    BudgetError
        If the limits bind and no placement fits.
    """
    on_device = (True, False) if device == "cuda" and window_on_device else (False,)
    sum_bytes = _fold_sum_bytes(model, case.grid)
    on_disk = (False, True) if 0 < sum_bytes <= _SMALL_BYTES else (sum_bytes > 0,)
    plans = [
        Plan(case.name, window, disk, tuple(_allocations(model, case, device, window, disk)), budget)
        for window in on_device
        for disk in on_disk
    ]
    for plan in plans:
        if plan.fits(Place.RAM) and plan.fits(Place.VRAM):
            return plan
    closest = min(plans, key=Plan.excess_bytes)
    if budget.binding:
        raise BudgetError(refusal(closest))
    return closest


def refusal(plan: Plan) -> str:
    """Say why a plan does not fit: the numbers, the stage, the largest allocation, and which flag to turn."""
    place = Place.RAM if not plan.fits(Place.RAM) else Place.VRAM
    stage = plan.fullest_stage(place)
    largest = max(
        (a for a in plan.allocations if a.place is place and stage in a.stages), key=lambda a: a.size_bytes
    )  # fmt: skip
    flag = "--max_ram" if place is Place.RAM else "--max_vram"
    return (
        f"case {plan.case} does not fit: {place.value} projected {_gib(plan.projected_bytes(place))} in stage "
        f"{stage.value}, budget {_gib(plan.budget.limit(place) or 0)}, of which reserved "
        f"{_gib(plan.budget.reserved(place))}; the largest allocation is {largest.name} with "
        f"{_gib(largest.size_bytes)}. Raise {flag} or run on a machine that has more."
    )


def _allocations(
    model: ModelFacts, case: CaseFacts, device: str, window_on_device: bool, fold_sum_on_disk: bool
) -> Iterator[Allocation]:
    grid = case.grid
    compute = Place.VRAM if device == "cuda" else Place.RAM
    window = Place.VRAM if window_on_device else Place.RAM
    predict, write = (Stage.PREDICTION,), (Stage.WRITING,)
    image_bytes = model.channels * math.prod(grid.image_shape) * SINGLE_BYTES
    label_map_bytes = math.prod(case.original_shape) * model.label_bytes
    tile_voxels = math.prod(grid.tile_shape)
    head_bytes = model.heads * tile_voxels * SINGLE_BYTES
    plane_voxels = math.prod(grid.padded_shape) // grid.padded_shape[grid.roll_axis]
    depth = grid.tile_shape[grid.roll_axis] + 1

    yield Allocation("input image", Place.RAM, _input_bytes(model, case), (Stage.PREPROCESSING,))
    yield Allocation("preprocessed image", Place.RAM, image_bytes, tuple(Stage))
    yield Allocation("compiled kernels and library buffers", Place.RAM, _LIBRARY_BYTES, tuple(Stage))
    yield Allocation("weights", compute, model.weight_bytes, predict)
    yield Allocation("network on one tile", compute, model.activation_bytes, predict)
    if model.mirrored:
        yield Allocation("mirrored copies of the head's output", compute, 2 * head_bytes, predict)
    if compute is not window:
        yield Allocation("tile logits moved to RAM", Place.RAM, head_bytes, predict)
    window_bytes = (model.heads + 1) * depth * plane_voxels * HALF_BYTES
    yield Allocation("rolling window", window, window_bytes, predict)
    yield Allocation("labels of a slab", window, depth * plane_voxels * _SURVEY_BYTES, predict)
    yield Allocation("label map", Place.RAM, label_map_bytes, (Stage.PREDICTION, Stage.WRITING))
    yield Allocation("writer's copy of the label map", Place.RAM, label_map_bytes, write)
    if model.folds > 1:
        place = Place.DISK if fold_sum_on_disk else Place.RAM
        yield Allocation("sum over folds", place, _fold_sum_bytes(model, grid), predict)
        yield Allocation("plane of the sum", Place.RAM, 2 * model.heads * plane_voxels * HALF_BYTES, predict)
    if not case.streams:
        yield Allocation("finished logits", Place.DISK, model.heads * math.prod(grid.image_shape) * HALF_BYTES, predict)
        cropped = math.prod(case.cropped_shape)
        yield Allocation("heads being resampled", Place.RAM, 10 * cropped * SINGLE_BYTES, predict)


def _input_bytes(model: ModelFacts, case: CaseFacts) -> int:
    """Image as read and the working arrays of its preprocessing."""
    return 2 * model.channels * math.prod(case.original_shape) * SINGLE_BYTES


def _fold_sum_bytes(model: ModelFacts, grid: TileGrid) -> int:
    return 0 if model.folds < 2 else model.heads * math.prod(grid.image_shape) * HALF_BYTES


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
