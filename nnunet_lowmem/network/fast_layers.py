"""Layers that leave the channels last in memory: normalisation and activation in one pass, few channels by oneDNN."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nnunet_lowmem.network import kernels
from nnunet_lowmem.system.threads import RowThreads

#: The memory format that has channels last, by the number of axes of a tensor.
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_AVERAGES = (nn.AvgPool2d, nn.AvgPool3d)
NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
# sums are made of so many partial ones, whatever the number of threads: the result does not depend on it
_PARTS = 64
_FEW = 8
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's


def has_few_channels(layer: nn.Module | None) -> bool:
    """Whether a convolution is one that oneDNN is called for, in float32."""
    given: Any = layer
    return isinstance(layer, CONVOLUTIONS) and given.in_channels < _FEW and given.padding_mode == "zeros"


def use_fast_layers(sequence: nn.Sequential, threads: RowThreads, dtype: torch.dtype) -> None:
    """Replace normalisations with the leaky ReLUs right behind them, averages, and convolutions of few channels.

    In a sequence nobody else sees what is in between.
    """
    layers = [None, *sequence, None]
    for number, (before, layer, after) in enumerate(zip(layers, layers[1:], layers[2:], strict=False)):
        if isinstance(layer, NORMS) and not layer.track_running_stats:
            slope = 1.0
            if isinstance(after, nn.LeakyReLU):
                slope, sequence[number + 1] = after.negative_slope, nn.Identity()
            sequence[number] = FastNorm(layer, slope, isinstance(before, CONVOLUTIONS), threads)
        elif _is_plain_average(layer):
            sequence[number] = _Average(layer)
        elif has_few_channels(layer):
            sequence[number] = _FewChannels(layer, dtype)


class _Average(nn.Module):
    """Average pooling of windows that do not overlap, which torch has for no bfloat16: summed in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        window = _sides(self.layer.kernel_size, features.ndim - 2)
        if features.dtype != torch.bfloat16:
            return self.layer(features)  # type: ignore[no-any-return]  # torch's modules return anything
        pooled = [size // side for size, side in zip(features.shape[2:], window, strict=True)]
        shape = (*features.shape[:2], *pooled)
        last = LAST[features.ndim]
        total = torch.empty(shape, dtype=torch.float32, device=features.device, memory_format=last).zero_()
        for corner in product(*map(range, window)):
            part = features
            for axis, (first, side, size) in enumerate(zip(corner, window, pooled, strict=True), start=2):
                part = part.narrow(axis, first, features.shape[axis] - first)
                part = part[(slice(None),) * axis + (slice(None, size * side, side),)].narrow(axis, 0, size)
            total += part
        return total.div_(math.prod(window)).to(features.dtype)


def _sides(sizes: Any, axes: int) -> tuple[int, ...]:
    return (sizes,) * axes if isinstance(sizes, int) else tuple(sizes)


def _is_plain_average(layer: nn.Module | None) -> bool:
    """Whether windows lie side by side, without padding, and whole ones alone count."""
    given: Any = layer
    if not isinstance(layer, _AVERAGES):
        return False
    axes = 2 if isinstance(layer, nn.AvgPool2d) else 3
    sizes = [_sides(value, axes) for value in (given.kernel_size, given.stride, given.padding)]
    return sizes[0] == sizes[1] and not any(sizes[2]) and not given.ceil_mode and given.divisor_override is None


class _FewChannels(nn.Module):
    """A convolution by oneDNN, where torch would take a slower path and put the channels first.

    In float32, whatever is around it: rounding the image itself is a sixth of the error of a network in bfloat16.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer: Any = layer
        self._dtype = dtype

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        layer, tile = self.layer, tile.float()
        if tile.is_meta or isinstance(layer.padding, str) or not _HAS_ONEDNN:
            return layer(tile).to(self._dtype)  # type: ignore[no-any-return]  # torch's modules return anything
        shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
        convolved: torch.Tensor = torch.ops.aten.mkldnn_convolution(tile, layer.weight, layer.bias, *shape)
        return convolved.to(self._dtype)


def bits_of(numbers: torch.Tensor) -> NDArray[np.uint16]:
    """Return the bits of bfloat16 numbers in the same memory."""
    bits: NDArray[np.uint16] = numbers.view(torch.int16).numpy().view(np.uint16)
    return bits


class FastNorm(nn.Module):
    """Instance normalisation and what bends its output, channels last: of float32, or of the bits of bfloat16.

    Sums have double precision; those of bfloat16 are of the differences from one voxel, in short blocks of single
    precision.

    Parameters
    ----------
    norm : InstanceNorm
        Its weights stay float32.
    slope : float
        What negative values are multiplied with.
    in_place : bool
        Nobody else needs the input.
    threads : RowThreads
    """

    def __init__(self, norm: nn.Module, slope: float, in_place: bool, threads: RowThreads) -> None:
        super().__init__()
        self.norm: Any = norm
        self._slope = np.float32(slope)
        self._in_place = in_place
        self._threads = threads

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise every channel of every sample."""
        last = LAST[features.ndim]
        out = features.contiguous(memory_format=last) if self._in_place else features.clone(memory_format=last)
        if not out.is_meta:
            for sample in out.movedim(1, -1).detach():
                rows = sample.flatten(0, -2)
                if rows.dtype == torch.bfloat16:
                    self._normalise_bits(bits_of(rows))
                else:
                    self._normalise(rows.numpy())
        return out

    def _normalise(self, features: NDArray[np.float32]) -> None:
        sums = np.empty((_PARTS, 2, features.shape[1]))
        self._threads.run(kernels.channel_sums, _PARTS, features, sums)
        mean, square = sums.sum(axis=0) / len(features)
        arguments = (features, *self._scale_and_shift(mean, square - mean * mean), self._slope)
        self._threads.run(kernels.scale_and_bend, len(features), *arguments)

    def _normalise_bits(self, bits: NDArray[np.uint16]) -> None:
        sums = np.empty((_PARTS, 2, bits.shape[1]))
        first = (bits[0].astype(np.uint32) << 16).view(np.float32)
        self._threads.run(kernels.channel_sums_of_bits, _PARTS, bits, sums)
        mean, square = sums.sum(axis=0) / len(bits)
        variance = np.maximum(square - mean * mean, 0)  # a NaN stays one
        arguments = (bits, first, *self._scale_and_shift(mean, variance), self._slope)
        self._threads.run(kernels.scale_and_bend_bits, len(bits), *arguments)

    def _scale_and_shift(
        self, mean: NDArray[np.float64], variance: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scale = 1 / np.sqrt(variance + self.norm.eps)
        shift = -mean * scale
        if self.norm.affine:
            weight, bias = self.norm.weight.detach().numpy(), self.norm.bias.detach().numpy()
            scale, shift = scale * weight, shift * weight + bias
        return scale.astype(np.float32), shift.astype(np.float32)
