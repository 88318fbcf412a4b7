"""``nnunet-lowmem demo``: the bundled CT through the bundled 118-class model, on any machine, in a minute."""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nnunet_lowmem.commands.console import choose_device, set_torch_threads
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.sizes import format_gib

_HEADS = 118
# Hounsfield units between which the picture runs from black to white: soft tissue
_WINDOW = (-160.0, 240.0)


def run_demo(folder: Path, device_name: str | None) -> None:
    """Predict the bundled CT into `folder`, draw three slices, and print what it took."""
    device = choose_device(device_name)
    set_torch_threads(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"-o: {folder} cannot be made: {error.strerror}") from None
    from nnunet_lowmem.predictor import LowMemPredictor

    reports: list[CaseReport] = []
    # the model was trained without mirroring
    predictor = LowMemPredictor(device=device, use_mirroring=False, on_case=reports.append)
    with as_file(files("nnunet_lowmem") / "data") as data, tempfile.TemporaryDirectory() as images:
        scan = data / "ct_abdomen_3mm.nii.gz"
        (Path(images) / "ct_abdomen_0000.nii.gz").write_bytes(scan.read_bytes())
        predictor.initialize_from_trained_model_folder(str(data / "ct118"), (0,))
        predictor.predict_from_files(images, str(folder))
        image = _read_oriented(scan)
    labels = _read_oriented(folder / "ct_abdomen.nii.gz")
    draw_slices(image, labels, folder / "ct_abdomen.png")
    _print_summary(reports[0], labels, folder)


def _read_oriented(path: Path) -> NDArray[np.number]:
    """Voxels, shape (z, y, x): z upwards, y backwards, x to the patient's left."""
    oriented = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")  # type: ignore[no-untyped-call]  # SimpleITK's
    return np.asarray(SimpleITK.GetArrayFromImage(oriented))


def draw_slices(image: NDArray[np.number], labels: NDArray[np.number], path: Path) -> None:
    """Draw the middle axial, coronal and sagittal slice with the labels laid over.

    Parameters
    ----------
    image, labels : arrays, shape (z, y, x)
        z upwards, y backwards, x to the patient's left, one voxel size in all directions.
    """
    from matplotlib.figure import Figure

    from nnunet_lowmem.report.slices import blend

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axis, (axes, title) in enumerate(zip(figure.subplots(1, 3), ("axial", "coronal", "sagittal"), strict=True)):
        middle = image.shape[axis] // 2
        picture = blend(np.take(image, middle, axis), np.take(labels, middle, axis), _WINDOW)
        axes.imshow(picture, origin="upper" if axis == 0 else "lower", interpolation="nearest")
        axes.set_title(f"{title}, slice {middle}")
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _print_summary(report: CaseReport, labels: NDArray[np.number], folder: Path) -> None:
    table = Table(title="nnunet-lowmem demo", show_header=False)
    table.add_row("image", " x ".join(map(str, labels.shape)))
    table.add_row("classes", f"{_HEADS}, of which {len(np.unique(labels))} appear")
    for stage, seconds in report.seconds.items():
        table.add_row(stage, f"{seconds:.1f} s")
    table.add_row("peak RAM, libraries included", format_gib(report.peak_bytes))
    # no resampling here, so stock holds halves: 2.5 times while it looks for infinity
    table.add_row("logits that stock would hold at once", format_gib(_HEADS * labels.size * 5))
    table.add_row("segmentation", str(folder / "ct_abdomen.nii.gz"))
    table.add_row("picture", str(folder / "ct_abdomen.png"))
    Console().print(table)
