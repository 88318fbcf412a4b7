"""Probabilities head after head, so that peak memory does not depend on the number of heads.

Stock turns all resampled logits into float32 and takes their softmax (or sigmoid, for regions) at once, and with
probabilities its label map is the argmax of the softmax. Here the resampled heads are passed through three times: their
maximum, the sum of ``exp(logit - maximum)``, the probabilities.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.labels.heads import HeadContest, ResampledHeads, empty_label_map, sigmoid
from nnunet_lowmem.labels.rules import CaseGeometry, LabelRule

#: Receives the probabilities of one head after the other: float32, shape (z, y, x), original grid, network axis order.
ProbabilitySink = Callable[[NDArray[np.float32]], None]

# a logit closer than this to the largest one may round to the same probability: exp(-2**-19) is 32 units below 1
_CLOSE = 2.0**-19
_CLOSE_VOXELS_AT_ONCE = 1 << 20


def label_and_export(
    heads: ResampledHeads, geometry: CaseGeometry, rule: LabelRule, sink: ProbabilitySink | None
) -> NDArray[Any]:
    """Give the probabilities of every head to `sink`, if any, and return the label map that stock writes beside them.

    Returns
    -------
    uint8 or uint16 array, original grid in the axis order of the network
    """
    if not rule.ranked:
        return _sigmoid(heads, geometry, rule, sink)
    labels, cropped = empty_label_map(geometry, rule)
    contest = HeadContest(rule, cropped)
    for logits in heads:
        contest.show(logits)
    # of a part that lies beyond the crop no plane is shown
    largest = np.empty(cropped.shape, np.float16) if contest.largest is None else contest.largest
    total, close = _sum_of_exponentials(heads, largest)
    if sink is not None:
        _export_softmax(heads, geometry, largest, total, sink)
    _settle_close_calls(heads, close, rule, cropped)
    return labels


def _sigmoid(
    heads: ResampledHeads, geometry: CaseGeometry, rule: LabelRule, sink: ProbabilitySink | None
) -> NDArray[Any]:
    """Regions: outside the crop every probability is 0."""
    labels, cropped = empty_label_map(geometry, rule)
    contest = HeadContest(rule, cropped)
    whole = np.zeros(geometry.original_shape, np.float32)
    for logits in heads:
        for z in range(len(logits)):
            whole[geometry.crop][z] = sigmoid(logits[z])
        contest.show(whole[geometry.crop])
        if sink is not None:
            sink(whole)
    return labels


def _export_softmax(
    heads: ResampledHeads, geometry: CaseGeometry, largest: NDArray[Any], total: torch.Tensor, sink: ProbabilitySink
) -> None:
    """Classes: outside the crop the first head, background, has probability 1."""
    whole = np.empty(geometry.original_shape, np.float32)
    for head, logits in enumerate(heads):
        whole[...] = 1.0 if head == 0 else 0.0
        for z in range(len(logits)):
            whole[geometry.crop][z] = (torch.exp(_single(logits[z]) - _single(largest[z])) / total[z]).numpy()
        sink(whole)


def _sum_of_exponentials(heads: ResampledHeads, largest: NDArray[Any]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Sum over heads of exp(logit - largest), float32, and where another logit comes close to the largest."""
    total = torch.zeros(largest.shape, dtype=torch.float32, device="cpu")
    close = np.zeros(largest.shape, np.bool_)
    for logits in heads:
        for z in range(len(logits)):
            difference = _single(logits[z]) - _single(largest[z])
            close[z] |= ((difference < 0) & (difference > -_CLOSE)).numpy()
            total[z] += difference.exp_()
    return total, close


def _settle_close_calls(heads: ResampledHeads, close: NDArray[np.bool_], rule: LabelRule, labels: NDArray[Any]) -> None:
    """Where rounding can make two probabilities equal, take the argmax of torch's own softmax, as stock does."""
    voxels = np.flatnonzero(close)
    for start in range(0, len(voxels), _CLOSE_VOXELS_AT_ONCE):
        chosen = np.unravel_index(voxels[start : start + _CLOSE_VOXELS_AT_ONCE], close.shape)
        logits = torch.stack([_single(head[chosen]) for head in heads])
        labels[chosen] = rule.values[torch.softmax(logits, 0).numpy().argmax(0)]


def _single(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values).float()


@contextmanager
def npz_sink(
    path: Path, heads: int, shape: tuple[int, ...], transpose_backward: list[int], dtype: np.dtype[Any]
) -> Iterator[ProbabilitySink]:
    """Give a sink that writes ``np.savez_compressed(path, probabilities=...)`` head by head.

    Parameters
    ----------
    path : Path
    heads : int
    shape : int, 3
        Original grid, axis order of the file.
    transpose_backward : list of int
        From the axis order of the network to that of the file.
    dtype : numpy dtype
        float32 as stock, or float16.
    """
    entry = zipfile.ZipInfo("probabilities.npy")
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive, archive.open(entry, "w", force_zip64=True) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (heads, *shape),
        }
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda head: _write_planes(file, head.transpose(transpose_backward), dtype)


def _write_planes(file: IO[bytes], volume: NDArray[np.float32], dtype: np.dtype[Any]) -> None:
    for plane in volume:
        file.write(np.ascontiguousarray(plane, dtype).data)
