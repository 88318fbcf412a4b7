"""The files of a case, through the model's own writer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.predict.setup import Setup

Segmentation = NDArray[Any]
Result = Segmentation | tuple[Segmentation, NDArray[np.float32]] | None


def write(setup: Setup, result: Result, output: str, properties: dict[str, Any]) -> None:
    """Write what is not written yet; each file appears under its name when it is complete."""
    assert result is not None
    segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
    if probabilities is not None:
        adapter.write_probabilities(probabilities, output + ".npz")
        adapter.write_properties(properties, output + ".pkl")
    adapter.write_segmentation(segmentation, properties, output + setup.file_ending, setup.plans_manager)
