"""Resample and decide with torch operations, for logits that live on a device.

The same rule as `cells_cpu.label_rows` in the form that suits a GPU: separable comparisons find the uniform cells,
and the boundary voxels are gathered and interpolated in float64 for every head, in blocks of bounded size.
"""

from __future__ import annotations

from itertools import product

import torch

from nnunet_lowmem.labels.resampling import AxisTable

# sigmoid(float32(x)) > 0.5 holds for a half x exactly from 2**-23 on
_REGION_THRESHOLD = 2.0**-23
# gathered corners, products and keys of one boundary voxel and head
_BYTES_PER_VOXEL_AND_HEAD = 96


def winners(logits: torch.Tensor, tables: tuple[AxisTable, ...], ranked: bool, block_bytes: int) -> torch.Tensor:
    """Index of the winner of each output voxel.

    Parameters
    ----------
    logits : half tensor, shape (heads, z, y, x)
    tables : 3 AxisTable
        From the box that `logits` covers to the output.
    ranked : bool
        True: argmax, lowest index on a tie. False: one plus the last region above the threshold, or 0.
    block_bytes : int
        Working memory for the boundary voxels.

    Returns
    -------
    int16 tensor on the device, shape (z, y, x) of the output
    """
    device = logits.device
    low = [torch.from_numpy(table.low).to(device, torch.int64) for table in tables]
    high = [torch.from_numpy(table.high).to(device, torch.int64) for table in tables]
    winner, safe = _survey_heads(logits) if ranked else (_survey_regions(logits), None)
    smallest, largest = _over_corners(winner, low, high)
    if not any(table.interpolates for table in tables):
        return smallest
    result = smallest.clone()
    uniform = smallest == largest
    if safe is not None:
        gap, size = safe
        uniform &= _over_corners(gap, low, high)[0] > _over_corners(size, low, high)[1]
    boundary = torch.nonzero(~uniform)
    neighbours = [
        [
            (low[axis], torch.from_numpy(table.weight_low).to(device)),
            (high[axis], torch.from_numpy(table.weight_high).to(device)),
        ]
        for axis, table in enumerate(tables)
    ]
    block = max(1, block_bytes // (_BYTES_PER_VOXEL_AND_HEAD * logits.shape[0]))
    for start in range(0, len(boundary), block):
        voxels = boundary[start : start + block]
        interpolated = _interpolate(logits, voxels, neighbours)
        result[tuple(voxels.T)] = _decide(interpolated, ranked)
    return result


def _survey_heads(logits: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Winner of each voxel, its distance to the best lower head, and one unit in the last place (both float32)."""
    best = logits[0].clone()
    lower = torch.full_like(best, -torch.inf)
    winner = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
    for head in range(1, logits.shape[0]):
        better = logits[head] > best
        lower = torch.where(better, best, lower)
        best = torch.where(better, logits[head], best)
        winner.masked_fill_(better, head)
    magnitude = torch.maximum(best.abs(), torch.where(lower.isinf(), 0, lower.abs())).float()
    exponent = torch.frexp(magnitude.clamp_min(2.0**-14)).exponent - 1
    unit = torch.ldexp(torch.ones_like(magnitude), exponent - 10)
    return winner, (best.float() - lower.float(), unit)


def _survey_regions(logits: torch.Tensor) -> torch.Tensor:
    winner = torch.zeros(logits.shape[1:], dtype=torch.int16, device=logits.device)
    for region in range(logits.shape[0]):
        winner.masked_fill_(logits[region] >= _REGION_THRESHOLD, region + 1)
    return winner


def _over_corners(
    values: torch.Tensor, low: list[torch.Tensor], high: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value over the eight corners of each output voxel, axis by axis."""
    smallest = largest = values
    for axis in range(3):
        smallest = torch.minimum(smallest.index_select(axis, low[axis]), smallest.index_select(axis, high[axis]))
        largest = torch.maximum(largest.index_select(axis, low[axis]), largest.index_select(axis, high[axis]))
    return smallest, largest


def _interpolate(
    logits: torch.Tensor, voxels: torch.Tensor, neighbours: list[list[tuple[torch.Tensor, torch.Tensor]]]
) -> torch.Tensor:
    """Half logits, shape (heads, voxels): corners in C order, each ((v * w0) * w1) * w2, plain float64 additions."""
    sides = [[(index[at], weight[at]) for index, weight in axis] for axis, at in zip(neighbours, voxels.T, strict=True)]
    total = torch.zeros((logits.shape[0], len(voxels)), dtype=torch.float64, device=logits.device)
    for (z, weight_z), (y, weight_y), (x, weight_x) in product(*sides):
        corner = logits[:, z, y, x].double()
        total.add_(corner.mul_(weight_z).mul_(weight_y).mul_(weight_x))
    return round_to_half(total)


def round_to_half(values: torch.Tensor) -> torch.Tensor:
    """Round finite float64 to half once, ties to even.

    torch converts by way of float32 and so rounds twice. Rounding to odd into float32 first keeps what the second
    rounding needs to know (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    bits = values.view(torch.int64)
    dropped = (1 << 29) - 1
    sticky = ((bits & dropped) != 0).long() << 29
    return ((bits & ~dropped) | sticky).view(torch.float64).float().half()


def _decide(interpolated: torch.Tensor, ranked: bool) -> torch.Tensor:
    """Winner of each column of (heads, voxels)."""
    heads = torch.arange(interpolated.shape[0], dtype=torch.int16, device=interpolated.device)[:, None]
    if ranked:
        is_best = interpolated == interpolated.amax(0)
        return torch.where(is_best, heads, interpolated.shape[0]).amin(0)
    return torch.where(interpolated >= _REGION_THRESHOLD, heads + 1, 0).amax(0)
