"""Which machines carry a case: what stock and this package take in each stage, and a table of sizes of RAM and VRAM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nnunet_lowmem.budget.arrays import Budget, Stage
from nnunet_lowmem.budget.estimates import Estimate
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.budget.planner import all_plans, certain, closest_plan
from nnunet_lowmem.sizes import format_gib, format_gib_up
from nnunet_lowmem.system.memory_limits import less_headroom, with_headroom
from nnunet_lowmem.types import Place

GIB = 2**30
#: Machines that people have or can rent, in GiB.
RAM_SIZES, VRAM_SIZES = (8, 16, 32, 64), (4, 8, 12, 24)
# of a machine's RAM for the system and a desktop; of a card's memory for CUDA's context (measured: 0.63 GiB)
_SYSTEM_BYTES, _CONTEXT_BYTES = GIB, int(0.7 * GIB)
# CUDA's libraries in RAM, beside what the process holds without them
_CUDA_RAM_BYTES = GIB // 2
_STAGES = {
    "preprocessing": (Stage.READING, Stage.PREPROCESSING),
    "prediction": (Stage.LOADING, Stage.PREDICTION),
    "export": (Stage.EXPORT, Stage.WRITING),
}


@dataclass(frozen=True)
class Carried:
    """Whether a machine carries a case.

    Attributes
    ----------
    ram_gib : int
    vram_gib : int
        0 without a GPU.
    fits : bool
    spilled_bytes : int
        Of arrays on disk, where it does not fit without.
    """

    ram_gib: int
    vram_gib: int
    fits: bool
    spilled_bytes: int = 0

    def in_words(self) -> str:
        """Return what stands in the table."""
        if not self.fits:
            return "no"
        return f"spills {format_gib(self.spilled_bytes)}" if self.spilled_bytes else "fits"

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts."""
        return {**vars(self), "in_words": self.in_words()}


@dataclass(frozen=True)
class Advice:
    """What a case takes, of which its header could be read.

    Attributes
    ----------
    estimate : Estimate
    """

    estimate: Estimate

    @property
    def facts(self) -> CaseFacts:
        """Return those of the case."""
        assert self.estimate.facts is not None, "the header could be read"
        return self.estimate.facts

    @property
    def model(self) -> ModelFacts:
        """Return those of the model."""
        assert self.estimate.model is not None, "the header could be read"
        return self.estimate.model

    @property
    def plan(self) -> Plan:
        """Return the plan on this machine."""
        assert self.estimate.plan is not None, "the header could be read"
        return self.estimate.plan

    def stages(self) -> list[tuple[str, int, int]]:
        """Return for each stage its name, and the RAM that stock and this package take."""
        stock, plan = self.estimate.stock, self.plan
        reserved = plan.budget.reserved(Place.RAM)
        return [
            (name, getattr(stock, name), reserved + max(plan.planned_bytes(Place.RAM, stage) for stage in stages))
            for name, stages in _STAGES.items()
        ]

    def hardware(self) -> list[Carried]:
        """Return whether machines of all sizes carry the case, those without a GPU among them."""
        return [self._carried(ram, vram) for ram in RAM_SIZES for vram in (0, *VRAM_SIZES)]

    def _carried(self, ram_gib: int, vram_gib: int) -> Carried:
        model, budget = self.model, self._budget(ram_gib * GIB - _SYSTEM_BYTES)
        if vram_gib:
            model = on_gpu(model)
            budget = replace(
                budget,
                vram_bytes=less_headroom(vram_gib * GIB - _CONTEXT_BYTES),
                reserved_ram_bytes=budget.reserved_ram_bytes + _CUDA_RAM_BYTES * (self.model.device != "cuda"),
            )
        elif model.device == "cuda":
            model = replace(model, device="cpu")
        if closest_plan(model, self.facts, replace(budget, disk_bytes=0)).fits_everywhere():
            return Carried(ram_gib, vram_gib, fits=True)
        plan = closest_plan(model, self.facts, budget)
        return Carried(ram_gib, vram_gib, plan.fits_everywhere(), plan.projected_bytes(Place.DISK))

    def _budget(self, free_bytes: int) -> Budget:
        return Budget(less_headroom(free_bytes), None, self.plan.budget.reserved(Place.RAM))

    def least_vram_bytes(self) -> int:
        """Return the smallest card that carries the case, CUDA's own context included."""
        plans = all_plans(certain(on_gpu(self.model)), self.facts, Budget())
        return with_headroom(min(plan.projected_bytes(Place.VRAM) for plan in plans)) + _CONTEXT_BYTES

    def stock_vram_bytes(self) -> int:
        """Return about what stock takes of a card, CUDA's own context included."""
        assert self.estimate.stock is not None, "the header could be read"
        return self.estimate.stock.vram + _CONTEXT_BYTES

    def least(self) -> str:
        """Say what the case takes at the least."""
        told = self.estimate
        least_gpu = format_gib_up(self.least_vram_bytes())
        return (
            f"smallest --max_ram {format_gib_up(told.least_ram_bytes)}, without spilling to disk "
            f"{format_gib_up(told.least_ram_unspilled_bytes)}; smallest GPU {least_gpu}\n"
            f"stock: about {format_gib(told.stock_bytes)} of RAM, and {format_gib(self.stock_vram_bytes())} "
            "of a GPU, else it begins the case again in RAM"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts."""
        told = self.estimate.as_json()
        told["stages"] = {name: {"stock_bytes": stock, "bytes": ours} for name, stock, ours in self.stages()}
        told["least_vram_bytes"] = self.least_vram_bytes()
        told["stock_vram_bytes"] = self.stock_vram_bytes()
        told["hardware"] = [carried.as_json() for carried in self.hardware()]
        return told


def on_gpu(model: ModelFacts) -> ModelFacts:
    """Return the facts of a model on a GPU: what the network takes for a tile here is taken to be what it takes there.

    There it computes in half precision, beside which cuDNN takes scratch memory: as a rule it is less.
    """
    return replace(model, device="cuda", window_on_device=True)


def largest(estimates: list[Estimate]) -> Advice | None:
    """Return the case that takes most of those whose headers could be read."""
    readable = [estimate for estimate in estimates if estimate.plan is not None and estimate.model is not None]
    return Advice(max(readable, key=lambda told: told.stock_bytes)) if readable else None
