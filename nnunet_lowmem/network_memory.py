"""How much memory a network needs for one tile: measured in one run, or found without computing anything.

For the latter the network runs on torch's ``meta`` device, where tensors have shapes but no data, under a dispatch
mode that counts the bytes of the tensors alive. What a backend takes beside its tensors (convolution scratch, reordered
copies) is not seen and enters as a factor.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_lowmem.allocator import return_freed_memory

# oneDNN keeps a reordered copy of the input or output of a convolution beside the tensors
CPU_SCRATCH_FACTOR = 2.0


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


def activation_bytes(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Peak bytes of the tensors of one forward pass, output included, float32.

    Parameters
    ----------
    network : Module
        Not changed; its weights are not copied.
    input_shape : int
        (1, channels, *patch_size)
    """
    shadow = meta_copy(network)
    counter = LiveTensorBytes()
    with torch.inference_mode(), counter:
        shadow(torch.empty(input_shape, dtype=torch.float32, device="meta"))
    return counter.peak_bytes


def measured_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that `run` takes on top of what is in use, on the CPU as resident memory.

    oneDNN's scratch and reordered copies are in it, which tensors do not show. 0 where the system keeps no resettable
    peak, or the device has too little memory: the caller's estimate holds then.
    """
    if device.type == "cuda":
        try:
            run()  # cuDNN may look for its algorithms, which takes what it does not need afterwards
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
        except torch.cuda.OutOfMemoryError:
            return 0
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_reserved(device) - before)
    return_freed_memory()
    start = _reset_peak()
    run()
    return 0 if start is None else max(0, _resident("VmHWM:") - start)


def warm_up(dimensions: int) -> None:
    """Let torch's convolutions take what they take once and for all, so that it counts as reserved."""
    image, kernel = (
        torch.zeros((batch, 8, *[size] * dimensions), dtype=torch.float32, device="cpu")
        for batch, size in ((1, 16), (8, 3))
    )
    with torch.inference_mode():
        (nn.functional.conv3d if dimensions == 3 else nn.functional.conv2d)(image, kernel)


def _reset_peak() -> int | None:
    """Set the kernel's record of the largest resident size back; return the present size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS:")
    except (OSError, StopIteration):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def meta_copy(network: nn.Module) -> nn.Module:
    """Return a copy to run on the meta device; weights are not copied."""
    return copy.deepcopy(network, _meta_parameters(network)).eval()


def _meta_parameters(network: nn.Module) -> dict[int, Any]:
    """Memo for deepcopy that replaces every parameter and buffer by an empty one on the meta device."""
    make: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: torch.empty_like(tensor, device="meta")  # noqa: E731  # used twice
    memo: dict[int, Any] = {id(p): nn.Parameter(make(p.data), requires_grad=False) for p in network.parameters()}
    memo.update({id(buffer): make(buffer) for buffer in network.buffers()})
    return memo


def weight_bytes(network: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
