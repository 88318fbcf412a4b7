"""Placements that the planner would choose for volumes larger than any here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nnunet_lowmem.budget.arrays import Placement
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.planner import placements
from nnunet_lowmem.types import Place


def finest_columns(model: ModelFacts, case: CaseFacts) -> tuple[Placement, ...]:
    """Return those with the smallest columns that planes may be cut into, straight to the file where they may leave."""
    found = placements(model, case)
    most = max(math.prod(placement.columns) for placement in found)
    return straight(placement for placement in found if math.prod(placement.columns) == most)


def straight_to_file(model: ModelFacts, case: CaseFacts) -> tuple[Placement, ...]:
    """Return those that keep nothing of the label map; all where there are none."""
    return straight(placements(model, case))


def straight(found: Iterable[Placement]) -> tuple[Placement, ...]:
    """Return of several those that keep nothing of the label map; all where there are none."""
    given = tuple(found)
    return tuple(placement for placement in given if placement.label_map is None) or given


def input_on_disk(model: ModelFacts, case: CaseFacts) -> tuple[Placement, ...]:
    """Return those that read the input as it is needed; all where there are none."""
    found = placements(model, case)
    return tuple(placement for placement in found if placement.input is Place.DISK) or found
