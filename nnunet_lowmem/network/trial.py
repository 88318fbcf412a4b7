"""Which arithmetic a network is run in, found by running one tile both ways: bfloat16 has to be faster, and right.

No name of a processor tells that. Where the hardware does not multiply bfloat16 a convolution may take twenty times as
long, and there have been versions of oneDNN that gave wrong numbers for some shapes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.network.fast_network import FastNetwork, output_of

#: It has to be so many times faster.
LEAST_GAIN = 1.2
#: Its logits differ by at most so much of their norm, and its labels in so many voxels.
MOST_ERROR = 0.05
LEAST_SAME = 0.98
# on a part of a tile that is so many times slower, it is not run on a whole one
_HOPELESS = 2.0
_BLOCK_VOXELS = 1 << 16


@dataclass(frozen=True)
class Trial:
    """What one tile took in float32 and in bfloat16, and how far its logits are apart.

    Attributes
    ----------
    single_s, half_s : float or None
        Seconds of a whole tile, or of the part that was hopelessly slow; None where there was room for a part alone.
    error : float or None
        Norm of the difference over the norm of the logits, infinite where some are no numbers; None unless compared.
    same : float or None
        Share of voxels that have the same label.
    whole : bool
        Whether it was a whole tile.
    """

    single_s: float | None
    half_s: float | None
    error: float | None = None
    same: float | None = None
    whole: bool = True

    @property
    def chooses(self) -> bool:
        """Whether bfloat16 is taken."""
        return not self.objection()

    def objection(self) -> str:
        """Say what is against bfloat16; empty where nothing is."""
        if self.single_s is not None and self.half_s is not None and self.half_s * LEAST_GAIN > self.single_s:
            return f"{self._what()} takes {self._times()}; it has to be {LEAST_GAIN} times faster"
        if self.error is None or self.same is None:
            return "there is no room to compare it with float32"
        if not self.error <= MOST_ERROR:
            return f"its logits differ by {self.error:.1%} of their norm; {MOST_ERROR:.0%} are allowed"
        if not self.same >= LEAST_SAME:
            return f"{1 - self.same:.1%} of a tile's voxels get another label; {1 - LEAST_SAME:.0%} are allowed"
        return ""

    def in_words(self) -> str:
        """Say in one line what was chosen, and why."""
        if objection := self.objection():
            return f"not chosen, the network runs in float32: {objection}"
        took = (
            "there is no room for a tile in float32" if self.half_s is None else f"{self._what()} takes {self._times()}"
        )
        labels = f"the labels in {1 - (self.same or 0):.2%} of its voxels"
        return f"chosen: {took}; its logits differ by {self.error:.1%}, {labels}"

    def _what(self) -> str:
        return "a tile" if self.whole else "a part of a tile"

    def _times(self) -> str:
        return f"{self.half_s:.2f} s instead of {self.single_s:.2f} s in float32"

    def as_json(self) -> dict[str, Any]:
        """Return plain data, of which ``Trial(**data)`` is the same again."""
        return asdict(self)


def try_both(single: FastNetwork, half: FastNetwork, tile: torch.Tensor, *, ranked: bool, has_room: bool) -> Trial:
    """Run a tile in float32 and in bfloat16.

    Parameters
    ----------
    single, half : FastNetwork
        Of the same network, with their threads.
    tile : float32, shape (1, channels, *patch_size)
    ranked : bool
        The largest logit tells the label; else each tells of a region by its sign.
    has_room : bool
        For the whole tile in float32; else a part of it is compared.
    """
    for part in _parts(half, tile, 4, 2):  # what is done once, at first, is done on the smaller ones
        single_s, _ = _timed(single, part)
        half_s, _ = _timed(half, part)
        single_s, _ = _timed(single, part)
        half_s, _ = _timed(half, part)
        if half_s > _HOPELESS * single_s:
            return Trial(single_s, half_s, whole=False)
        break
    if not has_room:
        for part in _parts(half, tile, 2, 4):
            compared = _compared(single, _timed(single, part)[1], _timed(half, part)[1], ranked)
            return Trial(None, None, *compared, whole=False)
        return Trial(None, None, whole=False)
    single_s, expected = _timed(single, tile)
    half_s, found = _timed(half, tile)
    return Trial(single_s, half_s, *_compared(single, expected, found, ranked))


def is_unknown_to_torch(error: Exception) -> bool:
    """Whether torch has no layer of that kind for bfloat16."""
    return isinstance(error, NotImplementedError) or "not implemented for 'BFloat16'" in str(error)


def _timed(network: FastNetwork, tile: torch.Tensor) -> tuple[float, torch.Tensor]:
    start_s = time.perf_counter()
    features = network.features(tile, ())
    return time.perf_counter() - start_s, features


def _parts(network: FastNetwork, tile: torch.Tensor, *shares: int) -> Iterator[torch.Tensor]:
    """Give the middle of a tile, one in so many of its sides, as far as the network takes tiles of that shape."""
    for share in shares:
        for multiple in (1, 2, 4, 8, 16, 32):
            sides = [min(size, -(-size // share // multiple) * multiple) for size in tile.shape[2:]]
            shape = (*tile.shape[:2], *sides)
            if shape == tuple(tile.shape) or min(sides) < 1:
                continue
            try:
                output_of(network.body, shape, network.input_dtype)
            except Exception:  # whatever a network says of a shape that it does not take
                continue
            part = tile
            for axis, side in enumerate(sides, start=2):
                part = part.narrow(axis, (tile.shape[axis] - side) // 2, side)
            yield part
            break


def _compared(network: FastNetwork, expected: torch.Tensor, found: torch.Tensor, ranked: bool) -> tuple[float, float]:
    """Return the norm of the difference over the norm of the logits, and the share of voxels of the same label.

    Logits are made for a block of voxels at a time.
    """
    head = network.head()
    squares = same = 0.0
    norm = 0.0
    rows = [features.movedim(1, -1).flatten(0, -2) for features in (expected, found)]
    for start in range(0, len(rows[0]), _BLOCK_VOXELS):
        blocks = [block[start : start + _BLOCK_VOXELS].float().numpy() for block in rows]
        logits = blocks if head is None else [block @ head.weights.T + head.bias for block in blocks]
        squares += float(np.square(logits[1] - logits[0], dtype=np.float64).sum())
        norm += float(np.square(logits[0], dtype=np.float64).sum())
        same += np.count_nonzero(_labels(logits[0], ranked) == _labels(logits[1], ranked))
    error = float(np.sqrt(squares / norm)) if norm else float(np.sqrt(squares))
    return error if np.isfinite(error) else float("inf"), same / len(rows[0])


def _labels(logits: NDArray[np.float32], ranked: bool) -> NDArray[Any]:
    """Return what tells labels apart: the largest head, or which regions there are."""
    if ranked:
        winners: NDArray[Any] = logits.argmax(axis=1)
        return winners
    regions = np.ascontiguousarray(np.packbits(logits > 0, axis=1))
    sets: NDArray[Any] = regions.view(f"V{regions.shape[1]}")[:, 0]
    return sets
