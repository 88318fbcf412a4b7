"""How much memory a network needs for one tile: bounded without computing anything, then measured on the first tile.

For the bound a copy runs on torch's ``meta`` device, where tensors have shapes but no data, under a dispatch mode that
counts the bytes of the tensors alive. What a backend takes beside its tensors (convolution scratch, reordered copies)
is not seen, and enters as a factor until a tile has been measured.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_lowmem.network.known import is_known
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.memory_held import PeakSampler, status_bytes

# oneDNN keeps a reordered copy of the input or output of a convolution beside the tensors
_SCRATCH_FACTOR = 2.0
# between runs of one tile and between processes, at most 3 MiB were seen
_MARGIN_BYTES = 8 * 2**20
# more than any machine has
_ANYTHING = 2**50
# the kernel's name of the largest resident size
_PEAK = b"VmHWM:"
# between two samples where there is no such record
_SAMPLE_S = 0.002

_logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """What was taken beside what was in use.

    Attributes
    ----------
    size_bytes : int
    is_peak : bool
        False where the highest of samples had to stand in: what came and went between two of them was missed.
    """

    size_bytes: int
    is_peak: bool = True

    def with_more(self, size_bytes: int) -> Taken:
        """Return it with so much more, unless nothing was seen."""
        return replace(self, size_bytes=self.size_bytes and self.size_bytes + size_bytes)


@dataclass(frozen=True)
class TileBytes:
    """What a network takes for one tile.

    Attributes
    ----------
    certain : int
        At the least; all, once a tile has been measured.
    uncertain : int
        What it may take beyond that.
    """

    certain: int
    uncertain: int = 0

    @classmethod
    def bounded(
        cls, network: Any, tile_shape: tuple[int, ...], copied_channels: int, dtype: torch.dtype = torch.float32
    ) -> TileBytes:
        """Before anything is measured: the tensors, those that mirroring keeps included, and scratch beside them."""
        tensors = tensor_bytes(network, tile_shape, dtype)
        if tensors is None:
            return cls(0, _ANYTHING)
        tensors += copied_channels * math.prod(tile_shape[2:]) * 4
        return cls(tensors, int((_SCRATCH_FACTOR - 1) * tensors))

    def after(self, taken: Taken | None) -> TileBytes:
        """After a tile has been measured, or where none can be; then, and beside samples, what was expected holds."""
        expected = self.certain if self.uncertain == _ANYTHING else self.certain + self.uncertain
        if taken is None or not taken.size_bytes:
            return TileBytes(expected)
        return TileBytes(max(self.certain if taken.is_peak else expected, taken.size_bytes))

    def with_margin(self) -> TileBytes:
        """For a number that is told and has to hold in another process, with other voxels: runs differ by a few MiB."""
        return TileBytes(self.certain + self.certain // 10 + _MARGIN_BYTES, self.uncertain)


class LiveTensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the bytes of tensors that are made inside the mode and still alive.

    Attributes
    ----------
    live_bytes, peak_bytes : int
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        size_bytes = tensor.numel() * tensor.element_size()
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(tensor, self._release, size_bytes).atexit = False

    def _release(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes


def tensor_bytes(network: Any, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int | None:
    """Peak bytes of the tensors of one forward pass, output included; None where only running the network would tell.

    Nobody sees the run that finds it: it is made on a copy without weights, in a thread of its own, which has none of
    the caller's modes, and only of networks whose code is all known, without the hooks of others.

    Parameters
    ----------
    network : Module
        Or whatever a client has put in its place. Not changed; its weights are not copied.
    input_shape : int
        (1, channels, *patch_size)
    dtype : dtype
        Of the input.
    """
    if not is_known(network):
        return None

    def run() -> int:
        shadow = meta_copy(network)
        counter = LiveTensorBytes()
        with torch.inference_mode(), counter:
            shadow(torch.empty(input_shape, dtype=dtype, device="meta"))
        return counter.peak_bytes

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(run).result()
        except Exception as error:  # whatever a layer meets there: no bound, and the first tile is measured
            _logger.debug("the network cannot be run without data: %s: %s", type(error).__name__, error)
            return None


def measured(run: Callable[[], T], device: torch.device) -> tuple[T, Taken]:
    """Return ``run()`` and the peak of the memory that it took beside what was in use, on the CPU as resident memory.

    oneDNN's scratch and reordered copies are in it, which tensors do not show.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, Taken(max(0, torch.cuda.max_memory_reserved(device) - before))
    return_freed_memory()
    start = _reset_peak()
    if start is None:
        return _sampled(run)
    result = run()
    return result, Taken(max(0, (status_bytes(_PEAK) or start) - start))


def _sampled(run: Callable[[], T]) -> tuple[T, Taken]:
    """As `measured` where the system keeps no peak that can be set back."""
    with PeakSampler(_SAMPLE_S, descendants=False) as sampler:
        before = sampler.held_bytes
        result = run()
    return result, Taken(sampler.peak_bytes() - before, is_peak=False)


def warm_up(dimensions: int) -> None:
    """Let torch's convolutions take what they take once and for all, so that it counts as reserved."""
    image, kernel = (
        torch.zeros((batch, 8, *[size] * dimensions), dtype=torch.float32, device="cpu")
        for batch, size in ((1, 16), (8, 3))
    )
    with torch.inference_mode():
        (nn.functional.conv3d if dimensions == 3 else nn.functional.conv2d)(image, kernel)


def _reset_peak() -> int | None:
    """Set the kernel's record of the largest resident size back; return the present size, None where it keeps none."""
    if status_bytes(_PEAK) is None:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return status_bytes(b"VmRSS:")


def meta_copy(network: nn.Module, with_hooks: bool = False) -> nn.Module:
    """Return a copy to run on the meta device, without the hooks of others unless asked; weights are not copied."""
    return _copy(network, partial(torch.empty_like, device="meta"), with_hooks)


def copy_of_zeros(network: Any, device: torch.device, room_bytes: int) -> nn.Module | None:
    """Return a copy to run on `device`, without the hooks of others, whose weights are zeros.

    None where its weights take more than `room_bytes`, or where others might see the copy run: the code of a network
    that has weights of its own is not all known.
    """
    if not isinstance(network, nn.Module) or weight_bytes(network) > room_bytes:
        return None
    if not any(weight.is_meta for weight in network.parameters()) and not is_known(network):
        return None
    try:
        return _copy(network, partial(torch.zeros_like, device=device))
    except Exception as error:  # whatever a stranger's network holds that cannot be copied
        _logger.debug("the network cannot be copied: %s: %s", type(error).__name__, error)
        return None


def _copy(network: nn.Module, make: Callable[[torch.Tensor], torch.Tensor], with_hooks: bool = False) -> nn.Module:
    """Copy a network by way of a memo that has other parameters and buffers, and no hooks."""
    memo: dict[int, Any] = {id(p): nn.Parameter(make(p.data), requires_grad=False) for p in network.parameters()}
    memo.update({id(buffer): make(buffer) for buffer in network.buffers()})
    for module in () if with_hooks else network.modules():
        memo.update({id(value): OrderedDict() for name, value in vars(module).items() if name.endswith("_hooks")})
    return copy.deepcopy(network, memo).eval()


def weight_bytes(network: Any, unless_on: torch.device | None = None) -> int:
    """Bytes of the parameters and buffers, but for those that are on a device of that type; 0 of what is no Module."""
    tensors = (*network.parameters(), *network.buffers()) if isinstance(network, nn.Module) else ()
    there = None if unless_on is None else unless_on.type
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != there)


def storage_users(tensor: torch.Tensor) -> int:
    """Count the tensors that use a tensor's memory, arrays of numpy among them; 0 where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()  # counts as one more
    return 0 if count is None else count(storage._cdata) - 1
