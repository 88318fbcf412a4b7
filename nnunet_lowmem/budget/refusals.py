"""Why a case is refused, or cannot go on: which limit binds, by its own name, and what would in truth help."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.sizes import format_gib, format_gib_up
from nnunet_lowmem.system.memory_limits import binding_now, with_headroom
from nnunet_lowmem.types import Place


@dataclass(frozen=True)
class Ways:
    """What would let a case be predicted.

    Attributes
    ----------
    ram_bytes : int or None
        The least RAM with which it fits as things are elsewhere; None where no RAM helps.
    spilled_bytes : int or None
        The room in a folder on a disk with which it fits as things are elsewhere; None where no room helps.
    """

    ram_bytes: int | None = None
    spilled_bytes: int | None = None

    @classmethod
    def of(cls, plans: Iterable[Plan]) -> Ways:
        """Find them among the plans of every placement."""
        ram: list[int] = []
        spilled: list[int] = []
        for plan in plans:
            short = {place for place in Place if not plan.fits(place)}
            if short <= {Place.RAM}:
                ram.append(plan.projected_bytes(Place.RAM))
            if short <= {Place.DISK}:
                spilled.append(plan.projected_bytes(Place.DISK))
        return cls(min(ram, default=None), min(spilled, default=None))


def refusal(plan: Plan, ways: Ways) -> str:
    """Say why a plan does not fit: the numbers, the stage, the largest allocation, the limit that binds, what helps."""
    place = too_small(plan)
    stage = plan.fullest_stage(place)
    largest = max(
        (a for a in plan.allocations if a.place is place and stage in a.stages), key=lambda a: a.size_bytes
    )  # fmt: skip
    helps = [_more_ram(plan.budget, ways.ram_bytes), _more_disk(plan.budget, ways.spilled_bytes)]
    if place is Place.VRAM:
        helps = [_more_vram(plan), *helps]
    told = "; or ".join(filter(None, helps)) or "run on a machine that has more"
    return (
        f"case {plan.case} does not fit: {place.value} projected {format_gib(plan.projected_bytes(place))} in stage "
        f"{stage.value}, budget {format_gib(plan.budget.limit(place) or 0)}, of which reserved "
        f"{format_gib(plan.budget.reserved(place))}; the largest allocation is {largest.name} with "
        f"{format_gib(largest.size_bytes)}. The limit is {_binding(plan.budget, place)}: {told}."
    )


def too_small(plan: Plan) -> Place:
    """Return the first place where a plan does not fit."""
    return next(place for place in Place if not plan.fits(place))


def ran_out(budget: Budget, place: Place) -> str:
    """Say what may help where memory is gone although the plan fits: who binds is asked now."""
    if place is Place.VRAM:
        return f"end what else takes memory of the device; the limit is {_binding(budget, place)}"
    binding = binding_now()
    return f"end what else takes memory{f', or raise the limit: {binding}' if binding else ''}"


def _binding(budget: Budget, place: Place) -> str:
    origins = budget.origins
    if place is Place.DISK:
        where = f"the folder for temporary files, {origins.folder or 'that of the system'},"
        why = origins.nothing_spilled_because
        return f"{where} which {why}" if why else f"the free room of {where[:-1]}"
    if place is Place.VRAM:
        asked, flag, machine = origins.vram_asked, "--max_vram", "the free memory of the device"
    else:
        asked, flag = origins.ram_asked, "--max_ram"
        machine = "" if origins.machine is None else origins.machine.in_words()
    if asked or not machine:
        return f"{flag} {format_gib(budget.limit(place) or 0)}"
    if origins.machine is None or place is Place.VRAM:
        return machine
    return f"{machine}, of which {format_gib(origins.machine.used_bytes)} are in use"


def _more_ram(budget: Budget, needed_bytes: int | None) -> str:
    """Say how to get so much RAM for this process, whose limit that is too small for the case."""
    limit, machine = budget.ram_bytes, budget.origins.machine
    if needed_bytes is None or limit is None or needed_bytes <= limit:
        return ""
    taken_bytes = needed_bytes - budget.origins.in_use_bytes  # on top of what the machine counts as used
    asked = f"raise --max_ram to {format_gib_up(needed_bytes)} or more" if budget.origins.ram_asked else ""
    if machine is None or (asked and taken_bytes <= machine.free_bytes):
        return asked or f"raise --max_ram to {format_gib_up(needed_bytes)} or more"
    wanted_bytes = taken_bytes if asked else with_headroom(taken_bytes)
    more = machine.raised_by(max(0, wanted_bytes - machine.free_bytes))
    return f"{asked}, which is more than {machine.in_words()} leaves: {more}" if asked else more


def _more_disk(budget: Budget, needed_bytes: int | None) -> str:
    """Say how to get so much room for spilled arrays."""
    if needed_bytes is None or budget.disk_bytes is None or needed_bytes <= budget.disk_bytes:
        return ""
    folder, size = budget.origins.folder, format_gib_up(needed_bytes)
    if why := budget.origins.nothing_spilled_because:
        kept = f"since the folder for temporary files, {folder}, {why}, nothing is spilled there"
        return f"name a folder on a disk with {size} free by --tmp_dir ({kept})"
    there = f"{folder}, where {format_gib(budget.disk_bytes)} are free" if folder else "the folder for temporary files"
    return f"make room for {size} in {there}, or name another folder with --tmp_dir"


def _more_vram(plan: Plan) -> str:
    asked = plan.budget.origins.vram_asked
    size = format_gib_up(plan.projected_bytes(Place.VRAM))
    more = f"raise --max_vram to {size} or more" if asked else f"let this process have {size} of it"
    return f"{more}, or use a larger device or -device cpu"
