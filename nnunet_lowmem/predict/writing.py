"""The files of a case, through the model's own writer; and whether they can be written, before it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.nnunet.rehearsing import rehearse
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.types import Shape3

Segmentation = NDArray[Any]
Result = Segmentation | tuple[Segmentation, NDArray[np.float32]] | None


def rehearse_writing(
    setup: Setup, output: str, properties: dict[str, Any], shape: Shape3, rule: LabelRule | None, folder: Path
) -> None:
    """Refuse a case before it is computed if its label map, of `shape` in the network's axes, has no writer."""
    in_file = [shape[axis] for axis in setup.plans_manager.transpose_backward]
    writer = setup.plans_manager.image_reader_writer_class
    rehearse(writer, output, setup.file_ending, properties, in_file, rule, folder)


def write(setup: Setup, result: Result, output: str, properties: dict[str, Any]) -> None:
    """Write what is not written yet; each file appears under its name when it is complete."""
    assert result is not None
    segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
    if probabilities is not None:
        adapter.write_probabilities(probabilities, output + ".npz")
        adapter.write_properties(properties, output + ".pkl")
    adapter.write_segmentation(segmentation, properties, output + setup.file_ending, setup.plans_manager)
