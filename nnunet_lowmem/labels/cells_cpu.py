"""Compiled CPU kernels that interpolate logits and find their labels; the idea is told in `labeller`.

Same conventions as in `window.kernels`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.system.compiler import jit
from nnunet_lowmem.window.halves import double_to_half_key, half_key, half_to_single, key_to_double, key_to_half

Survey = tuple[NDArray[np.uint16], NDArray[np.int8], NDArray[np.int8]]
"""Of every voxel of a box: the winner, and exponents of its gap to the best lower head and of their magnitude."""
Cells = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
"""Along the last axis: low and high neighbour of every cell, and its first output position."""

# sigmoid(float32(x)) > 0.5 holds for a half x exactly from the second smallest positive half on, 2**-23
REGION_THRESHOLD_KEY = 2
_NO_RIVAL = 127
_SMALLEST_NORMAL_EXPONENT = -14
# a half has 10 bits after the point; one more because the stored exponents are floors
_SAFE_EXPONENT_DISTANCE = 9


@jit
def interpolate(
    logits: NDArray[np.uint16],
    head: int,
    corner_rows: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    x: tuple[int, int, float, float],
) -> np.int16:
    """Key of the interpolated logit; corners in C order, each ((v * w0) * w1) * w2, plain additions (scipy's order)."""
    z0, z1, y0, y1 = corner_rows
    wz0, wz1, wy0, wy1 = weights
    x0, x1, wx0, wx1 = x
    r00, r01, r10, r11 = logits[head, z0, y0], logits[head, z0, y1], logits[head, z1, y0], logits[head, z1, y1]
    total = ((np.float64(half_to_single(r00[x0])) * wz0) * wy0) * wx0
    total += ((np.float64(half_to_single(r00[x1])) * wz0) * wy0) * wx1
    total += ((np.float64(half_to_single(r01[x0])) * wz0) * wy1) * wx0
    total += ((np.float64(half_to_single(r01[x1])) * wz0) * wy1) * wx1
    total += ((np.float64(half_to_single(r10[x0])) * wz1) * wy0) * wx0
    total += ((np.float64(half_to_single(r10[x1])) * wz1) * wy0) * wx1
    total += ((np.float64(half_to_single(r11[x0])) * wz1) * wy1) * wx0
    total += ((np.float64(half_to_single(r11[x1])) * wz1) * wy1) * wx1
    return double_to_half_key(total)  # type: ignore[no-any-return]  # numba has no types


@jit
def survey_heads(
    logits: NDArray[np.uint16],
    origin: tuple[int, int, int],
    survey: Survey,
    row_start: int,
    row_stop: int,
) -> None:
    """For each voxel: the largest head (lowest index wins a tie) and how far it is above every lower head.

    Parameters
    ----------
    logits : uint16 bits of halves, shape (heads, a, b, c)
    origin : int, 3
        Where the box that `survey` covers starts in `logits`.
    survey : uint16, int8 and int8, shape (z, y, x) each
        Written: index of the winning head; floor(log2(winner - best lower head)), 127 if there is no lower head;
        exponent of the larger magnitude of the two.
    row_start, row_stop : int
        Range of the flattened (z, y) rows to survey.
    """
    winner, gap_exponent, magnitude_exponent = survey
    rows, columns = winner.shape[1], winner.shape[2]
    best = np.empty(columns, np.int16)
    lower = np.empty(columns, np.int16)
    index = np.empty(columns, np.uint16)
    for flat in range(row_start, row_stop):
        z, y = divmod(flat, rows)
        best[:] = -32768
        lower[:] = -32768
        index[:] = 0
        for head in range(logits.shape[0]):
            source = logits[head, origin[0] + z, origin[1] + y, origin[2] : origin[2] + columns]
            for x in range(columns):
                key = half_key(source[x])
                better = key > best[x]
                lower[x] = best[x] if better else lower[x]
                index[x] = np.uint16(head) if better else index[x]
                best[x] = key if better else best[x]
        for x in range(columns):
            winner[z, y, x] = index[x]
            gap_exponent[z, y, x], magnitude_exponent[z, y, x] = _exponents(best[x], lower[x])


@jit
def _exponents(best: np.int16, lower: np.int16) -> tuple[np.int8, np.int8]:
    largest = max(abs(np.int32(best)), abs(np.int32(lower)) if lower != -32768 else 0)
    magnitude = np.int32(largest >> 10) - 15
    if magnitude < _SMALLEST_NORMAL_EXPONENT:
        magnitude = np.int32(_SMALLEST_NORMAL_EXPONENT)
    if lower == -32768:
        return np.int8(_NO_RIVAL), np.int8(magnitude)
    gap = np.float32(key_to_double(best) - key_to_double(lower))
    return np.int8(np.int32(gap.view(np.uint32) >> 23) - 127), np.int8(magnitude)


@jit
def survey_regions(
    logits: NDArray[np.uint16],
    origin: tuple[int, int, int],
    survey: Survey,
    row_start: int,
    row_stop: int,
) -> None:
    """For each voxel: one plus the index of the last region whose probability exceeds 0.5, or 0.

    Parameters as in `survey_heads`; no exponents are written.
    """
    winner = survey[0]
    rows, columns = winner.shape[1], winner.shape[2]
    for flat in range(row_start, row_stop):
        z, y = divmod(flat, rows)
        target = winner[z, y]
        target[:] = 0
        for region in range(logits.shape[0]):
            source = logits[region, origin[0] + z, origin[1] + y, origin[2] : origin[2] + columns]
            for x in range(columns):
                if half_key(source[x]) >= REGION_THRESHOLD_KEY:
                    target[x] = np.uint16(region + 1)


@jit
def _find_boundary_cells(
    survey: Survey,
    corner_rows: tuple[int, int, int, int],
    cells: Cells,
    interpolates: bool,
    ranked: bool,
    status: NDArray[np.int32],
    boundary: NDArray[np.int32],
) -> int:
    """Write the label index of every uniform cell into `status` (-1: boundary cell); list the boundary cells."""
    winner, gap_exponent, magnitude_exponent = survey
    low, high, _ = cells
    z0, z1, y0, y1 = corner_rows
    w00, w01, w10, w11 = winner[z0, y0], winner[z0, y1], winner[z1, y0], winner[z1, y1]
    g00, g01, g10, g11 = gap_exponent[z0, y0], gap_exponent[z0, y1], gap_exponent[z1, y0], gap_exponent[z1, y1]
    m00, m01 = magnitude_exponent[z0, y0], magnitude_exponent[z0, y1]
    m10, m11 = magnitude_exponent[z1, y0], magnitude_exponent[z1, y1]
    count = 0
    for cell in range(low.size):
        a, b = low[cell], high[cell]
        first = w00[a]
        uniform = w00[b] == first and w01[a] == first and w01[b] == first
        uniform = uniform and w10[a] == first and w10[b] == first and w11[a] == first and w11[b] == first
        if uniform and interpolates and ranked:
            gap = min(min(g00[a], g00[b], g01[a], g01[b]), min(g10[a], g10[b], g11[a], g11[b]))
            size = max(max(m00[a], m00[b], m01[a], m01[b]), max(m10[a], m10[b], m11[a], m11[b]))
            uniform = gap >= size - _SAFE_EXPONENT_DISTANCE
        status[cell] = np.int32(first) if uniform else np.int32(-1)
        if not uniform:
            boundary[count] = cell
            count += 1
    return count


@jit
def _corner_extremes(
    logits: NDArray[np.uint16],
    corner_rows: tuple[int, int, int, int],
    cells: Cells,
    listed: NDArray[np.int32],
    row_low: NDArray[np.int16],
    row_high: NDArray[np.int16],
    smallest: NDArray[np.int16],
    largest: NDArray[np.int16],
) -> None:
    """Smallest and largest of the 8 corners, as keys, of each listed cell for each head: shape (heads, cells)."""
    low, high, _ = cells
    z0, z1, y0, y1 = corner_rows
    start, stop = low[listed[0]], high[listed[-1]] + 1
    for head in range(logits.shape[0]):
        r00, r01 = logits[head, z0, y0, start:stop], logits[head, z0, y1, start:stop]
        r10, r11 = logits[head, z1, y0, start:stop], logits[head, z1, y1, start:stop]
        for x in range(stop - start):
            a, b, c, d = half_key(r00[x]), half_key(r01[x]), half_key(r10[x]), half_key(r11[x])
            row_low[x] = min(min(a, b), min(c, d))
            row_high[x] = max(max(a, b), max(c, d))
        for number in range(listed.size):
            a, b = low[listed[number]] - start, high[listed[number]] - start
            smallest[head, number] = min(row_low[a], row_low[b])
            largest[head, number] = max(row_high[a], row_high[b])


@jit
def _decide_head(
    logits: NDArray[np.uint16],
    corner_rows: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    x: tuple[int, int, float, float],
    largest: NDArray[np.int16],
    floor_key: int,
) -> int:
    """Argmax of the interpolated heads; a head whose largest corner is below another's smallest cannot win."""
    best_key = -32768
    best = 0
    for head in range(largest.size):
        if largest[head] >= floor_key:
            key = interpolate(logits, head, corner_rows, weights, x)
            if key > best_key:
                best_key = key
                best = head
    return best


@jit
def _decide_region(
    logits: NDArray[np.uint16],
    corner_rows: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    x: tuple[int, int, float, float],
    smallest: NDArray[np.int16],
    largest: NDArray[np.int16],
) -> int:
    """One plus the last region above the threshold, or 0: later regions are written over earlier ones."""
    for region in range(largest.size - 1, -1, -1):
        if smallest[region] >= REGION_THRESHOLD_KEY:
            return region + 1
        if largest[region] >= REGION_THRESHOLD_KEY:
            key = interpolate(logits, region, corner_rows, weights, x)
            if key >= REGION_THRESHOLD_KEY:
                return region + 1
    return 0


@jit
def _label_boundary_cells(
    logits: NDArray[np.uint16],
    corner_rows: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    cells: Cells,
    x_weights: tuple[NDArray[np.float64], NDArray[np.float64]],
    listed: NDArray[np.int32],
    smallest: NDArray[np.int16],
    largest: NDArray[np.int16],
    ranked: bool,
    values: NDArray[np.uint16],
    target: NDArray[np.uint8],
) -> None:
    """Interpolate the voxels of one output row that lie in the listed cells."""
    low, high, first = cells
    for number in range(listed.size):
        cell = listed[number]
        floor_key = -32768
        if ranked:
            for head in range(logits.shape[0]):
                floor_key = max(floor_key, smallest[head, number])
        for column in range(first[cell], first[cell + 1]):
            x = (low[cell], high[cell], x_weights[0][column], x_weights[1][column])
            if ranked:
                chosen = _decide_head(logits, corner_rows, weights, x, largest[:, number], floor_key)
            else:
                chosen = _decide_region(logits, corner_rows, weights, x, smallest[:, number], largest[:, number])
            target[column] = values[chosen]


@jit
def label_rows(
    logits: NDArray[np.uint16],
    origin: tuple[int, int, int],
    survey: Survey,
    index: tuple[NDArray[np.int32], ...],
    weight: tuple[NDArray[np.float64], ...],
    cells: Cells,
    interpolates: bool,
    ranked: bool,
    values: NDArray[np.uint16],
    labels: NDArray[np.uint8],
    row_start: int,
    row_stop: int,
) -> None:
    """Write the labels of the flattened output rows [row_start, row_stop) of `labels`.

    Parameters
    ----------
    logits : uint16 bits of halves, shape (heads, a, b, c)
    origin : int, 3
        Where the surveyed box starts in `logits`.
    survey : 3 arrays
        From `survey_heads` or `survey_regions`, for the box.
    index, weight : 6 arrays each
        From `resampling.flat_tables`, within the box.
    cells : 3 arrays
        From `AxisTable.cells` of the last axis.
    interpolates : bool
        False when every weight is 0 or 1 and each output voxel copies one input voxel.
    ranked : bool
        True: argmax over heads. False: regions.
    values : shape (heads + 1,)
        Label value of each winner index.
    labels : uint8 or uint16, shape (z, y, x), any strides
        Written.
    """
    heads = logits.shape[0]
    rows = labels.shape[1]
    low, high, first = cells
    status = np.empty(low.size, np.int32)
    boundary = np.empty(low.size, np.int32)
    row_low = np.empty(survey[0].shape[2], np.int16)
    row_high = np.empty(survey[0].shape[2], np.int16)
    smallest = np.empty((heads, low.size), np.int16)
    largest = np.empty((heads, low.size), np.int16)
    in_logits = (low + origin[2], high + origin[2], first)
    for flat in range(row_start, row_stop):
        z, y = divmod(flat, rows)
        box_rows = (index[0][z], index[1][z], index[2][y], index[3][y])
        count = _find_boundary_cells(survey, box_rows, cells, interpolates, ranked, status, boundary)
        target = labels[z, y]
        for cell in range(low.size):
            if status[cell] >= 0:
                target[first[cell] : first[cell + 1]] = values[status[cell]]
        if count == 0:
            continue
        z0, z1, y0, y1 = box_rows
        corner_rows = (z0 + origin[0], z1 + origin[0], y0 + origin[1], y1 + origin[1])
        weights = (weight[0][z], weight[1][z], weight[2][y], weight[3][y])
        listed = boundary[:count]
        _corner_extremes(logits, corner_rows, in_logits, listed, row_low, row_high, smallest, largest)
        _label_boundary_cells(
            logits, corner_rows, weights, in_logits, (weight[4], weight[5]), listed,
            smallest, largest, ranked, values, target,
        )  # fmt: skip


@jit
def resample_rows(
    logits: NDArray[np.uint16],
    index: tuple[NDArray[np.int32], ...],
    weight: tuple[NDArray[np.float64], ...],
    out: NDArray[np.uint16],
    row_start: int,
    row_stop: int,
) -> None:
    """Interpolate one head, shape (1, a, b, c), onto the whole output grid `out`, shape (z, y, x); both uint16 bits.

    The other parameters are as in `label_rows`.
    """
    rows = out.shape[1]
    for flat in range(row_start, row_stop):
        z, y = divmod(flat, rows)
        corner_rows = (index[0][z], index[1][z], index[2][y], index[3][y])
        weights = (weight[0][z], weight[1][z], weight[2][y], weight[3][y])
        for x in range(out.shape[2]):
            corner_columns = (index[4][x], index[5][x], weight[4][x], weight[5][x])
            out[z, y, x] = key_to_half(interpolate(logits, 0, corner_rows, weights, corner_columns))
