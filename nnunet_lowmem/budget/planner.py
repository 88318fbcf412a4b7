"""Where every large array of a case will live, and what that adds up to: a pure function of numbers.

The plan is made before any work starts. It can be printed without running, is asserted in tests, and is what an error
shows when a case does not fit. Executors take their decisions from the plan and make none of their own.

`placements` lists what can be chosen, fastest first; `plan_case` takes the first that fits. All give the same labels.

Words: *reserved* is what the process already holds (libraries, weights); *projected* is reserved plus the planned
allocations of the fullest stage; *budget* is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product, takewhile

from nnunet_lowmem.budget.arrays import HALF_BYTES, MIB, Budget, Placement, Stage, allocations, finished_bytes
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.budget.refusals import Ways, refusal, too_small
from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.types import Place, Shape3

# a sum over folds below this stays in RAM: a file would save nothing that matters
_SMALL_BYTES = 64 * MIB
# what a window on disk costs beside the other choices
_DISK_COST = 16
# and in time, by what a tile moves: added up and divided, read for labels, moved on; of tiles where none is timed yet
_MOVES, _DISK_BYTES_PER_S, _DISK_SHARE = 6, 600e6, 0.15
# columns with more tiles than this, for each of the whole case, are no way to predict
_MOST_TILES = 2.0


def plan_case(model: ModelFacts, case: CaseFacts, budget: Budget) -> Plan:
    """Choose the fastest placement that fits the budget.

    Raises
    ------
    BudgetError
        If no placement fits.
    """
    plan = closest_plan(model, case, budget)
    if not plan.fits_everywhere():
        error = BudgetError(refused(model, case, plan))
        error.place = too_small(plan)
        raise error
    return plan


def refused(model: ModelFacts, case: CaseFacts, plan: Plan) -> str:
    """Say why the plan that comes closest does not fit, and what would let another one fit."""
    return refusal(plan, Ways.of(all_plans(certain(model), case, plan.budget)))


def closest_plan(model: ModelFacts, case: CaseFacts, budget: Budget) -> Plan:
    """As `plan_case`; where nothing fits, the plan that comes closest to fitting.

    For what the network may take beyond what is certain, as long as none of its tiles is measured, room is left where
    there is any. Where there is none, the placement is the one that leaves most, and the plan counts what is certain.
    """
    plan = _closest(all_plans(model, case, budget))
    if plan.fits_everywhere() or not model.unmeasured_bytes:
        return plan
    plan = placed(certain(model), case, budget, plan.placement)
    return plan if plan.fits_everywhere() else closest_plan(certain(model), case, budget)


def _closest(plans: Iterable[Plan]) -> Plan:
    closest: Plan | None = None
    for plan in plans:
        if plan.fits_everywhere():
            return plan
        if closest is None or plan.excess_bytes() < closest.excess_bytes():
            closest = plan
    assert closest is not None, "there is always a placement"
    return closest


def certain(model: ModelFacts) -> ModelFacts:
    """Return what is certain of a model, whose network may take more."""
    return replace(model, unmeasured_bytes=0)


def placed(model: ModelFacts, case: CaseFacts, budget: Budget, placement: Placement) -> Plan:
    """Return the plan of a placement, whether it fits or not."""
    return Plan(case.name, placement, tuple(allocations(model, case, placement)), budget)


def all_plans(model: ModelFacts, case: CaseFacts, budget: Budget, columns: Shape3 | None = None) -> Iterator[Plan]:
    """Yield the plan of every placement, fastest first; if `columns` are given, of those with the same."""
    for placement in placements(model, case):
        if columns in (None, placement.columns):
            yield placed(model, case, budget, placement)


def next_plan(plans: Iterable[Plan], failed: Plan, place: Place, stage: Stage = Stage.PREDICTION) -> Plan | None:
    """Return the fastest plan that takes less than `failed` in a place during a stage, if any fits elsewhere.

    An allocation has failed in `place` although the plan said it fits: somebody else has taken memory meanwhile.
    """
    needed = failed.planned_bytes(place, stage)
    elsewhere = [other for other in Place if other is not place]
    smaller = (plan for plan in plans if plan.planned_bytes(place, stage) < needed)
    return next((plan for plan in smaller if all(map(plan.fits, elsewhere))), None)


def smallest_ram_bytes(model: ModelFacts, case: CaseFacts, budget: Budget, spill: bool) -> int:
    """Return the least RAM that any placement projects, with or without arrays on disk."""
    frugal = [c for c in placements(model, case) if c.threads == 1 and c.slab_planes is not None]
    spills = {chosen: _spills(chosen, case) for chosen in frugal}
    fewest = min(spills.values())  # what is on disk already stays there
    frugal = [chosen for chosen in frugal if spill or spills[chosen] == fewest]
    # in RAM no place is better than disk, so with spilling only what is on disk altogether has to be looked at
    most = max(spills[chosen] for chosen in frugal)
    plans = [placed(model, case, budget, chosen) for chosen in frugal if spills[chosen] >= most - 1]
    return min(plan.projected_bytes(Place.RAM) for plan in plans)


def _spills(chosen: Placement, case: CaseFacts) -> int:
    """Count the arrays that are put on disk, where an input that is read from its files is already."""
    input_place = chosen.input if case.input.spilled_bytes else Place.RAM
    places = [input_place, chosen.window, chosen.image, chosen.label_map, chosen.planes, chosen.weights]
    return places.count(Place.DISK)


def placements(model: ModelFacts, case: CaseFacts) -> tuple[Placement, ...]:
    """All placements in the order of what they cost in time."""
    small = finished_bytes(model, case) <= _SMALL_BYTES
    either = ((Place.RAM, 0), (Place.DISK, 2))
    windows = [(Place.RAM, 0), (Place.DISK, _DISK_COST)]
    if model.device == "cuda" and model.window_on_device:
        windows = [(Place.VRAM, 0), (Place.RAM, 8), (Place.DISK, _DISK_COST)]
    images = either if case.image_place is None else ((case.image_place, 0),)
    inputs: tuple[tuple[Place, float], ...] = ((case.input.place or Place.RAM, 0),)
    if case.input.place is None and case.input.spilled_bytes is not None:
        # read tile by tile, it takes less time than a preprocessed image on disk
        inputs = ((Place.RAM, 0), (Place.DISK, 1.5 if case.input.is_image else 3))
    planes: tuple[tuple[Place, int], ...] = (
        ((Place.RAM, 0), (Place.DISK, 1)) if small else ((Place.DISK, 0), (Place.RAM, 1))
    )
    planes = planes if model.folds > 1 or not case.streams else ((Place.RAM, 0),)
    threads = ((model.threads, 0), (1, 4)) if model.threads > 1 else ((1, 0),)
    slabs: tuple[tuple[int | None, int], ...] = ((None, 0), (8, 1))
    blocks = ((256 * MIB, 0), (16 * MIB, 1)) if model.device == "cuda" else ((256 * MIB, 0),)
    weights: tuple[tuple[Place, float], ...] = ((model.kept_place or Place.RAM, 0),)
    if model.kept_bytes and model.kept_place is None:
        # mapped pages, read once for each fold: less than anything else
        weights = ((Place.RAM, 0), (Place.DISK, 0.5))
    rest = planes, threads
    maps = _maps(case.leaves)
    choices = list(product(windows, images, maps, *rest, slabs, blocks, weights, inputs, [((1, 1, 1), 0.0)]))
    # what is cut may be as small as can be otherwise
    columns, maps = _columns(model, case), _maps(case.leaves_in_columns)
    choices += product(windows, images, maps, *rest, slabs[-1:], blocks[-1:], weights, inputs, columns)
    # labels of a window on disk are found for few planes at a time, since what is read of it is mapped
    choices = [chosen for chosen in choices if (chosen[0][0], chosen[5][0]) != (Place.DISK, None)]
    choices.sort(key=lambda chosen: sum(cost for _, cost in chosen))
    return tuple(Placement(*(value for value, _ in chosen)) for chosen in choices)  # type: ignore[arg-type]  # in order


def _maps(leaves: bool) -> tuple[tuple[Place | None, float], ...]:
    """Return where the label map may be: the thread that writes it beside the next case is given up for its memory."""
    return ((Place.RAM, 0), *[(None, 0.75)] * leaves, (Place.DISK, 2))


def _columns(model: ModelFacts, case: CaseFacts) -> list[tuple[Shape3, float]]:
    """Return into which columns a case may be cut, and the cost: a disk's, where further tiles take as long as that."""
    if not case.may_be_cut or not case.tiles:
        return []
    moved_bytes = _MOVES * model.heads * math.prod(case.grid.tile_shape) * HALF_BYTES
    # at most 1: beside a fast device, all tiles once more would else cost less than a window in RAM
    share = min(1.0, moved_bytes / _DISK_BYTES_PER_S / model.tile_s) if model.tile_s else _DISK_SHARE
    found = ((counts, case.grid.cut(counts)[1]) for counts in case.grid.columns())
    wise = takewhile(lambda each: each[1] <= _MOST_TILES, found)
    return [(counts, 0.5 + _DISK_COST * (tiles - 1) / share) for counts, tiles in wise]
