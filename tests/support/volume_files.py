"""One volume in files of all formats that are arrays, as their own libraries write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from numpy.typing import NDArray

from nnunet_lowmem.volumes.selection import Selection

pytest.importorskip("zarr", reason="zarr 3 needs Python 3.11", exc_type=ImportError)
import h5py
import numcodecs
import zarr

VOXELS = np.random.default_rng(3).integers(-900, 1200, (17, 19, 23)).astype(np.int16)
#: mm, slowest axis first.
SPACING = (2.5, 1.25, 0.75)
ORIGIN = (10.0, -4.0, 3.5)
CHUNKS = (8, 8, 8)
_IN_MILLIMETRE = {"micrometer": 1000.0, "millimeter": 1.0, "nanometer": 1e6}


_PLAIN = Selection()
#: By name and whether it is for zarr 2.
_CODECS: dict[tuple[str, bool], Any] = {
    ("", True): "auto",
    ("", False): "auto",
    ("blosc", True): numcodecs.Blosc(),
    ("blosc", False): zarr.codecs.BloscCodec(),
    ("zstd", True): numcodecs.Zstd(),
    ("zstd", False): zarr.codecs.ZstdCodec(),
}


@dataclass(frozen=True)
class Made:
    path: Path
    voxels: NDArray[Any]
    spacing: tuple[float, ...] = SPACING
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    selection: Selection = _PLAIN


def ome_zarr(
    path: Path,
    voxels: NDArray[Any],
    version: str,
    *,
    unit: str = "micrometer",
    axes: str = "zyx",
    shards: tuple[int, ...] | None = None,
    chunks: tuple[int, ...] = CHUNKS,
    levels: int = 1,
    spacing: tuple[float, ...] = SPACING,
    origin: tuple[float, ...] = ORIGIN,
    codec: str = "",
) -> Path:
    """Write an image by hand, as the page on NGFF has it."""
    kinds = {"t": "time", "c": "channel"}
    told = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    for axis in told:
        if axis["type"] == "space":
            axis["unit"] = unit
    others, per_mm = len(axes) - 3, _IN_MILLIMETRE[unit]
    datasets = []
    for level in range(levels):
        scale = [1.0] * others + [step * per_mm * 2**level for step in spacing]
        shift = [0.0] * others + [start * per_mm for start in origin]
        transformations = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    image = {"name": "image", "axes": told, "datasets": datasets}
    is_4 = version == "0.4"
    attributes = (
        {"multiscales": [{"version": version, **image}]}
        if is_4
        else {"ome": {"version": version, "multiscales": [image]}}
    )
    group = zarr.create_group(store=str(path), zarr_format=2 if is_4 else 3, attributes=attributes)
    voxels = voxels.reshape((1,) * (len(axes) - voxels.ndim) + voxels.shape)
    for level in range(levels):
        values = voxels[..., :: 2**level, :: 2**level, :: 2**level]
        array = group.create_array(
            str(level),
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1,) * others + chunks,
            shards=None if shards is None else (1,) * others + shards,
            chunk_key_encoding={"name": "v2" if is_4 else "default", "separator": "/"},
            compressors=_CODECS[codec, is_4],
        )
        array[:] = values
    return path


def _ome(version: str, folder: Path, **options: Any) -> Made:
    path = ome_zarr(folder / "a.ome.zarr", VOXELS, version, **options)
    voxels = VOXELS[None] if "c" in options.get("axes", "") else VOXELS
    return Made(path, voxels, origin=ORIGIN)


def _channels(folder: Path) -> Made:
    voxels = np.stack([VOXELS, VOXELS[::-1]])
    return Made(ome_zarr(folder / "a.ome.zarr", voxels, "0.5", axes="czyx"), voxels, origin=ORIGIN)


def _zarr(zarr_format: Any, folder: Path, **options: Any) -> Made:
    path = folder / "a.zarr"
    array = zarr.create_array(
        store=str(path),
        shape=VOXELS.shape,
        dtype=">i2" if zarr_format == 2 else "<i2",
        chunks=CHUNKS,
        zarr_format=zarr_format,
        **options,
    )
    array[:] = VOXELS
    return Made(path, VOXELS, spacing=(1.0, 1.0, 1.0))


def _interleaved(folder: Path) -> Made:
    voxels = np.stack([VOXELS, VOXELS[::-1], VOXELS[:, ::-1]])
    path = folder / "a.zarr"
    zarr.create_array(store=str(path), data=voxels, chunks=(2, 8, 8, 8))
    return Made(path, voxels, spacing=(1.0, 1.0, 1.0))


def _hdf5(folder: Path, **options: Any) -> Made:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("volumes/raw", data=VOXELS, **options)
        stored.attrs["element_size_um"] = [1000 * step for step in SPACING]
        file["other"] = VOXELS[:3]
    return Made(path, VOXELS, selection=Selection(key="volumes/raw"))


def _tiff(folder: Path, voxels: NDArray[Any] = VOXELS, axes: str = "ZYX", **options: Any) -> Made:
    path = folder / "a.ome.tif"
    sizes = {f"PhysicalSize{axis}": 1000 * step for axis, step in zip("ZYX", SPACING, strict=True)}
    tifffile.imwrite(path, voxels, ome=True, metadata={"axes": axes, **sizes}, **options)
    if axes == "ZCYX":
        voxels = voxels.transpose(1, 0, 2, 3)
    if axes == "ZYXS":
        voxels = voxels.transpose(3, 0, 1, 2)
    return Made(path, voxels)


def _imagej(folder: Path) -> Made:
    path = folder / "a.tif"
    resolution = (1 / SPACING[2], 1 / SPACING[1])
    metadata = {"axes": "ZYX", "spacing": SPACING[0], "unit": "mm"}
    tifffile.imwrite(path, VOXELS, imagej=True, resolution=resolution, metadata=metadata, compression="zlib")
    return Made(path, VOXELS)


def _nnunets(folder: Path) -> Made:
    """With the file beside it that nnU-Net's Tiff3DIO looks for."""
    path = folder / "a.tif"
    tifffile.imwrite(path, VOXELS)
    path.with_suffix(".json").write_text(json.dumps({"spacing": list(SPACING)}))
    return Made(path, VOXELS)


def _planes(folder: Path) -> Made:
    path = folder / "planes"
    path.mkdir()
    for number, plane in enumerate(VOXELS):
        tifffile.imwrite(path / f"p{number}.tif", plane, compression="zlib" if number % 2 else None)
    return Made(path, VOXELS, selection=Selection(planes=True, spacing=SPACING))


_COLOURS = np.random.default_rng(4).integers(0, 255, (6, 19, 23, 3)).astype(np.uint8)
#: By name, what writes it into a folder; of those with "raw" the voxels lie in the file as they are.
VOLUMES: dict[str, Callable[[Path], Made]] = {
    "ome_0.4": partial(_ome, "0.4"),
    "ome_0.5": partial(_ome, "0.5", unit="nanometer"),
    "ome_sharded": partial(_ome, "0.5", shards=(16, 16, 24), unit="millimeter"),
    "ome_5_axes": partial(_ome, "0.4", axes="tczyx"),
    "ome_channels": _channels,
    "zarr_2": partial(_zarr, 2),
    "zarr_3": partial(_zarr, 3, shards=(16, 8, 16)),
    "zarr_interleaved": _interleaved,
    "hdf5_gzip": partial(_hdf5, chunks=CHUNKS, compression="gzip", shuffle=True, fletcher32=True),
    "hdf5_raw": _hdf5,
    "tiff_raw": _tiff,
    "tiff_deflate": partial(_tiff, compression="zlib"),
    "tiff_tiles": partial(_tiff, compression="zlib", tile=(16, 16), predictor=True),
    "tiff_channels": partial(_tiff, voxels=np.stack([VOXELS, VOXELS[::-1]], 1), axes="ZCYX"),
    "tiff_colours": partial(_tiff, voxels=_COLOURS, axes="ZYXS", photometric="rgb"),
    "tiff_big_endian_raw": partial(_tiff, byteorder=">", bigtiff=True),
    "tiff_imagej": _imagej,
    "tiff_nnunets_raw": _nnunets,
    "planes": _planes,
}


def read_labels(path: Path) -> NDArray[Any]:
    """Return a label map as its own library reads it, z first."""
    if path.name.endswith(".zarr"):
        return np.asarray(zarr.open_group(str(path), mode="r")["0"])
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return np.asarray(file["labels"])
    if path.suffix in (".tif", ".tiff"):
        return np.asarray(tifffile.imread(path))
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def _write_hdf5(path: Path, voxels: NDArray[Any], spacing: tuple[float, ...], **options: Any) -> None:
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("raw", data=voxels, **options)
        stored.attrs["element_size_um"] = [1000 * step for step in spacing]


def _write_tiff(path: Path, voxels: NDArray[Any], spacing: tuple[float, ...], **options: Any) -> None:
    sizes = {f"PhysicalSize{axis}": step for axis, step in zip("ZYX", spacing, strict=True)}
    units = {f"{name}Unit": "mm" for name in sizes}
    axes = "ZYX" if voxels.ndim == 3 else "CZYX"
    tifffile.imwrite(path, voxels, ome=True, metadata={"axes": axes, **sizes, **units}, **options)


def _write_ome(version: str, path: Path, voxels: NDArray[Any], spacing: tuple[float, ...], **options: Any) -> None:
    axes = "zyx" if voxels.ndim == 3 else "czyx"
    ome_zarr(path, voxels, version, axes=axes, spacing=spacing, origin=(0.0, 0.0, 0.0), **options)


#: By the name of what is written: path, voxels of shape ([c,] z, y, x), spacing in mm.
WRITERS: dict[str, Callable[[Path, NDArray[Any], tuple[float, ...]], None]] = {
    "four.ome.zarr": partial(_write_ome, "0.4", chunks=(16, 16, 16)),
    "five.ome.zarr": partial(_write_ome, "0.5", chunks=(16, 16, 16)),
    "sharded.ome.zarr": partial(_write_ome, "0.5", chunks=(8, 16, 16), shards=(32, 32, 48)),
    "deflate.tif": partial(_write_tiff, compression="zlib"),
    "big.ome.tif": partial(_write_tiff, bigtiff=True),
    "chunks.h5": partial(_write_hdf5, chunks=True, compression="gzip"),
}
