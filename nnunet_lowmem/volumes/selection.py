"""Which volume is meant where a file or a store holds several, and what names volumes have."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import UsageError

#: Of which a folder has one where it is a zarr store, or a group or an array of one.
SIGNS = (".zgroup", ".zattrs", ".zarray", "zarr.json")
ZARR = (".ome.zarr", ".zarr")
HDF5 = (".h5", ".hdf5")
TIFF = (".ome.tif", ".ome.tiff", ".tif", ".tiff", ".btf")
#: Of volumes that are read here, whatever the reader of a model takes.
OWN = (*ZARR, *HDF5, *TIFF)
#: Of those that nnU-Net's readers take.
_OTHERS = (".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".gipl.gz")
ENDINGS = (*OWN, *_OTHERS)
#: Which a model may be made for, and no other model takes.
PICTURES = (".png", ".bmp", ".jpg", ".jpeg", ".mhd", ".nhdr", ".hdr", ".img")
_URL = "://"


@dataclass(frozen=True)
class Selection:
    """How volumes are to be read that no reader of nnU-Net's knows.

    Attributes
    ----------
    level : int
        Of the scales of an OME-Zarr, 0 the finest.
    key : str
        The path of a data set within an HDF5 file; empty where it is the only one.
    planes : bool
        The volume is a folder of TIFF files, a plane each.
    spacing : (float, float, float) or None
        In the place of what the file says; mm, slowest axis first.
    """

    level: int = 0
    key: str = ""
    planes: bool = False
    spacing: tuple[float, ...] | None = None

    @staticmethod
    def of(level: Any, key: Any, planes: Any, spacing: Any) -> Selection:
        """Return what the options of these names ask for.

        Raises
        ------
        UsageError
            If a value can be none.
        """
        if isinstance(level, bool) or not str(level).isdecimal():
            raise UsageError(f"level must be the number of a scale, 0 the finest, got {level!r}")
        return Selection(int(level), str(key or ""), bool(planes), spacing_of(spacing))


def spacing_of(value: Any) -> tuple[float, ...] | None:
    """Return what the option `spacing` asks for: numbers, or text with blanks or commas between them.

    Raises
    ------
    UsageError
        If it is none.
    """
    if value is None or (isinstance(value, str | tuple) and not value):  # a variable that is empty
        return None
    words = value if isinstance(value, str) else " ".join(map(str, value)) if isinstance(value, tuple | list) else "?"
    try:
        steps = tuple(map(float, words.replace(",", " ").split()))
    except (TypeError, ValueError):
        steps = ()
    if len(steps) != 3 or not all(0 < step < math.inf for step in steps):
        raise UsageError(f"spacing must be three lengths in mm, slowest axis of the file first, got {value!r}")
    return steps


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an address of a store elsewhere."""
    return _URL in os.fspath(path)


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or an address, is a zarr store, or a group or an array within one."""
    return is_remote(path) or any(os.path.isfile(os.path.join(path, sign)) for sign in SIGNS)


def ending_of(path: str | os.PathLike[str], known: Sequence[str] = ENDINGS) -> str:
    """Return the longest of the known endings that a name has, in its letters; empty if it has none."""
    name = os.path.basename(os.fspath(path).rstrip("/"))
    found = max((ending for ending in known if name.lower().endswith(ending)), key=len, default="")
    return name[len(name) - len(found) :] if found else ""


def is_volume(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of one volume, by what lies there and by its name."""
    return is_store(path) or (os.path.isfile(path) and bool(ending_of(path)))


def is_output_file(target: Any) -> bool:
    """Whether the name of an output is that of a file or a store, and not of a folder."""
    if not isinstance(target, str) or not ending_of(target):
        return False
    return not os.path.isdir(target) or is_store(target)


def volumes_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the volumes that lie in a folder, by their names."""
    paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith("."))
    return [path for path in paths if is_volume(path)]


def planes_in(folder: Path) -> list[Path]:
    """Return the TIFF files of a folder in the order of the numbers in their names.

    Raises
    ------
    UsageError
        If there is none.
    """
    files = [file for file in folder.iterdir() if ending_of(file, TIFF) and not file.name.startswith(".")]
    if not files:
        raise UsageError(f"{folder} holds no TIFF file: with --planes every file of the folder is a plane")
    return sorted(files, key=lambda file: (_by_numbers(file.name), file.name))


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Return what sorts 10 behind 9."""
    words, digits = [], ""
    for letter in f"{name} ":
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            words.append((int(digits), ""))
        digits = ""
        words.append((-1, letter))
    return words
