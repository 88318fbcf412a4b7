"""What of this machine decides whether a prediction ends: memory, disks, processor. Loads no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.errors import LowMemError
from nnunet_lowmem.names import shown
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system import memory_limits, platform
from nnunet_lowmem.system.atomic_files import try_output
from nnunet_lowmem.volumes.selection import is_output_file
from nnunet_lowmem.volumes.spilling import spill_folder, why_nothing_is_spilled

_GIB = 2**30
# the libraries alone take some 0.5 GiB, the bundled model on a small scan 1.1
_HARDLY_ANY_BYTES, _LITTLE_BYTES = _GIB, 3 * _GIB
# a container's default is 64 MiB; one scan of 512 x 512 x 400 in float32 takes as much as this
_SMALL_SHM_BYTES = _GIB // 2
_SMALL_TMP_BYTES = 10 * _GIB
_TRIED_BYTES = 64 * 2**20
# below this a spilled window takes longer than to compute tiles twice
_SLOW_BYTES_PER_S = 100e6
# of libraries that are mapped and hardly used: torch alone takes more than 2 GiB
_ADDRESS_SPACE_BYTES = 4 * _GIB
_OTHER = {"temporary folder": "choose another: --tmp_dir DIR", "output folder": "choose another: -o FOLDER"}
_VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def findings(output: Path, tmp_dir: str | None) -> Iterator[Finding]:
    """Look at the machine.

    Parameters
    ----------
    output : Path
        Output folder, which need not exist.
    tmp_dir : str, optional
        Where arrays are to be spilled.
    """
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "RAM": _ram,
        "swap": _swap,
        "/dev/shm": _shared_memory,
        "temporary folder": lambda: _temporary(spill_folder(tmp_dir)),
        "output folder": lambda: _output(output),
        "cores": _cores,
        "processor": _processor,
    }
    for about, look in parts.items():
        try:
            yield from look()
        except (LowMemError, OSError) as error:  # what one part meets is no reason to leave out the others
            yield Finding(about, Verdict.FAILS, f"cannot be looked at: {_reason(error)}", _OTHER.get(about, ""))


def _ram() -> Iterator[Finding]:
    limits = memory_limits.ram_limits()
    tightest = min(limits, key=lambda limit: limit.free_bytes, default=None)
    if tightest is None:
        yield Finding("RAM", Verdict.MIND, "nothing here tells how much there is", "name a budget: --max_ram 8G")
        return
    free = tightest.free_bytes
    seen = f"{format_gib(free)} free; {tightest.in_words()} binds"
    if tightest.source != memory_limits.PHYSICAL and limits[0].source == memory_limits.PHYSICAL:
        seen += f" (the machine has {format_gib(limits[0].total_bytes)}, {format_gib(limits[0].free_bytes)} free)"
    least = _ADDRESS_SPACE_BYTES if tightest.source == "RLIMIT_AS" else _HARDLY_ANY_BYTES
    if free < least:
        yield Finding(
            "RAM", Verdict.FAILS, seen, f"more must be free: {tightest.raised_by(max(least, _LITTLE_BYTES) - free)}"
        )
    elif free < _LITTLE_BYTES:
        yield Finding("RAM", Verdict.MIND, seen, "large scans will be spilled to disk, or refused: see --estimate")
    else:
        yield Finding("RAM", Verdict.FINE, seen)


def _swap() -> Iterator[Finding]:
    swap = platform.by_psutil(psutil.swap_memory)
    if swap is not None and swap.total and swap.used > max(_GIB, swap.total // 4):
        seen = f"{format_gib(swap.used)} of {format_gib(swap.total)} in use: this machine swaps"
        yield Finding("swap", Verdict.MIND, seen, "end what takes the memory, or give a budget below what is free")


def _shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = memory_limits.free_disk_bytes(folder)
    seen = f"{format_gib(free)} free"
    if free < _SMALL_SHM_BYTES:
        advice = "stock's workers end in a bus error (docker run --shm-size=16g); this package does not use it"
        yield Finding("/dev/shm", Verdict.MIND, seen, advice)
    else:
        yield Finding("/dev/shm", Verdict.FINE, seen)


def _temporary(folder: Path) -> Iterator[Finding]:
    about, name = "temporary folder", shown(str(folder))
    if not os.path.isdir(folder):
        yield Finding(about, Verdict.FAILS, f"{name} is not there", _OTHER[about])
        return
    try:
        speed = _written_bytes_per_s(folder)
    except OSError as error:
        yield Finding(about, Verdict.FAILS, f"{name} cannot be written to: {_reason(error)}", _OTHER[about])
        return
    if why := why_nothing_is_spilled(folder):
        advice = "no arrays can be spilled: choose a folder on a disk, --tmp_dir DIR"
        yield Finding(about, Verdict.MIND, f"{name} {why}", advice)
        return
    free = memory_limits.free_disk_bytes(folder)
    seen = f"{name}, {format_gib(free)} free, writes {speed / 1e6:.0f} MB/s"
    if free < _SMALL_TMP_BYTES:
        advice = "large scans may not be spilled: make room, or choose another, --tmp_dir DIR"
        yield Finding(about, Verdict.MIND, seen, advice)
    elif speed < _SLOW_BYTES_PER_S:
        yield Finding(about, Verdict.MIND, seen, "spilling will be slow: choose a local disk, --tmp_dir DIR")
    else:
        yield Finding(about, Verdict.FINE, seen)


def _written_bytes_per_s(folder: Path) -> float:
    """Write a file without a name, to the disk itself."""
    import tempfile

    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        size = min(_TRIED_BYTES, memory_limits.free_disk_bytes(folder) // 4)
        since_s = time.perf_counter()
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(size, len(block)) / max(time.perf_counter() - since_s, 1e-9)


def _output(output: Path) -> Iterator[Finding]:
    about, name = "output folder", shown(str(output))
    there = output.parent if is_output_file(str(output)) else output
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield Finding(about, Verdict.FAILS, f"{shown(str(there))} is not a folder", _OTHER[about])
        return
    free = memory_limits.free_disk_bytes(there)
    seen = f"{name}, {format_gib(free)} free"
    try:
        try_output(there)
    except (LowMemError, OSError) as error:
        yield Finding(about, Verdict.FAILS, f"{name} cannot be written to: {_reason(error)}", _OTHER[about])
        return
    if free < _GIB:
        yield Finding(about, Verdict.MIND, seen, "make room, or choose another: -o FOLDER")
    else:
        yield Finding(about, Verdict.FINE, f"{seen}; files appear whole or not at all")


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else shown(str(error))


def _cores() -> Iterator[Finding]:
    usable, there = platform.usable_cores(), os.cpu_count() or 1
    seen = f"{usable} of {there} cores may be used"
    if usable < there:
        advice = (
            "torch starts as many threads as the machine has cores, at most nnUNet_def_n_proc (8), in stock as here, "
            "and "
            "they wait for one another: ask for more cores, or set that variable"
        )
        yield Finding("cores", Verdict.MIND, seen, advice)
    else:
        yield Finding("cores", Verdict.FINE, f"{usable} cores")


def _processor() -> Iterator[Finding]:
    told = platform.processor().split()
    found = [name for name in _VECTORS if name in told]
    if "amx_bf16" in found or "avx512_bf16" in found:
        yield Finding("processor", Verdict.FINE, f"{', '.join(found)}: --fast bfloat16 may be worth a trial")
    elif not found and any(name in told for name in ("sse2", "ssse3")):
        advice = "the network is slow here; --fast helps a little, a GPU or another machine a lot"
        yield Finding("processor", Verdict.MIND, "x86 without AVX2", advice)
    else:
        yield Finding("processor", Verdict.FINE, ", ".join(found) or "no x86 extensions are told")
