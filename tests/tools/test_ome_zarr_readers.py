"""Label images as OME-Zarr, opened by the two libraries that viewers read them with, in an environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from nnunet_lowmem.preprocessing.volume_io import VolumeIO

REQUIREMENTS = ["ngff-zarr", "ome-zarr"]

pytestmark = [pytest.mark.tools, pytest.mark.timeout(1200)]

READ = """
import json, sys
import ngff_zarr, numpy as np
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

image = ngff_zarr.from_ngff_zarr(sys.argv[1]).images[0]
(node,) = Reader(parse_url(sys.argv[1]))()
print(json.dumps({
    "scale": [image.scale[axis] for axis in "zyx"],
    "translation": [image.translation[axis] for axis in "zyx"],
    "units": [image.axes_units[axis] for axis in "zyx"],
    "sums": [int(np.asarray(data).sum()) for data in (image.data, *node.data)],
    "specs": [type(spec).__name__ for spec in node.specs],
    "classes": {value: told["class"] for value, told in node.metadata["properties"].items()},
    "coloured": sorted(node.metadata["color"]),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_label_image(version: str, python: Path, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (70, 130, 90)).astype(np.uint8)
    place = {"spacing": (0.5, 0.25, 0.25), "origin": (3.0, 2.0, 1.0), "direction": np.eye(3).ravel()}
    properties = {
        "spacing": [0.25, 0.25, 0.5],
        "sitk_stuff": place,
        "volume": {"unit": "micrometer", "version": version},
    }
    path = tmp_path / "labels.ome.zarr"
    VolumeIO({0: "background", 1: "one", 2: "two"}).write_seg(labels, str(path), properties)
    done = subprocess.run([python, "-c", READ, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    group = zarr.open_group(str(path), mode="r")
    sums = [int(np.asarray(group[str(level)]).sum()) for level in range(len(list(group.array_keys())))]
    assert told["sums"] == [sums[0], *sums]
    assert told["scale"] == [250.0, 250.0, 500.0]
    assert (told["translation"], told["units"]) == ([1000.0, 2000.0, 3000.0], ["micrometer"] * 3)
    assert "Label" in told["specs"]
    assert told["classes"] == {"0": "background", "1": "one", "2": "two"}
    assert told["coloured"] == [0, 1, 2]
