"""Which machines carry a case: as the planner has it, for a case and a model of numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.estimates import Estimate, StockBytes
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.planner import closest_plan, smallest_ram_bytes
from nnunet_lowmem.doctor.advice import Advice, Carried, largest
from nnunet_lowmem.window.tiling import tile_grid

GIB = 2**30
SHAPE, PATCH = (1000, 512, 512), (128, 128, 128)


def advice(heads: int = 118, folds: int = 5, activation_bytes: int = 3 * GIB, shape=SHAPE) -> Advice:
    model = ModelFacts(
        heads, 1, folds, weight_bytes=120 << 20, activation_bytes=activation_bytes, label_bytes=1, threads=4
    )
    image_bytes = 4 * math.prod(shape)
    facts = CaseFacts("a", tile_grid(shape, PATCH, 0.5), shape, shape, True, image_bytes, image_bytes, image_bytes)
    budget = Budget(60 * GIB, None, GIB // 2)
    stock = StockBytes.of(model, facts, 1)
    plan = closest_plan(model, facts, budget)
    least = [smallest_ram_bytes(model, facts, budget, spill) for spill in (True, False)]
    return Advice(Estimate("a", "", facts, plan, None, stock.largest, *least, 0, 0, model, stock))


def cells(told: Advice) -> dict[tuple[int, int], Carried]:
    return {(cell.ram_gib, cell.vram_gib): cell for cell in told.hardware()}


def test_more_memory_never_carries_less():
    for told in (advice(), advice(heads=700), advice(activation_bytes=11 * GIB)):
        found = cells(told)
        for (ram, vram), cell in found.items():
            assert cell.fits <= found[64, vram].fits
            assert cell.fits <= (vram == 0 or found[ram, 24].fits)


def test_what_the_smallest_sizes_say_is_what_the_table_says():
    """A network of 3 GiB a tile needs a card of more than 4 GiB; 15 classes on the whole volume spill their sum."""
    told = advice()
    found = cells(told)
    assert 3 * GIB < told.least_vram_bytes() < 5 * GIB
    assert [found[64, vram].fits for vram in (4, 8, 12, 24)] == [told.least_vram_bytes() < 4 * GIB, True, True, True]
    for ram in (8, 16, 32, 64):
        assert found[ram, 0].fits == (told.estimate.least_ram_bytes < 0.95 * (ram - 1) * GIB)
    assert "no" in {cell.in_words() for cell in cells(advice(activation_bytes=9 * GIB)).values()}


def test_what_is_spilled_is_told():
    """The sum of five folds is 58 GiB."""
    found = cells(advice())
    assert found[32, 0].in_words().startswith("spills ")
    assert found[32, 0].spilled_bytes >= 118 * math.prod(SHAPE) * 2
    assert {cell.in_words() for cell in cells(advice(folds=1)).values() if cell.vram_gib == 24} == {"fits"}
    assert cells(advice(heads=2, folds=1, shape=(200, 256, 256)))[64, 0].in_words() == "fits"


def test_stock_keeps_the_sum_over_folds_in_ram_and_makes_the_labels_of_a_cascade_in_the_networks_grid():
    one, five = advice(folds=1).estimate.stock, advice(folds=5).estimate.stock
    assert one.vram == five.vram
    assert five.prediction - one.prediction == 2 * 118 * math.prod(SHAPE) + 4 * (120 << 20)
    told = advice()
    cascade = StockBytes.of(replace(told.model, channels=118), told.facts, 1)
    assert cascade.preprocessing - five.preprocessing == 117 * 8 * math.prod(SHAPE)


def test_stages_of_both():
    told = advice()
    names, stock, ours = zip(*told.stages(), strict=True)
    assert names == ("preprocessing", "prediction", "export")
    assert stock == (told.estimate.stock.preprocessing, told.estimate.stock.prediction, told.estimate.stock.export)
    assert max(ours) < 0.1 * max(stock)
    assert "of a GPU, else it begins the case again in RAM" in told.least()


@pytest.mark.parametrize("order", [1, -1])
def test_the_case_that_takes_most_is_told_of(order):
    small, large = advice(shape=(100, 256, 256)).estimate, advice().estimate
    broken = Estimate("broken", problem="cannot be read")
    found = largest([small, broken, large][::order])
    assert found is not None
    assert found.estimate is large
    assert largest([broken]) is None
    assert largest([replace(small, plan=None)]) is None
