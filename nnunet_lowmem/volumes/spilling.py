"""Where arrays are spilled: the folder for temporary files, and whether it is one that relieves the RAM."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil

from nnunet_lowmem.system.memory_limits import free_disk_bytes
from nnunet_lowmem.system.platform import by_psutil, file_system_number
from nnunet_lowmem.volumes.mapped import why_unspillable

IN_MEMORY = ("tmpfs", "ramfs")
# linux/magic.h
_MAGIC = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


def spill_bytes(tmp_dir: str | os.PathLike[str] | None) -> int:
    """Return what can be spilled: the free space of the folder, or nothing where it is in RAM or maps no files."""
    folder = spill_folder(tmp_dir)
    return 0 if why_nothing_is_spilled(folder) else free_disk_bytes(folder)


def spill_folder(tmp_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder where arrays are spilled; the system's for temporary files if none is given."""
    return Path(tmp_dir or tempfile.gettempdir())


def why_nothing_is_spilled(folder: Path) -> str:
    """Return what rules a folder out: that it lies in RAM, or maps no files; empty where arrays can be spilled."""
    return "is kept in RAM" if file_system(folder) in IN_MEMORY else why_unspillable(folder)


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder; empty where the system does not tell."""
    path = folder.resolve()
    parts = by_psutil(lambda: psutil.disk_partitions(all=True))
    mounts = {Path(part.mountpoint): part.fstype for part in parts or ()}
    found = next((str(mounts[parent]) for parent in (path, *path.parents) if parent in mounts), "")
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return found or _MAGIC.get(file_system_number(there), "")
