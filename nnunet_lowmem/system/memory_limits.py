"""What the machine has: the RAM this process may still take, free disk.

Every limit that can end a process or make it swap is read and the tightest one counts: physical RAM, the memory cgroup
of this very process and of each of its ancestors, SLURM's allocation, and the limits of ``setrlimit``. A limit is
compared by what it leaves free, not by its size, because each counts what is in use in its own way. Where that count is
not told, what this process and its children hold stands in for it: there is at least that.

Not covered: VRAM (the driver is asked where torch is loaded), Windows job objects, disk quotas.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.sizes import format_gib, format_gib_up
from nnunet_lowmem.system.memory_held import process_bytes, process_tree_bytes, status_bytes
from nnunet_lowmem.system.platform import by_psutil, process_limits, sysconf_bytes

# cgroup v1 writes "no limit" as the largest multiple of the page size that fits 63 bits
_NO_LIMIT_BYTES = 2**60
_MIB = 2**20
# left to the rest of the machine where no limit was asked for
_HEADROOM_SHARE = 0.05
_LEAST_HEADROOM_BYTES = 128 * 2**20


PHYSICAL = "physical RAM"
_CGROUP = "cgroup "
_NAMES = {
    "RLIMIT_DATA": "ulimit -d (RLIMIT_DATA)",
    "RLIMIT_AS": "ulimit -v (RLIMIT_AS)",
    "RLIMIT_RSS": "ulimit -m (RLIMIT_RSS)",
}
_RAISED_WITH = {
    "SLURM_MEM_PER_NODE": "sbatch --mem={mib}M",
    "SLURM_MEM_PER_CPU": "sbatch --mem={mib}M, or more CPUs",
    "SLURM_MEM_PER_GPU": "sbatch --mem={mib}M",
    "RLIMIT_DATA": "ulimit -d {kib}",
    "RLIMIT_AS": "ulimit -v {kib}",
    "RLIMIT_RSS": "ulimit -m {kib}",
    _CGROUP: "the memory limit of the job or the container, {mib} MiB",
}


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

    def in_words(self) -> str:
        """Return name and size, as whoever has set it knows them."""
        name, size = _NAMES.get(self.source, self.source), format_gib(self.total_bytes)
        if name.startswith(_CGROUP):
            file = Path(name.removeprefix(_CGROUP))
            return f"the cgroup's {file.name} {size} ({file.parent})"
        return f"{name} {size}"

    def raised_by(self, more_bytes: int) -> str:
        """Return what to do to have so much more; shown sizes are rounded up."""
        total_bytes = self.total_bytes + more_bytes
        if self.source == PHYSICAL:
            return f"end what else takes it ({format_gib_up(more_bytes)} more must be free), or run on a larger machine"
        how = next((how for name, how in _RAISED_WITH.items() if self.source.startswith(name)), "")
        words = how.format(mib=-(-total_bytes // _MIB), kib=-(-total_bytes // 1024))
        return f"raise it to {format_gib_up(total_bytes)} or more ({words})"


def ram_limits(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> list[RamLimit]:
    """Return every bound on the RAM of this process that could be read; physical RAM comes first.

    Parameters
    ----------
    root : Path
        Folder that holds ``proc/self/cgroup`` and ``sys/fs/cgroup``.
    environ : mapping of str to str
        Environment in which SLURM's variables are looked up.
    """
    physical = physical_ram()
    others = [*_cgroup_limits(root), *_slurm_limits(environ), *_process_limits()]
    return others if physical is None else [physical, *others]


def physical_ram() -> RamLimit | None:
    """Return the machine's RAM; None where nothing tells of it."""
    memory = by_psutil(psutil.virtual_memory)
    if memory is not None and memory.total:
        return RamLimit(PHYSICAL, memory.total, memory.total - memory.available)
    # what caches hold counts as used there
    total_bytes, free_bytes = sysconf_bytes("SC_PHYS_PAGES"), sysconf_bytes("SC_AVPHYS_PAGES")
    return None if total_bytes is None else RamLimit(PHYSICAL, total_bytes, total_bytes - (free_bytes or 0))


def available_ram(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> RamLimit | None:
    """Return the bound that leaves this process the least; its ``free_bytes`` come on top of what is in use now.

    None where no bound is told. Parameters are those of `ram_limits`.
    """
    return min(ram_limits(root, environ), key=lambda limit: limit.free_bytes, default=None)


def binding_now() -> str:
    """Say which bound leaves least, and how much at this moment; nothing where none is told."""
    limit = available_ram()
    return "" if limit is None else f"least is left by {limit.in_words()}, {format_gib(limit.free_bytes)} now"


def less_headroom(free_bytes: int) -> int:
    """Return what may be taken of the bytes that are free where no limit was asked for."""
    return max(0, free_bytes - max(_LEAST_HEADROOM_BYTES, int(_HEADROOM_SHARE * free_bytes)))


def with_headroom(needed_bytes: int) -> int:
    """Return how much must be free for `less_headroom` to leave `needed_bytes`."""
    return max(needed_bytes + _LEAST_HEADROOM_BYTES, math.ceil(needed_bytes / (1 - _HEADROOM_SHARE)))


def total_ram_bytes(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the smallest bound itself, whatever is in use: what ``80%`` of the machine refers to; None without any."""
    return min((limit.total_bytes for limit in ram_limits(root, environ)), default=None)


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
    told = _text(root / "proc/self/cgroup")
    if told is None:  # in a container the mounts are its own
        yield from ((mount, _CGROUP_V2), (mount / "memory", _CGROUP_V1))
    for line in (told or "").splitlines():
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
    usage_bytes = _whole_number(_read(folder / files.usage))
    if usage_bytes is None:
        return process_tree_bytes()
    cache_bytes = counter(folder / "memory.stat", files.inactive_file)
    return max(0, usage_bytes - (cache_bytes or 0))


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
    in_use = {"RLIMIT_DATA": _data_bytes, "RLIMIT_AS": _address_bytes, "RLIMIT_RSS": _resident_bytes}
    for name, soft_bytes in process_limits().items():
        yield RamLimit(name, soft_bytes, in_use[name]())


def _data_bytes() -> int:
    # psutil's number is that of /proc/self/statm, which has 0 in gVisor
    return status_bytes(b"VmData:") or _of_this_process("data") or _resident_bytes()


def _address_bytes() -> int:
    return status_bytes(b"VmSize:") or _of_this_process("vms") or _resident_bytes()


def _resident_bytes() -> int:
    return _of_this_process("rss") or process_bytes()


def _of_this_process(name: str) -> int | None:
    return by_psutil(lambda: int(getattr(psutil.Process().memory_info(), name)))


def counter(path: Path, name: str) -> int | None:
    """Return the number after `name` in a file of the kernel with one such pair in a line; None if there is none."""
    counters = dict(line.partition(" ")[::2] for line in _read(path).splitlines())
    return _whole_number(counters.get(name, ""))


def _read(path: Path) -> str:
    return _text(path) or ""


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None


def _whole_number(text: str) -> int | None:
    """Return a number above or equal to 0 written in digits; None for ``max``, nothing, or anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() else None
