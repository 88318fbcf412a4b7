"""Placements that the planner would choose for volumes larger than any here."""

from __future__ import annotations

import math

from nnunet_lowmem.budget.arrays import Placement
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.planner import placements


def finest_columns(model: ModelFacts, case: CaseFacts) -> tuple[Placement, ...]:
    """Return those with the smallest columns that planes may be cut into; all where they may not be cut."""
    found = placements(model, case)
    most = max(math.prod(placement.columns) for placement in found)
    return tuple(placement for placement in found if math.prod(placement.columns) == most)
