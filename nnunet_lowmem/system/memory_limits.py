"""What the machine has: the RAM this process may still take, free disk.

Every limit that can end a process or make it swap is read and the tightest one counts: physical RAM, the memory cgroup
of this very process and of each of its ancestors, SLURM's allocation, and the limits of ``setrlimit``. A limit is
compared by what it leaves free, not by its size, because each counts what is in use in its own way.

Not covered: VRAM (the driver is asked where torch is loaded), Windows job objects, disk quotas.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.system.memory_held import process_tree_bytes

# cgroup v1 writes "no limit" as the largest multiple of the page size that fits 63 bits
_NO_LIMIT_BYTES = 2**60
_MIB = 2**20
# left to the rest of the machine where no limit was asked for
_HEADROOM_SHARE = 0.05
_LEAST_HEADROOM_BYTES = 128 * 2**20


@dataclass(frozen=True)
class RamLimit:
    """One bound on the RAM of this process.

    Attributes
    ----------
    source : str
        What sets the bound, in words for a message ("physical RAM", "SLURM_MEM_PER_NODE", a cgroup file, ...).
    total_bytes : int
        The bound itself.
    used_bytes : int
        What counts against it already, this process included.
    """

    source: str
    total_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What this process may still take before it meets the bound; never negative."""
        return max(0, self.total_bytes - self.used_bytes)


def ram_limits(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> list[RamLimit]:
    """Return every bound on the RAM of this process that could be read; physical RAM comes first.

    Parameters
    ----------
    root : Path
        Folder that holds ``proc/self/cgroup`` and ``sys/fs/cgroup``.
    environ : mapping of str to str
        Environment in which SLURM's variables are looked up.
    """
    memory = psutil.virtual_memory()
    physical = RamLimit("physical RAM", memory.total, memory.total - memory.available)
    return [physical, *_cgroup_limits(root), *_slurm_limits(environ), *_process_limits()]


def available_ram(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> RamLimit:
    """Return the bound that leaves this process the least; its ``free_bytes`` come on top of what is in use now.

    Parameters are those of `ram_limits`.
    """
    return min(ram_limits(root, environ), key=lambda limit: limit.free_bytes)


def less_headroom(free_bytes: int) -> int:
    """Return what may be taken of the bytes that are free where no limit was asked for."""
    return max(0, free_bytes - max(_LEAST_HEADROOM_BYTES, int(_HEADROOM_SHARE * free_bytes)))


def total_ram_bytes(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Return the smallest bound itself, whatever is in use: what ``80%`` of the machine refers to."""
    return min(limit.total_bytes for limit in ram_limits(root, environ))


def free_disk_bytes(path: Path) -> int:
    """Return the bytes an ordinary user may still write at `path`, or where it would be created.

    Raises
    ------
    UsageError
        If the file system cannot be asked.
    """
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"cannot read the free space of {folder} (for {path}): {error.strerror or error}") from error


@dataclass(frozen=True)
class CgroupFiles:
    """Names that one version of cgroups gives to limits, usage, the page cache that it drops first, and its kills."""

    limits: tuple[str, ...]
    usage: str
    inactive_file: str
    kills: str


# memory.high does not end a process but throttles it to a crawl, so it binds like memory.max
_CGROUP_V2 = CgroupFiles(("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events")
_CGROUP_V1 = CgroupFiles(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)


def _cgroup_limits(root: Path) -> Iterator[RamLimit]:
    for folder, files in cgroup_folders(root):
        for name in files.limits:
            total_bytes = _whole_number(_read(folder / name))
            if total_bytes is not None and total_bytes < _NO_LIMIT_BYTES:
                yield RamLimit(f"cgroup {folder / name}", total_bytes, _cgroup_used_bytes(folder, files))


def cgroup_folders(root: Path) -> Iterator[tuple[Path, CgroupFiles]]:
    """Yield the memory cgroup of this process and its ancestors, innermost first.

    Inside a container ``proc/self/cgroup`` may name a path of the host that is not mounted: what does not exist is
    passed over, and the walk ends at the mount itself, which then is the container's own cgroup.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and path:
            yield from ((folder, _CGROUP_V2) for folder in _ancestors(mount, path))
            yield from ((folder, _CGROUP_V2) for folder in _ancestors(mount / "unified", path))
        elif "memory" in controllers.split(","):
            yield from ((folder, _CGROUP_V1) for folder in _ancestors(mount / "memory", path))


def _ancestors(mount: Path, path: str) -> Iterator[Path]:
    # a process outside its cgroup namespace sees a path that begins with ".."
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _cgroup_used_bytes(folder: Path, files: CgroupFiles) -> int:
    cache_bytes = counter(folder / "memory.stat", files.inactive_file)
    return max(0, (_whole_number(_read(folder / files.usage)) or 0) - (cache_bytes or 0))


def _slurm_limits(environ: Mapping[str, str]) -> Iterator[RamLimit]:
    """Yield SLURM's allocation on this node; its MB are MiB, 0 means all of the node's memory.

    Only what this process and its children use is known to count against it; other steps of the job are seen through
    the cgroup, where SLURM is set up to use one.
    """
    candidates = (
        ("SLURM_MEM_PER_NODE", None),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    )
    for name, count_name in candidates:
        amount = _whole_number(environ.get(name, ""))
        count = 1 if count_name is None else _whole_number(environ.get(count_name, ""))
        if amount and count:
            source = name if count_name is None else f"{name} x {count_name}"
            yield RamLimit(source, amount * count * _MIB, process_tree_bytes())


def _process_limits() -> Iterator[RamLimit]:
    """Yield the soft limits of ``setrlimit`` with what the kernel counts against each."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = psutil.Process().memory_info()
    in_use_bytes = {
        "RLIMIT_DATA": getattr(used, "data", used.rss),
        "RLIMIT_AS": used.vms,
        "RLIMIT_RSS": used.rss,
    }
    for name, used_bytes in in_use_bytes.items():
        soft_bytes, _ = resource.getrlimit(getattr(resource, name))
        if soft_bytes != resource.RLIM_INFINITY:
            yield RamLimit(name, soft_bytes, used_bytes)


def counter(path: Path, name: str) -> int | None:
    """Return the number after `name` in a file of the kernel with one such pair in a line; None if there is none."""
    counters = dict(line.partition(" ")[::2] for line in _read(path).splitlines())
    return _whole_number(counters.get(name, ""))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _whole_number(text: str) -> int | None:
    """Return a number above or equal to 0 written in digits; None for ``max``, nothing, or anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() else None
