"""Telling that memory could not be had from every other error."""

from __future__ import annotations

import torch

from nnunet_lowmem.errors import LowMemError
from nnunet_lowmem.types import Place

# torch raises a bare RuntimeError where the C library has no memory for a CPU tensor
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory could not be had; no other RuntimeError is one, nor what is left when every step is taken."""
    out = isinstance(error, torch.cuda.OutOfMemoryError) or is_about_ram(error)
    return out and not isinstance(error, LowMemError)


def is_about_ram(error: BaseException) -> bool:
    """Tell whether it was RAM and not the device's memory."""
    return isinstance(error, MemoryError) or (type(error) is RuntimeError and _CPU_ALLOCATOR in str(error))


def error_of(place: Place) -> type[Exception]:
    """Return what is raised where memory cannot be had."""
    return torch.cuda.OutOfMemoryError if place is Place.VRAM else MemoryError
