"""Numpy's float32 ``mean()`` and ``std()`` of a volume that never exists as a whole, bit for bit.

A float32 sum depends on its order, so numpy's is kept: each chunk that numpy's iterator hands to its loop is summed in
pairs, and the chunks one after another. What a chunk is was found by experiment with numpy 1.24 to 2.4;
`matches_numpy` tells whether it holds for the one installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.types import Shape3

#: Gives the values of a volume in the order of memory, whenever it is called: arrays of any shape, size and dtype.
#: One may be overwritten when the next is asked for.
Pieces = Callable[[], Iterable[NDArray[Any]]]
_Chunks = Callable[[list[int]], Iterator[int]]

#: Values summed by one call of numpy: they stay in the processor's cache between operations.
_LEAF = 2**16


def mean_and_deviation(
    pieces: Pieces, shape: Shape3, is_cropped: tuple[bool, bool] = (False, False)
) -> tuple[np.float32, np.float32]:
    """Return numpy's ``mean()`` and ``std()`` of a volume of float32; to be asked only where `matches_numpy`.

    The order of numpy's sums is that of memory, so it is the same for any transposition of the volume.

    Parameters
    ----------
    pieces : callable
        Gives the values of the (cropped) volume, slowest axis of memory first, as in `Pieces`; they are cast to float32
        as nnU-Net casts. It is called twice.
    shape : int, 3
        (z, y, x), slowest axis of memory first. Of masked values, which numpy copies, it is (1, 1, their number).
    is_cropped : bool, 2
        Whether the y and x axes are shorter than those of the contiguous array that numpy would see a part of.

    Returns
    -------
    mean, deviation : float32

    Raises
    ------
    ValueError
        If the pieces hold more values, or fewer, than the shape.
    """
    chunks = _chunks_of_numpy()
    if chunks is None:
        raise ValueError("numpy's order of summation is unknown")
    return _mean_and_deviation(pieces, shape, is_cropped, chunks)


def extremes(pieces: Pieces) -> tuple[np.float32, np.float32]:
    """Return numpy's ``min()`` and ``max()`` of values that are cast to float32; not the sign of a zero.

    Parameters
    ----------
    pieces : callable
        As in `Pieces`, at least one value; called once.

    Returns
    -------
    least, greatest : float32
        Both NaN if any value is.
    """
    least, greatest = np.float32(np.inf), np.float32(-np.inf)
    for piece in pieces():
        if piece.size:
            # rounding to float32 keeps the order of values
            least = np.minimum(least, np.float32(piece.min()))
            greatest = np.maximum(greatest, np.float32(piece.max()))
    return least, greatest


def matches_numpy() -> bool:
    """Whether the order of the installed numpy's sums is known, found by small arrays of each kind, once."""
    return _chunks_of_numpy() is not None


def _mean_and_deviation(
    pieces: Pieces, shape: Shape3, is_cropped: tuple[bool, bool], chunks: _Chunks
) -> tuple[np.float32, np.float32]:
    n = np.intp(prod(shape))
    if not n:
        nothing = np.empty(0, np.float32)
        return nothing.mean(), nothing.std()
    total = _sum(_Values(pieces()), chunks(_runs(shape, is_cropped)))
    # numpy divides a number for the mean and an array for the deviation: before numpy 2 these round differently
    centre = np.full(1, total)
    np.true_divide(centre, n, out=centre, casting="unsafe")
    variance = np.float32(_sum(_Values(pieces(), centre), chunks([int(n)])) / n)
    return np.float32(total / n), np.float32(np.sqrt(variance))


class _Values:
    """The values of pieces in runs of any length, as float32; with a centre, the squares of their distances from it."""

    def __init__(self, pieces: Iterable[NDArray[Any]], centre: NDArray[np.float32] | None = None) -> None:
        self.pieces = iter(pieces)
        self.centre = centre
        self.piece: NDArray[Any] = np.empty(0, np.float32)
        self.buffer = np.empty(_LEAF, np.float32)

    def take(self, n: int) -> NDArray[np.float32]:
        """Return the next `n` values, at most a leaf, contiguous; they last until the next call."""
        out = self.buffer[:n]
        if n <= len(self.piece) and self.piece.dtype == np.float32:
            values, self.piece = self.piece[:n], self.piece[n:]
        else:
            values = self._gather(out)
        if self.centre is not None:
            values = np.square(np.subtract(values, self.centre, out=out), out=out)
        return values

    def _gather(self, out: NDArray[np.float32]) -> NDArray[np.float32]:
        filled = 0
        while filled < len(out):
            if not self.has_more():
                raise ValueError("the pieces hold fewer values than the shape")
            part = self.piece[: len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, self.piece = filled + len(part), self.piece[len(part) :]
        return out

    def has_more(self) -> bool:
        """Whether values are left; gets the next piece that has any."""
        while not len(self.piece):
            piece = next(self.pieces, None)
            if piece is None:
                return False
            self.piece = piece.reshape(-1)
        return True


def _sum(values: _Values, chunks: Iterable[int]) -> np.float32:
    total = np.float32(0)
    for n in chunks:
        total = total + _pairwise(values, n)
    if values.has_more():
        raise ValueError("the pieces hold more values than the shape")
    return total


def _pairwise(values: _Values, n: int) -> np.float32:
    """Sum the next `n` values by numpy's tree, of which a leaf is a whole branch."""
    if n <= _LEAF:
        leaf: np.float32 = np.add.reduce(values.take(n))
        return leaf
    half = n // 2
    half -= half % 8
    left = _pairwise(values, half)
    return left + _pairwise(values, n - half)


def _runs(shape: Shape3, is_cropped: tuple[bool, bool]) -> list[int]:
    """Lengths of the axes as numpy's iterator walks them, fastest first: none of length 1, none where one would do."""
    z, y, x = shape
    row = x + is_cropped[1]
    plane = row * (y + is_cropped[0])
    runs: list[int] = []
    end = 0
    for n, stride in ((x, 1), (y, row), (z, plane)):
        if n == 1:
            continue
        if stride == end:
            runs[-1] *= n
        else:
            runs.append(n)
        end = n * stride
    return runs or [1]


def _chunks_by_axes(runs: list[int]) -> Iterator[int]:
    """Numpy 2.3 and later: as many axes as its buffer holds, as often as it holds them, within the next axis."""
    core, *outer = runs
    while outer and core * outer[0] <= np.getbufsize():
        core *= outer.pop(0)
    within = core * (outer.pop(0) if outer else 1)
    size = max(1, np.getbufsize() // core) * core
    return (min(size, within - i) for _ in range(prod(outer)) for i in range(0, within, size))


def _chunks_of_buffer(runs: list[int]) -> Iterator[int]:
    """Numpy before 2.3: as much as its buffer holds, of a contiguous array too."""
    n, size = prod(runs), np.getbufsize()
    return (min(size, n - i) for i in range(0, n, size))


#: Shapes, by which of y and x are cropped: every way in which axes run together, below and above numpy's buffer.
_KINDS: dict[tuple[bool, bool], list[Shape3]] = {
    (False, False): [(1, 1, 137), (3, 100, 667)],
    (False, True): [(30, 30, 40), (350, 1, 60)],
    (True, False): [(30, 30, 40), (4, 100, 90)],
    (True, True): [(30, 30, 40), (4, 100, 90), (2, 3, 9001), (50, 700, 1)],
}


@cache
def _chunks_of_numpy() -> _Chunks | None:
    for chunks in (_chunks_by_axes, _chunks_of_buffer):
        if all(_is_same(shape, kind, chunks) for kind, shapes in _KINDS.items() for shape in shapes):
            return chunks
    return None


def _is_same(shape: Shape3, is_cropped: tuple[bool, bool], chunks: _Chunks) -> bool:
    z, y, x = shape
    random = np.random.default_rng(0)
    whole = random.normal(0, 1000, (z, y + is_cropped[0], x + is_cropped[1])).astype(np.float32)
    part = whole[:, :y, :x]
    # what is left of the sum is its rounding, which another order changes
    part[-1, -1, -1] -= part.sum(dtype=np.float64)
    ours = _mean_and_deviation(lambda: [part], shape, is_cropped, chunks)
    return ours == (part.mean(), part.std())
