"""A simulated accelerator: tensors that say they are on CUDA and keep their data in RAM. It is no GPU.

The CPU computes, so nothing here tells of speed, of cuDNN's choices, or of what libraries take beside tensors. It shows

- *devices*: an operation on tensors of two devices fails, and so does reading one as a numpy array;
- *memory*: a tensor on the device counts until its last view is gone; beyond the capacity `torch.OutOfMemoryError` is
  raised, and nothing has changed;
- *waiting*: operations for which the host has to wait for the device are recorded;
- *sizes*: without data (on torch's meta device) tensors of any size are counted; all logits are finite then, and every
  voxel is on a boundary;
- *copies under way*: what leaves the device on its own is NaN or -1 on the host until its event has been waited for; to
  write page-locked memory from which the device still copies is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "masked_select", "equal", "_unique2", "bincount")


@dataclass(eq=False)
class Block:
    """Memory of the device; views share it."""

    device: SimulatedDevice


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device, `held` in RAM."""

    held: torch.Tensor
    block: Block

    @staticmethod
    def __new__(cls, held: torch.Tensor, block: Block) -> DeviceTensor:
        with torch.inference_mode(held.is_inference()):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CUDA
            )
        tensor.held, tensor.block = held, block
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held!r})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    # torch's own forms of what follows ask the driver for the device
    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return self.block.device.copy(self, source, non_blocking)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensors = [part for part in _parts(index) if isinstance(part, torch.Tensor)]
        if not tensors:
            return DeviceTensor(self.held[index], self.block)
        self.block.device.indexed(tensors)
        return self.block.device.allocated(self.held[tree_map(_held, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.block.device.indexed([part for part in (*_parts(index), value) if isinstance(part, torch.Tensor)])
        self.held[tree_map(_held, index)] = _held(value)

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the simulation")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nonzero, torch.Tensor.nonzero):  # one more that asks the driver
            return args[0].block.device.nonzero(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class Copy:
    """A copy under way between the device and page-locked memory."""

    host: torch.Tensor
    data: torch.Tensor
    arrives: bool


@dataclass
class Event:
    """Stands for `torch.cuda.Event`; waiting for it completes the copies begun before it was recorded."""

    device: SimulatedDevice
    copies: list[Copy] = field(default_factory=list)

    def record(self, stream: Any = None) -> None:
        self.copies = list(self.device.copies)

    def synchronize(self) -> None:
        self.device.complete(self.copies)


class SimulatedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The accelerator, as a mode; see the module's docstring.

    Attributes
    ----------
    live_bytes, peak_bytes : int
    waits : list of str
        Operations that made the host wait.
    may_not_wait : bool
        Such an operation is an error.
    """

    def __init__(self, capacity_bytes: int, with_data: bool) -> None:
        super().__init__()
        self.where = torch.device("cpu" if with_data else "meta")
        self.capacity_bytes = capacity_bytes
        self.allowed_bytes: float = 2**60
        self.live_bytes = self.peak_bytes = 0
        # with what is kept for the next tensors
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.waits: list[str] = []
        self.may_not_wait = False
        self.copies: list[Copy] = []
        self.pinned: dict[int, weakref.ref[torch.Tensor]] = {}
        self.locks_pages = True

    # -- dispatch

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name in ("to", "type_as"):  # in inference mode they come as they are
            with self:
                return func.decompose(*args, **kwargs)
        if name == "_to_copy":
            return self._to_copy(args[0], **kwargs)
        if name == "copy_":
            return self.copy(*args, **kwargs)
        if name == "_pin_memory":
            raise AssertionError("page-locked memory is allocated as such")
        device = kwargs.get("device")
        on_device = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)]
        if not on_device if device is None else torch.device(device).type != "cuda":
            pinned = kwargs.pop("pin_memory", False)
            if pinned and not self.locks_pages:
                raise RuntimeError("CUDA error: out of memory (simulated): no page could be locked")
            result = func(*tree_map(_held, args), **kwargs)
            if pinned:
                self._lock(result)
            return result
        self._check_devices(name, tree_leaves((args, kwargs)))
        if name in WAITS:
            self._wait(name)
        return self._compute(func, args, kwargs, on_device)

    def _compute(self, func: Any, args: Any, kwargs: Any, on_device: list[DeviceTensor]) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = self.where
        held = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if any(returned.alias_info is not None and returned.alias_info.is_write for returned in func._schema.returns):
            return kwargs.get("out", args[0])
        blocks = {tensor.held.untyped_storage()._cdata: tensor.block for tensor in on_device}

        def wrapped(result: Any) -> Any:
            if not isinstance(result, torch.Tensor):
                return result
            block = blocks.get(result.untyped_storage()._cdata)
            return self.allocated(result) if block is None else DeviceTensor(result, block)

        return tree_map(wrapped, held)

    def _check_devices(self, name: str, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor) and leaf.ndim > 0:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device")

    def indexed(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note what indexing with these takes: the host has to count the voxels of a mask."""
        self._check_devices("index", tensors)
        if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors):
            self._wait("index with a mask")

    def nonzero(self, tensor: DeviceTensor) -> torch.Tensor:
        """Positions of what is true; without data, all there are."""
        self._wait("nonzero")
        if self.where.type == "cpu":
            return self.allocated(torch.nonzero(tensor.held))
        return self.allocated(torch.empty((tensor.numel(), tensor.ndim), dtype=torch.int64, device=self.where))

    # -- memory

    def allocated(self, held: torch.Tensor) -> DeviceTensor:
        size_bytes = held.untyped_storage().nbytes()
        if self.live_bytes + size_bytes > min(self.capacity_bytes, self.allowed_bytes):
            raise torch.OutOfMemoryError(f"CUDA out of memory (simulated). Tried to allocate {size_bytes} bytes")
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.reserved_bytes = max(self.reserved_bytes, self.live_bytes)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(self)
        weakref.finalize(block, self._release, size_bytes).atexit = False
        return DeviceTensor(held, block)

    def _release(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes

    def empty_cache(self) -> None:
        """Give back what is kept of tensors that are gone."""
        self.reserved_bytes = self.live_bytes

    def reset_peaks(self) -> None:
        self.peak_bytes, self.peak_reserved_bytes = self.live_bytes, self.reserved_bytes

    def limit(self, share: float, total_bytes: int, number: int) -> None:
        """Let torch allocate no more than a share; as in torch, the device is meant by its number."""
        assert isinstance(number, int)
        self.empty_cache()
        self.allowed_bytes = share * total_bytes

    def _lock(self, tensor: torch.Tensor) -> None:
        self.pinned[tensor.untyped_storage().data_ptr()] = weakref.ref(tensor)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        owner = self.pinned.get(tensor.untyped_storage().data_ptr())
        return owner is not None and owner() is not None

    # -- copies

    def _wait(self, name: str) -> None:
        if self.may_not_wait:
            raise RuntimeError(f"called a synchronizing CUDA operation (simulated): {name}")
        self.waits.append(name)
        self.complete(self.copies)

    def complete(self, copies: Sequence[Copy]) -> None:
        """Let copies arrive."""
        for copy in [copy for copy in self.copies if copy in copies]:
            self.copies = [other for other in self.copies if other is not copy]
            if copy.data.is_meta:
                copy.host.zero_()
            elif copy.arrives:
                copy.host.copy_(copy.data)
            else:
                same = torch.equal(copy.host.contiguous().view(torch.uint8), copy.data.contiguous().view(torch.uint8))
                assert same, "page-locked memory was written while it was being copied from"

    def _to_copy(self, source: torch.Tensor, **options: Any) -> torch.Tensor:
        wanted = torch.device(options.pop("device", None) or source.device)
        non_blocking = options.pop("non_blocking", False)
        options.pop("pin_memory", None)
        crosses = (source.device.type, wanted.type)
        if crosses == ("cpu", "cuda"):
            self._leaving_host(source, non_blocking)
        elif crosses == ("cuda", "cpu"):
            self._wait("_to_copy to the host")
        held = _held(source)
        if held.is_meta and wanted.type == "cpu":
            return torch.ones(held.shape, dtype=options.get("dtype", held.dtype))
        held = torch.ops.aten._to_copy(held, device=self.where if wanted.type == "cuda" else wanted, **options)
        return self.allocated(held) if wanted.type == "cuda" else held

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        kinds = source.device.type, target.device.type
        if kinds == ("cuda", "cpu") and non_blocking and self._is_pinned(target):
            data = torch.ops.aten._to_copy(source.held, dtype=target.dtype)
            self.copies.append(Copy(target, data, arrives=True))
            target.fill_(float("nan") if target.is_floating_point() else -1)
            return target
        if kinds == ("cpu", "cuda"):
            self._leaving_host(source, non_blocking)
        elif kinds == ("cuda", "cpu"):
            self._wait("copy_ to the host")
        if self.where.type == "cpu" or isinstance(target, DeviceTensor):
            _held(target).copy_(_held(source))
        return target

    def _leaving_host(self, source: torch.Tensor, non_blocking: bool) -> None:
        if non_blocking and self._is_pinned(source):
            self.copies.append(Copy(source, source.clone(), arrives=False))
        elif source.ndim > 0:
            self._wait("copy from the host")


@contextmanager
def simulated_device(
    capacity_bytes: int = 2**40, said_bytes: int | None = None, with_data: bool = True
) -> Iterator[SimulatedDevice]:
    """Let torch have a CUDA device of so many bytes; its driver may say that it is larger.

    Make tensors there in inference mode only: torch's autograd asks the real driver.
    """
    simulated = SimulatedDevice(capacity_bytes, with_data)
    total = said_bytes or capacity_bytes
    simulated.allowed_bytes = total
    replacements = {
        "_lazy_init": lambda: None,
        "Event": lambda: Event(simulated),
        "current_stream": lambda device=None: None,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (total - simulated.reserved_bytes, total),
        "memory_reserved": lambda device=None: simulated.reserved_bytes,
        "max_memory_reserved": lambda device=None: simulated.peak_reserved_bytes,
        "reset_peak_memory_stats": lambda device=None: simulated.reset_peaks(),
        "synchronize": lambda device=None: simulated.complete(simulated.copies),
        "max_memory_allocated": lambda device=None: simulated.peak_bytes,
        "get_per_process_memory_fraction": lambda device=None: simulated.allowed_bytes / total,
        "set_per_process_memory_fraction": lambda share, device: simulated.limit(share, total, device),
        "set_sync_debug_mode": lambda mode: setattr(simulated, "may_not_wait", mode == "error"),
        "empty_cache": simulated.empty_cache,
    }
    compute_gaussian.cache_clear()
    with pytest.MonkeyPatch.context() as patch, simulated:
        # a module on its way to the device gets new parameters, of our class, and not new data in the old ones
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        for name, replacement in replacements.items():
            patch.setattr(torch.cuda, name, replacement)
        yield simulated
    compute_gaussian.cache_clear()


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value
