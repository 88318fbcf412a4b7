"""Plans for machines nobody owns: what is projected, what is refused, and what more memory buys."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.planner import Budget, CaseFacts, ModelFacts, Place, Plan, Stage, plan_case, refusal
from nnunet_lowmem.tiling import tile_grid

GIB = 2**30
MEASURED = (Place.RAM, Place.VRAM)


def model(**changes) -> ModelFacts:
    facts = ModelFacts(
        heads=15, channels=1, folds=1, weight_bytes=120 << 20, activation_bytes=2 << 30, mirrored=True, label_bytes=1
    )
    return replace(facts, **changes)


def case(shape=(250, 512, 512), patch=(96, 160, 160), streams=True) -> CaseFacts:
    return CaseFacts("ct_001", tile_grid(shape, patch, 0.5), shape, shape, streams)


@st.composite
def models(draw) -> ModelFacts:
    return ModelFacts(
        heads=draw(st.integers(1, 700)),
        channels=draw(st.integers(1, 5)),
        folds=draw(st.integers(1, 6)),
        weight_bytes=draw(st.integers(1, 2 * GIB)),
        activation_bytes=draw(st.integers(1, 20 * GIB)),
        mirrored=draw(st.booleans()),
        label_bytes=draw(st.integers(1, 2)),
    )


@st.composite
def cases(draw) -> CaseFacts:
    shapes = [draw(st.tuples(*[st.integers(1, 1200)] * 3)) for _ in range(3)]
    patch = draw(st.one_of(st.tuples(*[st.integers(8, 256)] * 2), st.tuples(*[st.integers(8, 256)] * 3)))
    grid = tile_grid(shapes[0], patch, draw(st.floats(0.2, 1.0)))
    return CaseFacts("case", grid, shapes[1], shapes[2], draw(st.booleans()))


BOOLEANS = st.booleans()


@st.composite
def budgets(draw, binding=BOOLEANS) -> Budget:
    limit = st.one_of(st.none(), st.integers(1, 200 * GIB))
    reserved = st.integers(0, 4 * GIB)
    return Budget(draw(limit), draw(limit), draw(reserved), draw(reserved), draw(binding))


DEVICES = st.sampled_from(["cpu", "cuda", "mps"])


def seen_by(device: str, budget: Budget) -> Budget:
    """Only CUDA has VRAM."""
    return budget if device == "cuda" else replace(budget, vram_bytes=None, reserved_vram_bytes=0)


def plan_or_none(*arguments) -> Plan | None:
    try:
        return plan_case(*arguments)
    except BudgetError:
        return None


def placement(plan: Plan) -> tuple[bool, bool]:
    """Smaller is faster."""
    return not plan.window_on_device, plan.fold_sum_on_disk


@settings(deadline=None)
@given(models(), cases(), budgets(binding=st.just(False)), DEVICES, st.booleans())
def test_projected_is_reserved_plus_the_fullest_stage(model, case, budget, device, on_device):
    plan = plan_case(model, case, budget, device, on_device)
    for place in MEASURED:
        sums = [sum(a.size_bytes for a in plan.allocations if a.place is place and s in a.stages) for s in Stage]
        assert plan.projected_bytes(place) == budget.reserved(place) + max(sums)
        assert sums[list(Stage).index(plan.fullest_stage(place))] == max(sums)


@settings(deadline=None)
@given(models(), cases(), budgets(binding=st.just(True)), DEVICES)
def test_a_binding_budget_is_kept_or_the_case_refused(model, case, budget, device):
    budget = seen_by(device, budget)
    plan = plan_or_none(model, case, budget, device)
    if plan is not None:
        for place in MEASURED:
            assert budget.limit(place) is None or plan.projected_bytes(place) <= budget.limit(place)
    else:
        free = replace(budget, binding=False)
        assert not all(plan_case(model, case, free, device).fits(place) for place in MEASURED)


@settings(deadline=None)
@given(models(), cases(), budgets(), DEVICES, st.integers(0, 100 * GIB), st.integers(0, 100 * GIB))
def test_more_budget_never_gives_a_slower_placement(model, case, budget, device, more_ram, more_vram):
    budget = replace(budget, ram_bytes=budget.ram_bytes or GIB, vram_bytes=budget.vram_bytes or GIB)
    larger = replace(budget, ram_bytes=budget.ram_bytes + more_ram, vram_bytes=budget.vram_bytes + more_vram)
    smaller, larger = (plan_or_none(model, case, seen_by(device, b), device) for b in (budget, larger))
    assert smaller is None or (larger is not None and placement(larger) <= placement(smaller))


@settings(deadline=None)
@given(models(), cases(), DEVICES, st.data())
def test_a_budget_of_exactly_the_projection_is_enough(model, case, device, data):
    unlimited = plan_case(model, case, Budget(reserved_ram_bytes=GIB, reserved_vram_bytes=GIB), device)
    exact = Budget(unlimited.projected_bytes(Place.RAM), unlimited.projected_bytes(Place.VRAM), GIB, GIB, True)
    exact = seen_by(device, exact)
    assert placement(plan_case(model, case, exact, device)) == placement(unlimited)
    place = data.draw(st.sampled_from(["ram_bytes", "vram_bytes"])) if device == "cuda" else "ram_bytes"
    less = plan_or_none(model, case, replace(exact, **{place: getattr(exact, place) - 1}), device)
    assert less is None or placement(less) > placement(unlimited)


@settings(deadline=None)
@given(models(), cases(), budgets(binding=st.just(False)))
def test_window_is_on_the_device_only_on_cuda_and_if_wanted(model, case, budget):
    assert not plan_case(model, case, budget, "cpu").window_on_device
    assert not plan_case(model, case, budget, "mps").window_on_device
    assert not plan_case(model, case, budget, "cuda", window_on_device=False).window_on_device


@settings(deadline=None)
@given(models(), cases(), budgets(binding=st.just(False)))
def test_nothing_is_planned_on_a_device_that_is_not_there(model, case, budget):
    for device in ("cpu", "mps"):
        assert all(a.place is not Place.VRAM for a in plan_case(model, case, budget, device).allocations)


@settings(deadline=None)
@given(models(), cases(), budgets(binding=st.just(False)), DEVICES)
def test_sizes_are_positive_and_names_distinct(model, case, budget, device):
    allocations = plan_case(model, case, budget, device).allocations
    assert all(a.size_bytes > 0 and a.stages for a in allocations)
    assert len({a.name for a in allocations}) == len(allocations)


@settings(deadline=None)
@given(models(), DEVICES, st.integers(0, 2), st.integers(1, 500))
def test_length_costs_no_class(model, device, axis, planes):
    """More planes cost more of the image, but nothing that grows with the heads."""
    shapes = [tuple(size + extra * (a == axis) for a in range(3)) for size in (40,) for extra in (60, 60 + planes)]
    cases = [CaseFacts("case", tile_grid(shape, (40, 40, 40), 0.5), (9, 9, 9), (9, 9, 9), True) for shape in shapes]
    shorter, longer = (
        plan_case(replace(model, folds=1), case, Budget(), device).projected_bytes(Place.RAM) for case in cases
    )
    assert longer - shorter == planes * 40 * 40 * model.channels * 4


def test_window_leaves_the_device_before_a_case_is_refused():
    roomy = plan_case(model(), case(), Budget(64 * GIB, 80 * GIB, binding=True), "cuda")
    tight = plan_case(model(), case(), Budget(64 * GIB, 3 * GIB, binding=True), "cuda")
    assert roomy.window_on_device
    assert not tight.window_on_device
    assert tight.projected_bytes(Place.RAM) > roomy.projected_bytes(Place.RAM)


def test_large_sum_over_folds_is_spilled_and_a_small_one_is_not():
    large = plan_case(model(folds=5), case(), Budget(), "cpu")
    small = plan_case(model(folds=5), case((40, 40, 40), (32, 32, 32)), Budget(), "cpu")
    single = plan_case(model(folds=1), case(), Budget(), "cpu")
    assert [p.fold_sum_on_disk for p in (large, small, single)] == [True, False, False]


def test_limits_nobody_asked_for_do_not_refuse():
    plan = plan_case(model(), case(), Budget(GIB, binding=False), "cpu")
    assert not plan.fits(Place.RAM)


def test_refusal_is_not_a_usage_error_and_has_its_own_exit_code():
    with pytest.raises(BudgetError):
        plan_case(model(), case(), Budget(GIB, binding=True), "cpu")
    assert BudgetError.exit_code == 3


@pytest.mark.parametrize(
    "budget, device, place, flag",
    [
        (Budget(2 * GIB, None, 700 << 20, 0, True), "cpu", Place.RAM, "--max_ram"),
        (Budget(1 * GIB, 80 * GIB, 700 << 20, 0, True), "cuda", Place.RAM, "--max_ram"),
        (Budget(64 * GIB, 2 * GIB, 0, 300 << 20, True), "cuda", Place.VRAM, "--max_vram"),
    ],
)
def test_refusal_names_what_where_and_how_much(budget, device, place, flag):
    facts = model(activation_bytes=30 * GIB) if device == "cuda" and place is Place.VRAM else model(heads=600)
    with pytest.raises(BudgetError) as caught:
        plan_case(facts, case(), budget, device)
    text = str(caught.value)
    plan = plan_case(facts, case(), replace(budget, binding=False), device)
    largest = max(
        (a for a in plan.allocations if a.place is place and plan.fullest_stage(place) in a.stages),
        key=lambda a: a.size_bytes,
    )
    for size in (plan.projected_bytes(place), budget.limit(place), budget.reserved(place), largest.size_bytes):
        assert f"{size / GIB:.2f} GiB" in text
    for word in ("ct_001", place.value, f"stage {plan.fullest_stage(place).value}", largest.name, flag):
        assert word in text
    assert {"--max_ram", "--max_vram"} & set(re.findall(r"--\w+", text)) == {flag}
    assert text == refusal(plan)
    assert "\n" not in text


def test_refusal_speaks_of_the_placement_that_is_closest_to_fitting():
    facts, limits = model(heads=600), (1 * GIB, 80 * GIB, 700 << 20, 0)
    with pytest.raises(BudgetError) as caught:
        plan_case(facts, case(), Budget(*limits, True), "cuda")
    enough = plan_case(facts, case(), Budget(8 * GIB, *limits[1:], True), "cuda")
    assert enough.window_on_device
    assert f"projected {enough.projected_bytes(Place.RAM) / GIB:.2f} GiB" in str(caught.value)
