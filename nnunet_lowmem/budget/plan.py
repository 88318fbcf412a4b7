"""A plan: where the large arrays of one case live, and what that adds up to beside the limits."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_lowmem.budget.arrays import Allocation, Budget, Placement, Stage
from nnunet_lowmem.types import Place


@dataclass(frozen=True)
class Plan:
    """Placement of one case, what it adds up to, and the limits.

    Attributes
    ----------
    case : str
    placement : Placement
    allocations : tuple of Allocation
    budget : Budget
    """

    case: str
    placement: Placement
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

    def fits_everywhere(self) -> bool:
        """Whether the projected peaks are within all limits."""
        return all(map(self.fits, Place))
