"""``nnunet-lowmem demo``: the bundled CT through the bundled 118-class model, on any machine, in a minute.

Its pictures are those of the page of ``--report``.
"""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK
from rich.console import Console
from rich.table import Table

from nnunet_lowmem.commands.console import choose_device, set_torch_threads
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.sizes import format_gib

if TYPE_CHECKING:  # the help stands before torch is loaded
    from collections.abc import Sequence

    from nnunet_lowmem.predict.outcomes import LabelVolume

_HEADS = 118
_LARGEST = 3
_SEGMENTATION = "ct_abdomen.nii.gz"


def run_demo(folder: Path, device_name: str | None) -> None:
    """Predict the bundled CT into `folder`, with its report, and print what it took."""
    device = choose_device(device_name)
    set_torch_threads(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"-o: {folder} cannot be made: {error.strerror}") from None
    from nnunet_lowmem.predictor import LowMemPredictor
    from nnunet_lowmem.report.page import REPORT_FILE

    # the model was trained without mirroring
    predictor = LowMemPredictor(device=device, use_mirroring=False, report=True)
    with as_file(files("nnunet_lowmem") / "data") as data, tempfile.TemporaryDirectory() as images:
        (Path(images) / "ct_abdomen_0000.nii.gz").write_bytes((data / "ct_abdomen_3mm.nii.gz").read_bytes())
        predictor.initialize_from_trained_model_folder(str(data / "ct118"), (0,))
        predictor.predict_from_files(images, str(folder))
    (report,) = predictor.run_report.done
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / _SEGMENTATION)))
    table = Table(title="nnunet-lowmem demo", show_header=False)
    table.add_row("image", " x ".join(map(str, labels.shape)))
    table.add_row("classes", f"{_HEADS}, of which {len(np.unique(labels))} appear")
    table.add_row("largest labels", _largest(report.labels))
    for stage, seconds in report.seconds.items():
        table.add_row(stage, f"{seconds:.1f} s")
    table.add_row("peak RAM, libraries included", format_gib(report.peak_bytes))
    # no resampling here, so stock holds halves: 2.5 times while it looks for infinity
    table.add_row("logits that stock would hold at once", format_gib(_HEADS * labels.size * 5))
    table.add_row("segmentation", str(folder / _SEGMENTATION))
    table.add_row("report, with slices", str(folder / REPORT_FILE))
    Console(markup=False, emoji=False).print(table)


def _largest(labels: Sequence[LabelVolume]) -> str:
    from nnunet_lowmem.report.page import millilitres

    largest = sorted(labels, key=lambda label: label.voxels, reverse=True)[:_LARGEST]
    return "\n".join(f"{label.name}  {millilitres(label.ml)} ml" for label in largest if label.ml is not None)
