"""Cubic-spline resampling slab by slab, bit-equal to the one that nnU-Net runs on whole volumes.

nnU-Net's order-3 resampling is ``skimage.transform.resize(mode="edge", anti_aliasing=False)``, which is
``scipy.ndimage.zoom(order=3, mode="nearest", grid_mode=True)`` in float64, clipped to the input's range. SciPy pads 12
voxels on every side, turns values into spline coefficients along axis 0, then 1, then 2, and sums 64 weighted
coefficients for each output voxel. Only the filter along axis 0 looks at more than one plane, and it is two first-order
recursions, one forward and one backward, so its whole state fits in a plane:

- going forward once over all planes keeps the state at the first plane of every slab;
- the slabs are then visited from the last to the first: forward again from the kept state, backward from the state that
  the slab behind left.

Every number is computed from the same numbers as in SciPy, so no halo has to be chosen. The axes 1 and 2 are filtered
plane by plane, and an output plane is written as soon as its four planes are there. About ``2 * sqrt(planes)`` planes
of float64 are alive at a time.

The order of operations is SciPy's too: gain first, then the recursions; weights multiplied along axis 0, 1, 2 in turn
and the products added in C order; no fused multiply-add, no fastmath. `matches_scipy` tries this once on the machine at
hand; where it does not hold (SciPy compiled with fused multiply-add), callers have to use SciPy itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_lowmem.system.compiler import jit
from nnunet_lowmem.system.threads import RowThreads

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
IndexArray = NDArray[np.intp]
ReadBlock = Callable[[slice, slice], Float32Array]
"""Reads planes × rows of a volume: a C-contiguous array of shape (planes, rows, columns)."""

_PAD = 12  # edge voxels that scipy.ndimage adds on each side in mode "nearest"
_POLE = -0.267949192431122706472553658494127633  # sqrt(3) - 2, of the cubic B-spline's recursive filter
_GAIN = (1.0 - _POLE) * (1.0 - 1.0 / _POLE)
_LAST_FACTOR = _POLE / (_POLE - 1.0)
_COLUMN_STRIP = 64  # filtered together along axis 1, so that they stay in the cache
_ROW_STRIP = 16  # filtered together along axis 2, so that the processor has independent recursions to work on
_ROW_BLOCK = 64  # output rows that a thread writes at a time
_COLUMN_BLOCK_BYTES = 4 << 20  # input over the whole of axis 0 that a thread holds at a time


class _Taps(NamedTuple):
    """Where each output voxel finds its coefficients along one axis."""

    first: IndexArray  # (n_out,), index of the first coefficient in the padded axis
    weights: Float64Array  # (taps, n_out)


def zoom_cubic(read: ReadBlock, shape: tuple[int, int, int], out: Float32Array, threads: RowThreads) -> None:
    """Resample a volume to the shape of `out`.

    Parameters
    ----------
    read : callable
        Gives the volume's values; called from several threads, twice for every voxel.
    shape : tuple of int
        Shape of the volume, at least one voxel along each axis.
    out : ndarray of float32, shape (z, y, x)
        Receives the result: the float64 spline clipped to the volume's range, rounded once.
    threads : RowThreads
        Shares the work.
    """
    _Zoom(read, shape, out, threads).run()


def zoom_cubic_slices(read: ReadBlock, shape: tuple[int, int, int], out: Float32Array, threads: RowThreads) -> None:
    """Resample a volume to the shape of `out`, in-plane with the cubic spline, along axis 0 by the nearest slice.

    As nnU-Net's ``resample_data_or_seg`` does with ``do_separate_z`` and ``order_z=0``: every slice is clipped to its
    own range. Parameters as for `zoom_cubic`.
    """
    source = _nearest_slices(shape[0], out.shape[0])
    taps = (_taps(shape[1], out.shape[1]), _taps(shape[2], out.shape[2]))

    def write(begin: int, end: int) -> None:
        for index in np.unique(source)[begin:end]:
            _write_slice(read(slice(index, index + 1), slice(0, shape[1])), np.flatnonzero(source == index), taps, out)

    threads.run(write, len(np.unique(source)))


def working_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes that `zoom_cubic` takes for a volume of this shape, beside its result and the blocks of its threads."""
    length, rows, columns = (size + 2 * _PAD for size in shape)
    depth = isqrt(length)
    return 8 * (-(-length // depth) + 1 + depth + 3) * rows * columns


@lru_cache(maxsize=1)
def matches_scipy() -> bool:
    """Whether the kernels of this module give SciPy's results bit for bit on this machine."""
    volume = np.random.default_rng(3).standard_normal((9, 21, 14), dtype=np.float32)
    out = np.empty((13, 16, 17), np.float32)
    factors = [1 / (n_in / n_out) for n_in, n_out in zip(volume.shape, out.shape, strict=True)]
    expected = ndimage.zoom(volume.astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)
    with RowThreads(1) as threads:
        zoom_cubic(lambda planes, rows: volume[planes, rows].copy(), volume.shape, out, threads)
    return np.array_equal(out, np.clip(expected, volume.min(), volume.max()).astype(np.float32))


class _Zoom:
    """One run of `zoom_cubic`: the buffers, and the steps over them."""

    def __init__(self, read: ReadBlock, shape: tuple[int, int, int], out: Float32Array, threads: RowThreads) -> None:
        self.read = read
        self.shape = shape
        self.out = np.asarray(out)
        self.threads = threads
        self.taps = [_taps(n_in, n_out) for n_in, n_out in zip(shape, out.shape, strict=True)]
        self.length = shape[0] + 2 * _PAD
        self.depth = isqrt(self.length)
        self.starts = range(0, self.length, self.depth)
        self.source = np.clip(np.arange(-_PAD, shape[0] + _PAD), 0, shape[0] - 1)
        self.extremes: list[float] = []

    def run(self) -> None:
        _, rows, columns = self.shape
        self.kept = np.empty((len(self.starts), rows, columns))
        self.behind = np.empty((rows, columns))
        self.threads.run(self._keep_states, rows)
        self.planes = np.empty((self.depth + 3, rows + 2 * _PAD, columns + 2 * _PAD))
        for slab in reversed(range(len(self.starts))):
            if self.starts[slab] + self.depth > self.taps[0].first[0]:
                self._run_slab(slab)

    def _keep_states(self, begin: int, end: int) -> None:
        """Filter rows [begin, end) forward over all planes and keep the state at the first plane of every slab."""
        step = max(1, _COLUMN_BLOCK_BYTES // (4 * self.shape[0] * self.shape[2]))
        for row in range(begin, end, step):
            rows = slice(row, min(row + step, end))
            block = self.read(slice(0, self.shape[0]), rows)
            self.extremes.extend([float(block.min()), float(block.max())])
            kept = np.empty((len(self.starts), block[0].size))
            _keep_states(block.reshape(len(block), -1), self.source, _POLE**self.length, self.depth, kept)
            self.kept[:, rows] = kept.reshape(-1, *block.shape[1:])

    def _run_slab(self, slab: int) -> None:
        start = self.starts[slab]
        stop = min(start + self.depth, self.length)
        first, weights = self.taps[0]
        self.threads.run(self._filter_axis_0, self.shape[1], slab, start, stop)
        used = range(max(start, first[0]), min(stop, first[-1] + 4))
        if used:
            planes = self.planes[used.start - start : used.stop - start]
            self.threads.run(_filter_planes, len(used), planes, *_pole_powers(planes))
        begin, end = np.searchsorted(first, [start, stop])
        blocks = -(-self.out.shape[1] // _ROW_BLOCK)
        self.threads.run(
            _write_rows,
            (end - begin) * blocks,
            self.planes,
            _Taps(first[begin:end] - start, weights[:, begin:end].copy()),
            self.taps[1],
            self.taps[2],
            min(self.extremes),
            max(self.extremes),
            self.out[begin:end],
        )
        self.planes[self.depth :] = self.planes[:3]

    def _filter_axis_0(self, slab: int, start: int, stop: int, begin: int, end: int) -> None:
        source = self.source[start:stop]
        block = self.read(slice(source[0], source[-1] + 1), slice(begin, end))
        planes = self.planes[: stop - start, _PAD + begin : _PAD + end, _PAD:-_PAD]
        last = stop == self.length
        _filter_axis_0(block, source - source[0], self.kept[slab, begin:end], self.behind[begin:end], last, planes)


def _write_slice(values: Float32Array, targets: IndexArray, taps: tuple[_Taps, _Taps], out: Float32Array) -> None:
    """Resample one slice, shape (1, rows, columns), into the planes `targets` of `out`."""
    if values.shape[1:] == out.shape[1:]:
        out[targets] = values
        return
    plane = np.empty((1, values.shape[1] + 2 * _PAD, values.shape[2] + 2 * _PAD))
    plane[:, _PAD:-_PAD, _PAD:-_PAD] = values
    _filter_planes(plane, *_pole_powers(plane), 0, 1)
    as_it_is = _Taps(np.zeros(1, np.intp), np.ones((1, 1)))
    blocks = -(-out.shape[1] // _ROW_BLOCK)
    result = np.empty((1, *out.shape[1:]), np.float32)
    _write_rows(plane, as_it_is, *taps, float(values.min()), float(values.max()), result, 0, blocks)
    out[targets] = result


def _pole_powers(planes: Float64Array) -> tuple[float, float]:
    """pow(pole, length) for the axes 1 and 2: the C library's, which numba's integer power is not."""
    return _POLE ** planes.shape[1], _POLE ** planes.shape[2]


def _nearest_slices(n_in: int, n_out: int) -> IndexArray:
    """Slice that each output slice copies: SciPy's own choice at the coordinates of nnU-Net's separate-z resampling."""
    if n_in == n_out:
        return np.arange(n_in)
    coordinates = float(n_in) / n_out * (np.arange(n_out) + 0.5) - 0.5
    nearest: IndexArray = ndimage.map_coordinates(np.arange(n_in), [coordinates], order=0, mode="nearest")
    return nearest


def _taps(n_in: int, n_out: int) -> _Taps:
    """Cubic B-spline weights at ``(o + 0.5) * (n_in / n_out) - 0.5``, which scipy.ndimage does not clamp here."""
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5 + _PAD
    right = centre - np.floor(centre)
    left = 1.0 - right
    w0 = left * left * left / 6.0
    w1 = (right * right * (right - 2.0) * 3.0 + 4.0) / 6.0
    w2 = (left * left * (left - 2.0) * 3.0 + 4.0) / 6.0
    w3 = 1.0 - w0 - w1 - w2
    return _Taps(np.floor(centre).astype(np.intp) - 1, np.stack([w0, w1, w2, w3]))


@jit
def _start_forward(lines: Any, source: IndexArray, pole_power: float, state: Float64Array) -> None:
    """Set `state` to the first value of the forward recursion of every line, the signal being mirrored at its ends.

    `lines` has shape (positions, lines); position i of the signal is ``lines[source[i]]``. SciPy sums in place, so the
    mirror image of the last position is the sum itself.
    """
    end = source.size - 1
    first, last = lines[source[0]], lines[source[end]]
    for j in range(state.size):
        state[j] = first[j] * _GAIN + pole_power * (last[j] * _GAIN)
    factor = _POLE
    for i in range(1, end):
        here, mirrored = lines[source[i]], lines[source[end - i]]
        for j in range(state.size):
            state[j] += factor * (here[j] * _GAIN + pole_power * (mirrored[j] * _GAIN))
        factor *= _POLE
    for j in range(state.size):
        state[j] += factor * (last[j] * _GAIN + pole_power * state[j])
        state[j] = state[j] * (_POLE / (1.0 - pole_power * pole_power)) + first[j] * _GAIN


@jit
def _keep_states(lines: Any, source: IndexArray, pole_power: float, depth: int, kept: Float64Array) -> None:
    """Run forward over `lines`, shape (planes, lines), and copy the state at every depth-th position into `kept`."""
    state = np.empty(lines.shape[1])
    _start_forward(lines, source, pole_power, state)
    kept[0] = state
    for i in range(1, (kept.shape[0] - 1) * depth + 1):
        line = lines[source[i]]
        for j in range(state.size):
            state[j] = line[j] * _GAIN + _POLE * state[j]
        if i % depth == 0:
            kept[i // depth] = state


@jit
def _filter_axis_0(
    block: Float32Array, source: IndexArray, kept: Float64Array, behind: Float64Array, last: bool, out: Float64Array
) -> None:
    """Filter one slab along axis 0 into `out`, shape (positions, rows, columns), row by row.

    `kept` is the forward state at the first position; `behind` is the finished plane after the last position (not read
    in the last slab), and receives the first plane of this slab.
    """
    for row in range(out.shape[1]):
        out[0, row] = kept[row]
        for i in range(1, out.shape[0]):
            for j in range(out.shape[2]):
                out[i, row, j] = block[source[i], row, j] * _GAIN + _POLE * out[i - 1, row, j]
        end = out.shape[0] - 1
        if last:
            for j in range(out.shape[2]):
                out[end, row, j] *= _LAST_FACTOR
        else:
            for j in range(out.shape[2]):
                out[end, row, j] = _POLE * (behind[row, j] - out[end, row, j])
        for i in range(end - 1, -1, -1):
            for j in range(out.shape[2]):
                out[i, row, j] = _POLE * (out[i + 1, row, j] - out[i, row, j])
        behind[row] = out[0, row]


@jit
def _filter_lines(lines: Float64Array, source: IndexArray, pole_power: float, state: Float64Array) -> None:
    """Filter `lines`, shape (positions, lines), along axis 0 in place; `source` is the identity, `state` scratch."""
    _start_forward(lines, source, pole_power, state)
    lines[0] = state
    end = lines.shape[0] - 1
    for i in range(1, end + 1):
        for j in range(state.size):
            lines[i, j] = lines[i, j] * _GAIN + _POLE * lines[i - 1, j]
    for j in range(state.size):
        lines[end, j] *= _LAST_FACTOR
    for i in range(end - 1, -1, -1):
        for j in range(state.size):
            lines[i, j] = _POLE * (lines[i + 1, j] - lines[i, j])


@jit
def _filter_planes(planes: Float64Array, power_1: float, power_2: float, begin: int, end: int) -> None:
    """Pad planes [begin, end) with their edge values and filter them along axis 1, then 2, in place."""
    rows, columns = planes.shape[1], planes.shape[2]
    positions = np.arange(max(rows, columns))
    state = np.empty(max(_COLUMN_STRIP, _ROW_STRIP))
    scratch = np.empty((columns, _ROW_STRIP))
    for plane in planes[begin:end]:
        for i in range(_PAD):
            plane[i] = plane[_PAD]
            plane[rows - 1 - i] = plane[rows - 1 - _PAD]
        for left in range(_PAD, columns - _PAD, _COLUMN_STRIP):
            right = min(left + _COLUMN_STRIP, columns - _PAD)
            _filter_lines(plane[:, left:right], positions[:rows], power_1, state[: right - left])
        for top in range(0, rows, _ROW_STRIP):
            count = min(_ROW_STRIP, rows - top)
            strip = scratch[:, :count]
            for r in range(count):
                for j in range(columns):
                    strip[j, r] = plane[top + r, min(max(j, _PAD), columns - _PAD - 1)]
            _filter_lines(strip, positions[:columns], power_2, state[:count])
            for r in range(count):
                for j in range(columns):
                    plane[top + r, j] = strip[j, r]


@jit
def _gather_row(planes: Float64Array, row: int, weights: Float64Array, first: IndexArray, out: Float64Array) -> None:
    """Put the coefficients of one row, times their weight along axis 0, where the output columns need them.

    `out` has shape (taps, 4, columns): tap along axis 0, tap along axis 2, output column.
    """
    for k in range(out.shape[0]):
        line = planes[k, row]
        for j in range(first.size):
            at = first[j]
            out[k, 0, j] = line[at] * weights[k]
            out[k, 1, j] = line[at + 1] * weights[k]
            out[k, 2, j] = line[at + 2] * weights[k]
            out[k, 3, j] = line[at + 3] * weights[k]


@jit
def _write_rows(
    planes: Float64Array,
    taps_0: _Taps,
    taps_1: _Taps,
    taps_2: _Taps,
    low: float,
    high: float,
    out: Float32Array,
    begin: int,
    end: int,
) -> None:
    """Interpolate blocks [begin, end) of `out`: ``_ROW_BLOCK`` rows of a plane each, counted in C order."""
    rows, columns = out.shape[1], out.shape[2]
    blocks = (rows + _ROW_BLOCK - 1) // _ROW_BLOCK
    count = taps_0.weights.shape[0]
    gathered = np.empty((4, count, 4, columns))  # ring of four rows
    w = taps_2.weights
    total = np.empty(columns)
    for block in range(begin, end):
        o0 = block // blocks
        top = block % blocks * _ROW_BLOCK
        support = planes[taps_0.first[o0] : taps_0.first[o0] + count]
        ready = taps_1.first[top]
        for o1 in range(top, min(top + _ROW_BLOCK, rows)):
            first = taps_1.first[o1]
            for row in range(max(ready, first), first + 4):
                _gather_row(support, row, taps_0.weights[:, o0], taps_2.first, gathered[row % 4])
            ready = first + 4
            total[:] = 0.0
            for k0 in range(count):
                for k1 in range(4):
                    w1 = taps_1.weights[k1, o1]
                    c = gathered[(first + k1) % 4, k0]
                    for j in range(columns):
                        t = total[j] + c[0, j] * w1 * w[0, j]
                        t += c[1, j] * w1 * w[1, j]
                        t += c[2, j] * w1 * w[2, j]
                        total[j] = t + c[3, j] * w1 * w[3, j]
            for j in range(columns):
                t = min(max(total[j], low), high) if total[j] == total[j] else total[j]
                out[o0, o1, j] = t
