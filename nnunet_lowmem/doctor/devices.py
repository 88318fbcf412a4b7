"""What torch sees, and where compiled kernels are kept. Loads torch and numba: seconds, so it is asked last."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from platform import mac_ver

import torch

from nnunet_lowmem.doctor.environment import HIDING
from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import predictors
from nnunet_lowmem.options import variable
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system import compiler

_GIB = 2**30
_LITTLE_BYTES = 3 * _GIB


def findings() -> Iterator[Finding]:
    """Look at devices, at the cache of kernels, and at what our variables hold."""
    yield from _gpus()
    if torch.backends.mps.is_available():
        advice = "was not run on this device by its authors; compare with stock: nnunet-lowmem compare"
        yield Finding("MPS", Verdict.MIND, f"torch sees Apple's GPU, macOS {mac_ver()[0] or 'unknown'}", advice)
    yield _kernels()
    if not any(name.startswith(variable("")) for name in os.environ):
        return
    try:
        predictors.options(predictors.OWN.name, predictors.load(predictors.OWN.name))
    except UsageError as error:
        yield Finding("our variables", Verdict.FAILS, shown(str(error)), "unset it, or give it a value that it takes")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING:
            yield Finding("GPU", Verdict.FINE, "none is seen by torch, since CUDA_VISIBLE_DEVICES hides them")
            return
        has_driver = shutil.which("nvidia-smi") is not None or os.path.exists("/proc/driver/nvidia/version")
        if has_driver:
            cuda = torch.version.cuda
            built = f"torch {torch.__version__} is built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
            advice = "install torch for this driver: https://pytorch.org/get-started/locally"
            yield Finding("GPU", Verdict.MIND, f"there is an NVIDIA driver, but torch sees no GPU; {built}", advice)
        else:
            yield Finding("GPU", Verdict.FINE, "none is seen by torch: predictions run on the processor")
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)


def _gpu(number: int) -> Finding:
    about = f"GPU {number}"
    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        reason = shown(str(error).splitlines()[0])
        return Finding(about, Verdict.FAILS, f"does not answer: {reason}", "use another, or -device cpu")
    seen = f"{torch.cuda.get_device_name(number)}, {format_gib(free)} of {format_gib(total)} free"
    if free < _LITTLE_BYTES:
        return Finding(about, Verdict.MIND, seen, "end what else takes it, or use another card or -device cpu")
    return Finding(about, Verdict.FINE, seen)


def _kernels() -> Finding:
    about, advice = "compiled kernels", "every run compiles them again, some 20 s: set NUMBA_CACHE_DIR to a folder"
    folder = compiler.cache_folder()
    if folder is None:
        return Finding(about, Verdict.MIND, "there is no home folder to keep them in", advice)
    trial = folder / f"trial-{secrets.token_hex(8)}"
    try:
        compiler.keep(trial, b"written to see whether it can be\n")
        trial.unlink()
    except OSError as error:
        return Finding(about, Verdict.MIND, f"cannot be kept in {shown(str(folder))}: {error.strerror}", advice)
    return Finding(about, Verdict.FINE, f"kept in {shown(str(folder))}")
