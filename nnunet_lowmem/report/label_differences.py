"""How two folders of label maps differ: voxels, and Dice per label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.volumes.formats import format_of, read_voxels
from nnunet_lowmem.volumes.verifying import DamagedFileError, verify_whole


@dataclass(frozen=True)
class LabelDifference:
    """How the two label maps of one case differ.

    Attributes
    ----------
    case : str
    voxels, differing : int
    dice : dict of int to float
        Of every label but 0 that one of the maps holds.
    problem : str
        Why the maps could not be compared; empty if they were.
    """

    case: str
    voxels: int = 0
    differing: int = 0
    dice: dict[int, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def identical(self) -> bool:
        """Whether both maps are there and equal in every voxel."""
        return not self.problem and self.differing == 0


def compare_folders(stock: Path, ours: Path, cases: Iterable[str], file_ending: str) -> list[LabelDifference]:
    """Compare the label maps of these cases, one after the other."""
    return [_compare(case, stock / (case + file_ending), ours / (case + file_ending)) for case in cases]


def _compare(case: str, stock_file: Path, our_file: Path) -> LabelDifference:
    for name, file in (("stock", stock_file), ("ours", our_file)):
        if not file.exists():
            return LabelDifference(case, problem=f"{name} has written no {file.name}")
    try:
        stock, ours = read_labels(stock_file), read_labels(our_file)
    except (DamagedFileError, OSError) as error:
        return LabelDifference(case, problem=str(error))
    if stock.shape != ours.shape or stock.dtype != ours.dtype:
        kinds = [f"{array.dtype} of shape {array.shape}" for array in (stock, ours)]
        return LabelDifference(case, problem=f"stock has written {kinds[0]}, ours {kinds[1]}")
    labels = int(max(stock.max(initial=0), ours.max(initial=0))) + 1
    common, held = _counts(stock[stock == ours], labels), _counts(stock, labels) + _counts(ours, labels)
    dice = {label: float(2 * common[label] / held[label]) for label in range(1, labels) if held[label]}
    return LabelDifference(case, stock.size, stock.size - int(common.sum()), dice)


def read_labels(file: Path) -> NDArray[Any]:
    """Return the voxels in the type that the file stores; SimpleITK alone would fill up what is missing with zeros.

    Raises
    ------
    DamagedFileError
        If the file is not whole.
    OSError
        If it cannot be read.
    """
    verify_whole(file)
    row = format_of(file)
    if row is not None and row.is_volume:
        header = row.known_header(file)
        if header.is_read_in_place:
            voxels = read_voxels(header)
            return voxels.astype(header.dtype, copy=False)
        import SimpleITK

        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))))
    from skimage import io

    return np.asarray(io.imread(file))


def _counts(voxels: NDArray[Any], labels: int) -> NDArray[np.int64]:
    """Voxels of each of so many labels; part by part, since `bincount` makes a copy of eight bytes a voxel."""
    counts = np.zeros(labels, np.int64)
    for part in np.array_split(voxels.ravel(), 64):
        counts += np.bincount(part, minlength=labels)
    return counts
