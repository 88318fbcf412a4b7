"""The metadata of OME-Zarr (NGFF 0.4 and 0.5): which arrays are an image's scales, and where their voxels lie.

Rules from https://ngff.openmicroscopy.org/0.4 and /0.5, sections "axes", "multiscales" and "image-label".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_lowmem.errors import DamagedFileError, UsageError
from nnunet_lowmem.types import Shape3

#: Millimetres in a unit; lengths that NGFF names, and how microscopes spell some.
MILLIMETRES = {
    **dict.fromkeys(("angstrom", "Å"), 1e-7),
    **dict.fromkeys(("picometer", "pm"), 1e-9),
    **dict.fromkeys(("nanometer", "nanometre", "nm"), 1e-6),
    **dict.fromkeys(("micrometer", "micrometre", "micron", "microns", "um", "µm", "μm"), 1e-3),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), 1.0),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), 10.0),
    **dict.fromkeys(("decimeter", "dm"), 100.0),
    **dict.fromkeys(("meter", "metre", "m"), 1e3),
    **dict.fromkeys(("kilometer", "km"), 1e6),
    **dict.fromkeys(("inch", "in"), 25.4),
    **dict.fromkeys(("foot", "ft"), 304.8),
    **dict.fromkeys(("yard", "yd"), 914.4),
}
#: Of an axis that says none.
MILLIMETRE = "millimeter"
#: Written where the input is none.
LATEST = "0.5"
VERSIONS = ("0.4", "0.5")
_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_ORDER = "t, c, z, y, x"


@dataclass(frozen=True)
class Scale:
    """One array of an image, and where its voxels lie.

    Attributes
    ----------
    path : str
        Of the array, within the image's group.
    axes : str
        Some of ``tczyx``, in this order.
    spacing : (float, float, float) or None
        Of z, y and x, mm; of an axis that there is not 1. None where the metadata says none.
    origin : (float, float, float)
        Likewise.
    unit : str
        In which the metadata says lengths; empty if it says none.
    version : str
        Of NGFF.
    """

    path: str
    axes: str
    spacing: tuple[float, ...] | None
    origin: tuple[float, ...]
    unit: str
    version: str


def millimetres(unit: str) -> float:
    """Return how many a unit has.

    Raises
    ------
    UsageError
        If it is no length that is known.
    """
    factor = MILLIMETRES.get(unit) or MILLIMETRES.get(unit.lower())
    if factor is None:
        raise UsageError(f"the unit {unit!r} is no length; give the spacing in mm with --spacing Z Y X")
    return factor


def canonical(unit: str) -> str:
    """Return the name that NGFF has for a unit.

    Raises
    ------
    UsageError
        If it is no length that is known.
    """
    factor = millimetres(unit)
    return next(name for name, length in MILLIMETRES.items() if length == factor)


def is_image(attributes: Mapping[str, Any]) -> bool:
    """Whether the attributes of a group are those of an image."""
    return "multiscales" in attributes or "multiscales" in (attributes.get("ome") or {})


def scale_of(attributes: Mapping[str, Any], level: int, spacing_is_given: bool = False) -> Scale:
    """Return one of the scales that the attributes of a group tell of.

    Raises
    ------
    UsageError
        If there is no such level, or the axes are none of a volume, or have no length for a unit.
    DamagedFileError
        If they are not as NGFF has them.
    """
    ome = attributes.get("ome") or attributes
    try:
        image = ome["multiscales"][0]
        version = str(ome.get("version") or image.get("version") or VERSIONS[0])
        datasets = image["datasets"]
        axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in image["axes"]]
        names = _checked_axes([str(axis["name"]) for axis in axes], [axis.get("type") for axis in axes])
        if level >= len(datasets):
            raise UsageError(f"it has the levels 0 to {len(datasets) - 1}, and --level {level} is asked for")
        path = str(datasets[level]["path"])
        steps = [*datasets[level].get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]
        factors, shifts = _composed(steps, len(axes))
        is_said = any(step["type"] == "scale" for step in steps)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise DamagedFileError(
            f"its metadata is not that of an OME-Zarr {' or '.join(VERSIONS)}: {type(error).__name__}: {error}"
        ) from error
    units = {str(axis["unit"]) for axis, name in zip(axes, names, strict=True) if name in "zyx" and axis.get("unit")}
    unit = MILLIMETRE if len(units) > 1 else "".join(units)
    spacing, origin = [1.0] * 3, [0.0] * 3
    for axis, name, factor, shift in zip(axes, names, factors, shifts, strict=True):
        if name in "zyx":
            # an axis without a unit is in that of the others
            said = str(axis.get("unit") or unit or MILLIMETRE)
            length = MILLIMETRES.get(said, 1.0) if spacing_is_given else millimetres(said)
            spacing["zyx".index(name)], origin["zyx".index(name)] = factor * length, shift * length
    is_length = bool(unit) and (not spacing_is_given or unit in MILLIMETRES)
    unit = canonical(unit) if is_length else ""
    return Scale(path, names, tuple(spacing) if is_said else None, tuple(origin), unit, version)


def _checked_axes(names: Sequence[str], types: Sequence[Any]) -> str:
    """Return axes as letters.

    Raises
    ------
    UsageError
        If they are in another order than NGFF has them, or others.
    """
    told = ", ".join(names)
    letters = [name.lower() for name in names]
    for name, letter, kind in zip(names, letters, types, strict=True):
        if _TYPES.get(letter) is None or (kind is not None and kind != _TYPES[letter]):
            raise UsageError(f"its axes are {told}; {name!r} of type {kind!r} is none of {_ORDER}")
    return checked_order("".join(letters), told)


def checked_order(axes: str, told: str) -> str:
    """Return axes that are some of t, c, z, y, x in this order, y and x among them.

    Raises
    ------
    UsageError
    """
    if [*axes] != sorted(set(axes), key="tczyx".index) or not axes.endswith("yx"):
        raise UsageError(f"its axes are {told}, in an order that a volume cannot have: they must be of {_ORDER}")
    return axes


def _composed(transformations: Sequence[Mapping[str, Any]], axes: int) -> tuple[list[float], list[float]]:
    """Return what an index is multiplied with, and what is added then."""
    factors, shifts = [1.0] * axes, [0.0] * axes
    for transformation in transformations:
        kind = transformation["type"]
        if kind == "scale":
            factors = [a * float(b) for a, b in zip(factors, transformation["scale"], strict=True)]
            shifts = [a * float(b) for a, b in zip(shifts, transformation["scale"], strict=True)]
        elif kind == "translation":
            shifts = [a + float(b) for a, b in zip(shifts, transformation["translation"], strict=True)]
        elif kind != "identity":
            raise ValueError(f"a transformation of type {kind!r}")
    if not all(map(math.isfinite, (*factors, *shifts))):
        raise ValueError("a transformation by what is no number")
    return factors, shifts


@dataclass(frozen=True)
class Level:
    """One scale of a label image that is written.

    Attributes
    ----------
    path : str
    shape : int, 3
    factors : int, 3
        How many voxels of the finest one of it is, along each axis.
    """

    path: str
    shape: Shape3
    factors: Shape3


def label_attributes(
    levels: Sequence[Level],
    spacing: Sequence[float],
    origin: Sequence[float],
    unit: str,
    version: str,
    classes: Mapping[int, str],
    name: str,
) -> dict[str, Any]:
    """Return the attributes of the group of a label image.

    Of each voxel of the finest scale that is kept in a coarser one the middle stays where it is, so all scales have the
    same translation.

    Parameters
    ----------
    levels : sequence of Level
        The finest first.
    spacing, origin : (float, float, float)
        Of z, y, x; mm.
    unit : str
        In which lengths are written.
    version : str
        Of NGFF.
    classes : dict
        Names of labels.
    name : str
        Of the image.
    """
    unit = unit or MILLIMETRE
    length = millimetres(unit)
    datasets = [
        {
            "path": level.path,
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [_plain(s * f / length) for s, f in zip(spacing, level.factors, strict=True)],
                },
                {"type": "translation", "translation": [_plain(shift / length) for shift in origin]},
            ],
        }
        for level in levels
    ]
    axes = [{"name": axis, "type": "space", "unit": unit} for axis in "zyx"]
    image = {"name": name, "axes": axes, "datasets": datasets, "type": "nearest"}
    labels: dict[str, Any] = {
        "colors": [{"label-value": value, "rgba": colour(value)} for value in classes],
        "properties": [{"label-value": value, "class": text} for value, text in classes.items()],
    }
    if version == VERSIONS[0]:
        return {"multiscales": [{"version": version, **image}], "image-label": {"version": version, **labels}}
    return {"ome": {"version": version, "multiscales": [image], "image-label": labels}}


def _plain(value: float) -> float:
    """Undo what changing units and back has made of a number's last digits."""
    return float(f"{value:.14g}")


def colour(value: int) -> list[int]:
    """Return a colour for a label, as far as can be from those of its neighbours; the background has none."""
    import colorsys

    if value == 0:
        return [0, 0, 0, 0]
    # steps of the golden ratio round the circle of hues
    hue, strong = value * 0.6180339887498949 % 1, 0.95 - 0.25 * (value % 3 == 0)
    return [*(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (value % 2), strong)), 255]
