"""Plans for machines nobody owns: what is projected, what is refused, and what more memory buys."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lowmem.budget.arrays import Budget, Stage
from nnunet_lowmem.budget.facts import CaseFacts, InputFacts, ModelFacts
from nnunet_lowmem.budget.planner import (
    Plan,
    all_plans,
    closest_plan,
    next_plan,
    placements,
    plan_case,
    refused,
    smallest_ram_bytes,
)
from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.types import Place
from nnunet_lowmem.window.tiling import tile_grid

GIB = 2**30
MEASURED = tuple(Place)


def model(**changes) -> ModelFacts:
    facts = ModelFacts(
        heads=15, channels=1, folds=1, weight_bytes=120 << 20, activation_bytes=2 << 30, label_bytes=1, threads=4
    )
    return replace(facts, **changes)


def case(shape=(250, 512, 512), patch=(96, 160, 160), streams=True) -> CaseFacts:
    return case_of(tile_grid(shape, patch, 0.5), shape, shape, streams)


def case_of(grid, original, cropped, streams, name="ct_001", **more) -> CaseFacts:
    image, file = (4 * math.prod(grid.image_shape), 2 * math.prod(original))
    return CaseFacts(name, grid, original, cropped, streams, 2 * file, file + 2**24, image, **more)


@st.composite
def models(draw) -> ModelFacts:
    return ModelFacts(
        heads=draw(st.integers(1, 700)),
        channels=draw(st.integers(1, 5)),
        folds=draw(st.integers(1, 6)),
        weight_bytes=draw(st.integers(1, 2 * GIB)),
        activation_bytes=draw(st.integers(1, 20 * GIB)),
        label_bytes=draw(st.integers(1, 2)),
        kept_bytes=draw(st.integers(0, 2 * GIB)),
        kept_place=draw(st.sampled_from([None, None, Place.DISK])),
        threads=draw(st.integers(1, 64)),
        tile_s=draw(st.sampled_from([0.0, 0.1, 10.0])),
    )


BYTES = st.integers(0, 4 * GIB)


@st.composite
def cases(draw) -> CaseFacts:
    shapes = [draw(st.tuples(*[st.integers(1, 1200)] * 3)) for _ in range(3)]
    patch = draw(st.one_of(st.tuples(*[st.integers(8, 256)] * 2), st.tuples(*[st.integers(8, 256)] * 3)))
    grid = tile_grid(shapes[0], patch, draw(st.floats(0.2, 1.0)))
    place = draw(st.sampled_from([None, Place.RAM, Place.DISK]))
    streams = draw(st.booleans())
    further = {"tiles": grid.tile_count, "may_be_cut": streams and draw(st.booleans())}
    return case_of(grid, shapes[1], shapes[2], streams, image_place=place, export_bytes=draw(BYTES), **further)


@st.composite
def budgets(draw) -> Budget:
    limit = st.one_of(st.none(), st.integers(1, 200 * GIB))
    return Budget(draw(limit), draw(limit), draw(BYTES), draw(BYTES), draw(limit))


DEVICES = st.sampled_from(["cpu", "cuda", "mps"])


def seen_by(device: str, budget: Budget) -> Budget:
    """Only CUDA has VRAM."""
    return budget if device == "cuda" else replace(budget, vram_bytes=None, reserved_vram_bytes=0)


def on(model: ModelFacts, device: str, window_on_device: bool = True) -> ModelFacts:
    return replace(model, device=device, window_on_device=window_on_device)


def plan_or_none(*arguments) -> Plan | None:
    try:
        return plan_case(*arguments)
    except BudgetError:
        return None


def predicting(plan: Plan, place: Place) -> int:
    return plan.planned_bytes(place, Stage.PREDICTION)


def rank(plan: Plan, *arguments) -> int:
    """Smaller is faster."""
    return placements(*arguments).index(plan.placement)


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets(), DEVICES, st.booleans())
def test_projected_is_reserved_plus_the_fullest_stage(model, case, budget, device, on_device):
    plan = closest_plan(on(model, device, on_device), case, budget)
    for place in MEASURED:
        sums = [sum(a.size_bytes for a in plan.allocations if a.place is place and s in a.stages) for s in Stage]
        assert plan.projected_bytes(place) == budget.reserved(place) + max(sums)
        assert sums[list(Stage).index(plan.fullest_stage(place))] == max(sums)


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets(), DEVICES)
def test_a_binding_budget_is_kept_or_the_case_refused(model, case, budget, device):
    budget = seen_by(device, budget)
    plan = plan_or_none(on(model, device), case, budget)
    if plan is not None:
        for place in MEASURED:
            assert budget.limit(place) is None or plan.projected_bytes(place) <= budget.limit(place)
    else:
        assert not any(p.fits_everywhere() for p in all_plans(on(model, device), case, budget))


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets(), DEVICES, st.integers(0, 100 * GIB), st.integers(0, 100 * GIB))
def test_more_budget_never_gives_a_slower_placement(model, case, budget, device, more_ram, more_vram):
    budget = replace(budget, ram_bytes=budget.ram_bytes or GIB, vram_bytes=budget.vram_bytes or GIB)
    larger = replace(budget, ram_bytes=budget.ram_bytes + more_ram, vram_bytes=budget.vram_bytes + more_vram)
    smaller, larger = (plan_or_none(on(model, device), case, seen_by(device, b)) for b in (budget, larger))
    places = (on(model, device), case)
    assert smaller is None or (larger is not None and rank(larger, *places) <= rank(smaller, *places))


@settings(deadline=None, max_examples=50)
@given(models(), cases(), DEVICES, st.data())
def test_a_budget_of_exactly_the_projection_is_enough(model, case, device, data):
    unlimited = plan_case(on(model, device), case, Budget(reserved_ram_bytes=GIB, reserved_vram_bytes=GIB))
    limits = [unlimited.projected_bytes(place) for place in (Place.RAM, Place.VRAM)]
    exact = seen_by(device, Budget(*limits, GIB, GIB))
    places = (on(model, device), case)
    assert plan_case(on(model, device), case, exact).placement == unlimited.placement
    place = data.draw(st.sampled_from(["ram_bytes", "vram_bytes"])) if device == "cuda" else "ram_bytes"
    less = plan_or_none(on(model, device), case, replace(exact, **{place: getattr(exact, place) - 1}))
    assert less is None or rank(less, *places) > rank(unlimited, *places)


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets())
def test_window_is_on_the_device_only_on_cuda_and_if_wanted(model, case, budget):
    for device, wanted in (("cpu", True), ("mps", True), ("cuda", False)):
        assert closest_plan(on(model, device, wanted), case, budget).placement.window is not Place.VRAM


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets())
def test_nothing_is_planned_on_a_device_that_is_not_there(model, case, budget):
    for device in ("cpu", "mps"):
        assert all(a.place is not Place.VRAM for a in closest_plan(on(model, device), case, budget).allocations)


@settings(deadline=None, max_examples=50)
@given(models(), cases(), budgets(), DEVICES)
def test_sizes_are_positive_and_names_distinct(model, case, budget, device):
    allocations = closest_plan(on(model, device), case, budget).allocations
    assert all(a.size_bytes >= 0 and a.stages for a in allocations)
    assert len({a.name for a in allocations}) == len(allocations)


@settings(deadline=None, max_examples=50)
@given(models(), DEVICES, st.integers(0, 2), st.integers(1, 500))
def test_length_costs_no_class(model, device, axis, planes):
    """More planes cost more of the image, but nothing that grows with the heads."""
    shapes = [tuple(size + extra * (a == axis) for a in range(3)) for size in (40,) for extra in (60, 60 + planes)]
    cases = [case_of(tile_grid(shape, (40, 40, 40), 0.5), (9, 9, 9), (9, 9, 9), True) for shape in shapes]
    shorter, longer = (
        plan_case(replace(on(model, device), folds=1), case, Budget()).projected_bytes(Place.RAM) for case in cases
    )
    assert longer - shorter <= planes * 40 * 40 * 4


def test_window_leaves_the_device_before_a_case_is_refused():
    roomy = plan_case(on(model(), "cuda"), case(), Budget(64 * GIB, 80 * GIB))
    tight = plan_case(on(model(), "cuda"), case(), Budget(64 * GIB, 3 * GIB))
    assert roomy.placement.window is Place.VRAM
    assert tight.placement.window is Place.RAM
    assert tight.projected_bytes(Place.RAM) > roomy.projected_bytes(Place.RAM)


def test_large_sum_over_folds_is_spilled_and_a_small_one_is_not():
    large = plan_case(model(folds=5), case(), Budget())
    small = plan_case(model(folds=5), case((40, 40, 40), (32, 32, 32)), Budget())
    single = plan_case(model(folds=1), case(), Budget())
    assert [p.placement.planes for p in (large, small, single)] == [Place.DISK, Place.RAM, Place.RAM]


def test_refusal_is_not_a_usage_error_and_has_its_own_exit_code():
    with pytest.raises(BudgetError):
        plan_case(model(), case(), Budget(GIB))
    assert BudgetError.exit_code == 3


@pytest.mark.parametrize(
    "budget, device, place, flag",
    [
        (Budget(2 * GIB, None, 700 << 20, 0), "cpu", Place.RAM, "--max_ram"),
        (Budget(1 * GIB, 80 * GIB, 960 << 20, 0), "cuda", Place.RAM, "--max_ram"),
        (Budget(64 * GIB, 2 * GIB, 0, 300 << 20), "cuda", Place.VRAM, "--max_vram"),
    ],
)
def test_refusal_names_what_where_and_how_much(budget, device, place, flag):
    facts = model(activation_bytes=30 * GIB) if device == "cuda" and place is Place.VRAM else model(heads=600)
    with pytest.raises(BudgetError) as caught:
        plan_case(on(facts, device), case(), budget)
    text = str(caught.value)
    plan = closest_plan(on(facts, device), case(), budget)
    largest = max(
        (a for a in plan.allocations if a.place is place and plan.fullest_stage(place) in a.stages),
        key=lambda a: a.size_bytes,
    )
    for size in (plan.projected_bytes(place), budget.limit(place), budget.reserved(place), largest.size_bytes):
        assert f"{size / GIB:.2f} GiB" in text
    for word in ("ct_001", place.value, f"stage {plan.fullest_stage(place).value}", largest.name, flag):
        assert word in text
    assert {"--max_ram", "--max_vram"} & set(re.findall(r"--\w+", text)) == {flag}
    assert text == refused(on(facts, device), case(), plan)
    assert "\n" not in text


def test_refusal_speaks_of_the_placement_that_is_closest_to_fitting():
    facts = model(heads=600, activation_bytes=8 * GIB)
    with pytest.raises(BudgetError) as caught:
        plan_case(facts, case(), Budget(2 * GIB, disk_bytes=100 * GIB))
    plans = all_plans(facts, case(), Budget())
    least = min(plan.projected_bytes(Place.RAM) for plan in plans)
    assert f"projected {least / GIB:.2f} GiB" in str(caught.value)


def test_arrays_go_to_disk_only_as_far_as_they_must():
    facts, shape = model(heads=60, activation_bytes=GIB // 4), case((1000, 512, 512), (64, 64, 64))
    plans = list(all_plans(facts, shape, Budget()))
    free = plans[0].projected_bytes(Place.RAM)
    least = smallest_ram_bytes(facts, shape, Budget(), spill=True)
    assert least < free / 3
    assert smallest_ram_bytes(facts, shape, Budget(), spill=False) > least
    seen = []
    for limit in [*range(least, free, (free - least) // 20), free]:
        placement = plan_case(facts, shape, Budget(limit)).placement
        seen.append(sum(getattr(placement, name) is Place.DISK for name in ("window", "image", "label_map")))
    assert seen[0] == max(seen) >= 2
    assert seen[-1] == 0


@settings(deadline=None, max_examples=50)
@given(models(), cases(), DEVICES)
def test_weights_are_the_first_to_leave_ram(model, case, device):
    """They cost the least time; they take RAM in every stage until they are on disk, and do not come back."""
    free = closest_plan(replace(on(model, device), kept_place=None), case, Budget())
    assert free.placement.weights is Place.RAM
    tight = Budget(free.projected_bytes(Place.RAM) - 1)
    chosen = closest_plan(replace(on(model, device), kept_place=None), case, tight)
    if model.kept_bytes > 0:
        assert chosen.placement == replace(free.placement, weights=Place.DISK)
        assert free.projected_bytes(Place.RAM) - chosen.projected_bytes(Place.RAM) == model.kept_bytes
    moved = closest_plan(replace(on(model, device), kept_place=Place.DISK), case, Budget())
    assert moved.placement == replace(free.placement, weights=Place.DISK)


def test_nothing_is_spilled_where_there_is_no_room():
    facts, shape = model(heads=60), case((1000, 512, 512), (64, 64, 64))
    with pytest.raises(BudgetError, match="projected"):
        plan_case(facts, shape, Budget(3 * GIB, disk_bytes=0))
    roomy = plan_case(facts, shape, Budget(64 * GIB, disk_bytes=0))
    assert roomy.planned_bytes(Place.DISK, Stage.PREDICTION) == 0


@settings(deadline=None, max_examples=50)
@given(models(), cases(), DEVICES)
def test_recovery_goes_down_a_ladder_that_ends(model, case, device):
    plans = list(all_plans(on(model, device), case, Budget()))
    for place in (Place.RAM, Place.VRAM):
        plan, steps = plans[0], 0
        while (following := next_plan(plans, plan, place)) is not None:
            assert predicting(following, place) < predicting(plan, place)
            plan, steps = following, steps + 1
        assert steps < len(plans)
        assert predicting(plan, place) == min(predicting(p, place) for p in plans)


@settings(deadline=None, max_examples=50)
@given(models(), cases(), DEVICES)
def test_smallest_ram_is_that_of_the_most_frugal_plan(model, case, device):
    plans = list(all_plans(on(model, device), case, Budget()))
    least = min(plan.projected_bytes(Place.RAM) for plan in plans)
    assert smallest_ram_bytes(on(model, device), case, Budget(), spill=True) == least
    if case.image_place is not Place.DISK and model.kept_place is None:
        unspilled = [plan for plan in plans if plan.planned_bytes(Place.DISK, plan.fullest_stage(Place.DISK)) == 0]
        least = min(plan.projected_bytes(Place.RAM) for plan in unspilled)
        assert smallest_ram_bytes(on(model, device), case, Budget(), spill=False) == least


def wide_case() -> CaseFacts:
    """A tomogram with two labels, uint8, read where it lies; its window has 31 GiB, the weights half of it."""
    shape = (1000, 8000, 8000)
    grid = tile_grid(shape, (128, 128, 128), 0.5)
    given = InputFacts(math.prod(shape), 0, 2**24, is_image=True, tile_voxel_bytes=4)
    facts = case_of(grid, shape, shape, True, input=given, tiles=grid.tile_count, may_be_cut=True)
    return replace(facts, reading_bytes=2**24, preprocessing_bytes=2**24)


@pytest.mark.parametrize(
    "tile_s, disk_bytes, place",
    [
        (0.0, None, Place.RAM),  # nothing is timed yet
        (0.5, None, Place.RAM),
        (20.0, None, Place.DISK),  # a tenth more of such tiles takes longer than moving them to and fro
        (20.0, 70 * GIB, Place.RAM),  # there is room for the labels alone
    ],
)
def test_planes_that_are_too_large_are_cut_where_that_takes_less_time(tile_s, disk_bytes, place):
    facts = model(heads=2, tile_s=tile_s)
    plan = plan_case(facts, wide_case(), Budget(24 * GIB, reserved_ram_bytes=GIB, disk_bytes=disk_bytes))
    assert plan.placement.window is place
    if place is Place.RAM:
        tiles = wide_case().cut(plan.placement.columns).tiles
        assert wide_case().tiles < tiles < 1.15 * wide_case().tiles
    else:
        assert plan.placement.columns == (1, 1, 1)


def test_columns_are_as_large_as_they_may_be():
    found = []
    for gib in (4, 8, 16, 32, 64):
        plan = plan_case(model(heads=2, tile_s=0.5), wide_case(), Budget(gib * GIB, reserved_ram_bytes=GIB))
        found.append(math.prod(plan.placement.columns))
    assert found == sorted(found, reverse=True)
    assert found[0] > 8
    assert found[-1] == 1


def test_nobody_waits_for_every_tile_twice():
    case = wide_case()
    counted = [case.cut(placement.columns).tiles for placement in placements(model(), case)]
    assert case.tiles < max(counted) <= 2 * case.tiles
    assert {p.columns for p in placements(model(), replace(case, may_be_cut=False))} == {(1, 1, 1)}
