"""Host memory beside a device: copies that neither side waits for, and the event that says when one is done.

On CUDA the memory is page-locked, so that the device copies on its own, in the order of its stream. Beside any other
device, and where the system locks no more pages, it is ordinary memory, and a copy is done when the call returns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)


class HostBuffer:
    """Memory that one copy at a time goes through; whoever makes the buffer is its only user.

    Parameters
    ----------
    device : torch.device
        The other end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_its_own = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copied: torch.cuda.Event | None = None

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in this memory, not set to anything, once the copy before is done."""
        self.wait()
        size_bytes = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # what is made in inference mode could not be changed outside of it
            if self._memory.numel() < size_bytes:
                # both at once would be more than is planned
                self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
                self._memory = self._allocated(size_bytes)
            return self._memory[:size_bytes].view(dtype).view(*shape)

    def _allocated(self, size_bytes: int) -> torch.Tensor:
        if self._on_its_own:
            try:
                return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:  # limits of the system, which leave ordinary memory
                logger.warning("no page-locked memory of %d bytes, copies are waited for: %s", size_bytes, error)
                self._on_its_own = False
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device of a tensor in this memory."""
        sent = tensor.to(self._device, non_blocking=self._on_its_own)
        self._mark()
        return sent

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in this memory of a tensor on the device; it is there after `wait`."""
        received = self.room(tensor.shape, tensor.dtype)
        received.copy_(tensor, non_blocking=self._on_its_own)
        self._mark()
        return received

    def wait(self) -> None:
        """Wait until the copy under way is done."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _mark(self) -> None:
        if self._on_its_own:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._copied.record(torch.cuda.current_stream(self._device))
