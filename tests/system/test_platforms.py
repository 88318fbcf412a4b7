"""Where things lack that are usually there: what Windows and macOS do not have, and metadata of what is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from factory import ModelSpec
from images import SUPPORT
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_segmentation, make_predictor, predict_stock

from nnunet_lowmem.nnunet.installed import version_of


@pytest.mark.parametrize(
    "platform", ["windows", *(pytest.param(p, marks=pytest.mark.slow) for p in ("macos", "source_tree"))]
)
def test_hook_commands_and_predictor_start_and_predict(platform, images, models, tmp_path):
    case, model = images("small"), models(ModelSpec(patch_size=(10, 12, 12)), images("small"))
    predict_stock(make_predictor(nnUNetPredictor, model), [case], [str(tmp_path / "stock")])
    arguments = ["-i", str(Path(case[0]).parent), "-o", str(tmp_path / "out"), "-m", model, "-f", "0", "--report"]
    program = [sys.executable, str(SUPPORT / "elsewhere.py"), platform, *arguments, "-device", "cpu"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_segmentation(tmp_path / "stock.nii.gz", tmp_path / "out" / "small.nii.gz")
    facts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (facts["nnunetv2"] == "unknown") == (platform != "macos")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("Name: some-fork\nVersion: 2.6.2\n", "2.6.2 (some-fork)"),
        ("Name: some_package\nVersion: 1.0\n", "1.0"),
        ("Name: some-fork\n", "3.1"),
        (None, "3.1"),
    ],
    ids=["fork", "itself", "without_version", "none"],
)
def test_version_is_told_as_far_as_anything_says_it(metadata, expected, tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text("__version__ = '3.1'")
    if metadata is not None:
        name = metadata.split()[1].replace("-", "_")
        folder = tmp_path / f"{name}-0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}")
        (folder / "top_level.txt").write_text("some_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "some_package", __import__("some_package"))
    assert version_of("some_package") == expected
