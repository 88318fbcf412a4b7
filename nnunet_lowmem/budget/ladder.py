"""Going on when memory cannot be had although the plan said it fits: somebody else took it meanwhile.

An operation that fails changes nothing, so it is simply tried again after a step down the ladder: the fastest plan that
takes less where memory ran out. What has been predicted stays; the window moves with all its sums. Any error that is
not about memory passes through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from nnunet_lowmem.budget.arrays import Stage
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.budget.planner import next_plan
from nnunet_lowmem.budget.refusals import ran_out
from nnunet_lowmem.errors import MemoryExhaustedError, because, without_frames
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.out_of_memory import is_about_ram, is_out_of_memory
from nnunet_lowmem.types import Place

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Recovery:
    """The ladder of one stage of a case.

    Parameters
    ----------
    plan : Plan
        What the case began with.
    plans : iterable of Plan
        All there are, fastest first; those that change what cannot be changed under way are left out.
    on_step : callable
        Called with each new plan.
    stage : Stage
        Prediction, or preprocessing.

    Attributes
    ----------
    plan : Plan
        What holds now.
    steps : list of str
        What was done, with numbers.
    """

    def __init__(
        self,
        plan: Plan,
        plans: Iterable[Plan],
        on_step: Callable[[Plan], object] = id,
        stage: Stage = Stage.PREDICTION,
    ) -> None:
        self.plan = plan
        self._stage = stage
        self.steps: list[str] = []
        self._listeners = [on_step]
        self._plans = [other for other in plans if _fixed(other, stage) == _fixed(plan, stage)]

    @contextmanager
    def followed_by(self, listener: Callable[[Plan], object]) -> Iterator[None]:
        """Tell `listener` of each new plan in the block, and hold it no longer: the window holds this in turn."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def run(self, operation: Callable[[], T]) -> T:
        """Return ``operation()``, tried again with less and less memory.

        Raises
        ------
        MemoryExhaustedError
            When the last step did not help either; of the kind of the last error, which is its cause.
        """
        while True:
            try:
                return operation()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            without_frames(failure)
            self._step_down(failure)
            del failure

    def _step_down(self, failure: Exception) -> None:
        place, reason = Place.RAM if is_about_ram(failure) else Place.VRAM, _reason(failure)
        following = next_plan(self._plans, self.plan, place, self._stage)
        if following is None:
            story = "; ".join([*self.steps, reason])
            raise because(
                MemoryExhaustedError,
                f"case {self.plan.case}: {place.value} ran out, and nothing is left to be made smaller: {story}. "
                f"Projected were {format_gib(self._projected(self.plan, place))}; {ran_out(self.plan.budget, place)}",
                failure,
            )
        step = (
            f"{place.value} ran out ({reason}): from {format_gib(self._projected(self.plan, place))} projected to "
            f"{format_gib(self._projected(following, place))}, with {_what_changes(following, self._stage)}"
        )
        self.steps.append(step)
        _logger.warning("case %s: %s", self.plan.case, step)
        self.plan = following
        if following.placement.weights is Place.DISK:  # there they stay
            self._plans = [other for other in self._plans if other.placement.weights is Place.DISK]
        for listener in self._listeners:
            listener(following)
        return_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _projected(self, plan: Plan, place: Place) -> int:
        return plan.budget.reserved(place) + plan.planned_bytes(place, self._stage)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _what_changes(plan: Plan, stage: Stage) -> str:
    chosen = plan.placement
    if stage is not Stage.PREDICTION:
        where = "on disk" if chosen.image is Place.DISK else f"in {chosen.image.value}"
        others = {"the input": chosen.input, "the weights": chosen.weights}
        on_disk = "".join(f", {name} on disk" for name, place in others.items() if place is Place.DISK)
        return f"the image {where}, threads: {chosen.threads}{on_disk}"
    return (
        f"{chosen.in_words()}, {chosen.slab_planes or 'all'} planes labelled at a time in blocks of "
        f"{format_gib(chosen.block_bytes)}"
    )


def _fixed(plan: Plan, stage: Stage) -> tuple[object, ...]:
    """Return what cannot be changed while a case is predicted; before, nothing is fixed."""
    chosen = plan.placement
    return (
        (chosen.image, chosen.label_map, chosen.planes, chosen.threads, chosen.columns)
        if stage is Stage.PREDICTION
        else ()
    )


def near_device_or_in_ram(attempt: Callable[[Place], T]) -> T:
    """Return ``attempt(VRAM)``, or ``attempt(RAM)`` where the device has too little memory, as stock does."""
    try:
        return attempt(Place.VRAM)
    except torch.cuda.OutOfMemoryError as error:
        _logger.warning("VRAM ran out (%s): once more with all logits in RAM", _reason(error))
        without_frames(error)
    torch.cuda.empty_cache()
    return attempt(Place.RAM)
