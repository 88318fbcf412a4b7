"""What a refusal says: which limit binds, by its own name, and only what would in truth help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from test_planner import GIB, case, model

from nnunet_lowmem.budget import refusals
from nnunet_lowmem.budget.arrays import Budget, Origins
from nnunet_lowmem.budget.planner import closest_plan, plan_case, smallest_ram_bytes
from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.system import memory_limits
from nnunet_lowmem.system.memory_limits import RamLimit, less_headroom
from nnunet_lowmem.types import Place

FACTS, SHAPE = model(heads=60, activation_bytes=GIB // 4), case((1000, 512, 512), (64, 64, 64))
LEAST = smallest_ram_bytes(FACTS, SHAPE, Budget(), spill=True)
UNSPILLED = smallest_ram_bytes(FACTS, SHAPE, Budget(), spill=False)
IN_RAM = Origins(folder="/tmp", nothing_spilled_because="is kept in RAM")


def refused(budget: Budget) -> str:
    with pytest.raises(BudgetError) as caught:
        plan_case(FACTS, SHAPE, budget)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def asked_gib(text: str, before: str) -> int:
    """The size in bytes that a message asks for, right behind these words."""
    return int(float(re.search(rf"{before} ([0-9.]+) GiB", text)[1]) * GIB)


def test_what_is_asked_for_is_enough_and_hardly_more():
    text = refused(Budget(LEAST - GIB // 2))
    enough = asked_gib(text, "raise --max_ram to")
    assert f"The limit is --max_ram {(LEAST - GIB // 2) / GIB:.2f} GiB" in text
    assert LEAST <= enough < LEAST + GIB // 64
    assert plan_case(FACTS, SHAPE, Budget(enough))
    assert "--tmp_dir" not in text


def test_folder_on_a_disk_is_named_where_it_would_help():
    """Between the smallest RAM and that without spilling, with a folder for temporary files that is kept in RAM."""
    between = (LEAST + UNSPILLED) // 2
    text = refused(Budget(between, disk_bytes=0, origins=IN_RAM))
    assert all(words in text for words in ("/tmp", "is kept in RAM", "--tmp_dir"))
    room, ram = asked_gib(text, "a disk with"), asked_gib(text, "raise --max_ram to")
    assert plan_case(FACTS, SHAPE, Budget(between, disk_bytes=room))
    assert plan_case(FACTS, SHAPE, Budget(ram, disk_bytes=0))


def test_folder_is_not_named_where_it_would_not_help():
    text = refused(Budget(LEAST - 1, disk_bytes=0, origins=IN_RAM))
    assert "--tmp_dir" not in text
    assert asked_gib(text, "raise --max_ram to") >= UNSPILLED


def test_full_disk_is_told_with_what_is_free_there():
    text = refused(Budget(LEAST, disk_bytes=GIB, origins=Origins(folder="/scratch")))
    assert "in /scratch, where 1.00 GiB are free" in text
    room = asked_gib(text, "make room for")
    assert plan_case(FACTS, SHAPE, Budget(LEAST, disk_bytes=room))


@pytest.mark.parametrize("source", ["SLURM_MEM_PER_NODE", "RLIMIT_AS", "cgroup /sys/fs/cgroup/job/memory.max"])
def test_limit_of_the_machine_is_raised_by_what_is_missing(source):
    """No flag of ours would help."""
    held = GIB // 2
    machine = RamLimit(source, GIB, held)
    origins = Origins(ram_asked=False, machine=machine, in_use_bytes=held)
    budget = Budget(less_headroom(machine.free_bytes) + held, None, held, 0, origins=origins)
    text = refused(budget)
    assert f"The limit is {machine.in_words()}, of which 0.50 GiB are in use: raise it to" in text
    assert "--max_ram" not in text
    raised = asked_gib(text, "raise it to")
    enough = less_headroom(raised - held) + held
    assert plan_case(FACTS, SHAPE, replace(budget, ram_bytes=enough))
    assert enough < closest_plan(FACTS, SHAPE, budget).projected_bytes(Place.RAM) + GIB // 64


def test_budget_beyond_the_machine_is_told_together_with_what_the_machine_leaves():
    machine = RamLimit("physical RAM", 2 * GIB, 2 * GIB - 5)
    text = refused(Budget(LEAST - 1, origins=Origins(machine=machine)))
    assert "The limit is --max_ram" in text
    assert "which is more than physical RAM 2.00 GiB leaves" in text


@pytest.mark.parametrize("asked", [True, False])
def test_device_that_is_too_small(asked):
    facts = replace(FACTS, activation_bytes=30 * GIB, device="cuda")
    with pytest.raises(BudgetError) as caught:
        plan_case(facts, SHAPE, Budget(64 * GIB, 2 * GIB, origins=Origins(vram_asked=asked)))
    words = (
        "--max_vram 2.00 GiB: raise --max_vram to" if asked else "the free memory of the device: let this process have"
    )
    assert f"The limit is {words}" in str(caught.value)


def test_memory_that_is_gone_names_the_limit_of_that_moment(monkeypatch):
    monkeypatch.setattr(memory_limits, "available_ram", lambda: RamLimit("SLURM_MEM_PER_NODE", GIB, GIB))
    assert "least is left by SLURM_MEM_PER_NODE 1.00 GiB, 0.00 GiB now" in refusals.ran_out(Budget(GIB), Place.RAM)
    monkeypatch.setattr(memory_limits, "available_ram", lambda: None)
    assert refusals.ran_out(Budget(GIB), Place.RAM) == "end what else takes memory"
    assert "--max_vram 1.00 GiB" in refusals.ran_out(Budget(GIB, GIB), Place.VRAM)
