"""The planner's invariants, for machines that nobody owns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.planner import Budget, CaseFacts, ModelFacts, Place, Plan, Stage, plan_case
from nnunet_lowmem.tiling import tile_grid

GIB = 2**30
sizes = st.integers(1, 600)
models = st.builds(
    ModelFacts,
    heads=st.integers(1, 700),
    channels=st.integers(1, 5),
    folds=st.integers(1, 5),
    weight_bytes=st.integers(0, GIB),
    activation_bytes=st.integers(0, 8 * GIB),
    mirrored=st.booleans(),
    label_bytes=st.sampled_from([1, 2]),
)


@st.composite
def cases(draw):
    shape = draw(st.tuples(sizes, sizes, sizes))
    patch = draw(st.tuples(*[st.integers(1, 128)] * draw(st.sampled_from([2, 3]))))
    original = draw(st.tuples(sizes, sizes, sizes))
    return CaseFacts("case", tile_grid(shape, patch, 0.5), original, original, draw(st.booleans()))


budgets = st.builds(
    Budget,
    ram_bytes=st.integers(1, 200 * GIB),
    vram_bytes=st.integers(1, 80 * GIB),
    reserved_ram_bytes=st.integers(0, 2 * GIB),
    reserved_vram_bytes=st.integers(0, GIB),
)
devices = st.sampled_from(["cpu", "cuda", "mps"])


def stage_sum(plan: Plan, place: Place, stage: Stage) -> int:
    return sum(a.size_bytes for a in plan.allocations if a.place is place and stage in a.stages)


@given(models, cases(), budgets, devices)
def test_projected_is_reserved_and_the_fullest_stage(model, case, budget, device):
    plan = plan_case(model, case, budget, device)
    for place in (Place.RAM, Place.VRAM):
        expected = budget.reserved(place) + max(stage_sum(plan, place, stage) for stage in Stage)
        assert plan.projected_bytes(place) == expected
        assert plan.fits(place) == (expected <= budget.limit(place))


@given(models, cases(), budgets, devices)
def test_binding_budget_gives_a_plan_that_fits_or_an_error(model, case, budget, device):
    try:
        plan = plan_case(model, case, replace(budget, binding=True), device)
    except BudgetError:
        free = plan_case(model, case, budget, device)
        assert not (free.fits(Place.RAM) and free.fits(Place.VRAM))
    else:
        assert plan.fits(Place.RAM)
        assert plan.fits(Place.VRAM)


@given(models, cases(), budgets)
def test_without_a_gpu_nothing_is_planned_on_it(model, case, budget):
    plan = plan_case(model, case, budget, "cpu")
    assert not plan.window_on_device
    assert all(a.place is not Place.VRAM for a in plan.allocations)


@given(models, cases(), budgets, devices)
def test_more_budget_never_takes_the_window_off_the_device(model, case, budget, device):
    plan = plan_case(model, case, budget, device)
    richer = replace(budget, ram_bytes=2 * budget.ram_bytes, vram_bytes=2 * budget.vram_bytes)
    fits = plan.fits(Place.RAM) and plan.fits(Place.VRAM)
    if fits:
        assert plan_case(model, case, richer, device).window_on_device >= plan.window_on_device


def facts(heads: int = 118, folds: int = 1) -> ModelFacts:
    return ModelFacts(heads, 1, folds, 10**7, 10**8, False, 1)


def volume(planes: int) -> CaseFacts:
    shape = (planes, 273, 273)
    return CaseFacts("long", tile_grid(shape, (96, 96, 96), 0.5), shape, shape, True)


def test_the_window_does_not_grow_with_the_length_of_the_scan():
    def window(planes: int) -> int:
        plan = plan_case(facts(), volume(planes), Budget(), "cpu")
        return next(a.size_bytes for a in plan.allocations if a.name == "rolling window")

    assert window(333) == window(3330) == 2 * 119 * 97 * 273 * 273


def test_a_large_sum_over_folds_goes_to_disk_and_a_small_one_stays():
    assert plan_case(facts(folds=5), volume(333), Budget(), "cpu").fold_sum_on_disk
    assert not plan_case(facts(heads=2, folds=5), volume(97), Budget(), "cpu").fold_sum_on_disk


def test_refusal_names_numbers_case_stage_allocation_and_flag():
    budget = Budget(ram_bytes=GIB, reserved_ram_bytes=GIB // 2, binding=True)
    with pytest.raises(BudgetError) as caught:
        plan_case(facts(), volume(333), budget, "cpu")
    text = str(caught.value)
    for word in ("case long", "projected 2.", "prediction", "budget 1.00 GiB", "reserved 0.50 GiB", "rolling window"):
        assert word in text
    assert "--max_ram" in text
