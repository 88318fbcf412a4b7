"""All logits of a case at once: where somebody else makes them, or has to be asked what becomes of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.logits import TileNetwork
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.system.threads import torch_threads
from nnunet_lowmem.types import PreprocessedCase, Result, Shape3

logger = logging.getLogger(__name__)


def label_manager(setup: Setup, job: Job) -> Any:
    """Return the label manager that stock asks: where it writes files, it makes a new one."""
    written = job.output is not None
    return setup.plans_manager.get_label_manager(setup.dataset_json) if written else setup.label_manager


@dataclass(frozen=True)
class HeldLogits:
    """The steps of one case whose logits are held.

    Attributes
    ----------
    setup : Setup
    job : Job
    clock : StageClock
    probabilities : bool
        Are wanted, too.
    """

    setup: Setup
    job: Job
    clock: StageClock
    probabilities: bool

    def made(self, case: PreprocessedCase) -> Any:
        """Return them as nnU-Net's method does, where somebody else takes part in making them."""
        data = stock_calls.network_input(case, self.setup.label_manager)
        TileNetwork(self.setup).ways.prepare()
        with torch_threads(TileNetwork(self.setup).most_threads()), foreign(self.clock):
            logits = self.setup.steps.predict_logits(data)
        return logits.cpu().detach() if isinstance(logits, torch.Tensor) else logits

    def tell(self, rule: LabelRule | None) -> None:
        """Say why they are held, unless that has been said of what is replaced."""
        manager = type(self.setup.label_manager).__name__
        what = "the resampling of logits" if rule else f"label manager {manager}"
        if not self.setup.steps.replaced(Step.LABELS, Step.EXPORT, Step.RESAMPLING):
            logger.warning("%s is not nnU-Net's own: all logits are held for it, so memory is not bounded", what)

    def are_plain(self, held: Any, network_shape: Shape3) -> bool:
        """Whether our kernels may read logits that somebody else has made."""
        shape = (self.setup.heads, *network_shape)
        plain = isinstance(held, torch.Tensor) and held.dtype == torch.half and tuple(held.shape) == shape
        return plain and all(bool(torch.isfinite(head).all()) for head in held)

    def converted(self, logits: Any, case: PreprocessedCase, part: Part) -> Result:
        """Let nnU-Net's functions convert them, or what stands in their place; None where these wrote."""
        setup, output = self.setup, self.job.output
        others = setup.steps.replaced(Step.LABELS, Step.EXPORT, Step.RESAMPLING)
        with self.clock.stage("export"), foreign(self.clock if others else None):
            if output is not None and setup.steps.replaced(Step.EXPORT):
                model = (setup.configuration_manager, setup.plans_manager, setup.dataset_json)
                stock_calls.export()(logits, case.properties, *model, output, self.probabilities)
                return None
            convert = stock_calls.conversion(writes=output is not None)
            manager = label_manager(setup, self.job)
            arguments = (setup.plans_manager, setup.configuration_manager, manager, case.properties)
            result = convert(logits, *arguments, return_probabilities=self.probabilities)
        return self._framed(result, part)

    def _framed(self, result: Any, part: Part) -> Result:
        """Cut what is asked for out of what nnU-Net's functions have made of a whole case."""
        if not part.is_cut:
            return result  # type: ignore[no-any-return]  # stock's
        plans = self.setup.plans_manager

        def framed(values: NDArray[Any], outside: float = 0) -> NDArray[Any]:
            cut = part.framed(values.transpose(plans.transpose_forward), outside)
            return cut.transpose(plans.transpose_backward)

        if not isinstance(result, tuple):
            return framed(result)
        segmentation, heads = result
        outside = chain([0.0 if self.setup.label_manager.has_regions else 1.0], repeat(0.0))
        probabilities = np.empty((len(heads), *(part.shape[axis] for axis in plans.transpose_backward)), heads.dtype)
        for own, head in zip(probabilities, heads, strict=True):
            own[...] = framed(head, next(outside))
        return framed(segmentation), probabilities
