"""The slab-wise cubic spline against SciPy's, and the memory that preprocessing takes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from images import SUPPORT
from preprocessing_oracle import CT, changed, read, write
from scipy import ndimage

from nnunet_lowmem.preprocessing import spline
from nnunet_lowmem.system.threads import RowThreads


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    new_shape=st.tuples(*[st.integers(1, 70)] * 3),
    seed=st.integers(0, 2**32),
    sparse=st.booleans(),
    threads=st.integers(1, 3),
)
def test_spline_equals_scipy(shape, new_shape, seed, sparse, threads) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal(shape).astype(np.float32)
    if sparse:  # far from a voxel the coefficients decay through all magnitudes
        volume *= rng.random(shape) < 0.01
    factors = [1 / (n / m) for n, m in zip(shape, new_shape, strict=True)]
    expected = ndimage.zoom(volume.astype(float), factors, order=3, mode="nearest", grid_mode=True)
    out = np.full(new_shape, np.nan, np.float32)
    with RowThreads(threads) as pool:
        spline.zoom_cubic(lambda planes, rows: volume[planes, rows].copy(), shape, out, pool)
    if shape != new_shape:
        assert np.array_equal(out, np.clip(expected, volume.min(), volume.max()).astype(np.float32))


def test_kernels_match_scipy_here() -> None:
    assert spline.matches_scipy()


MEASURE = """
import json, sys, threading, time
import SimpleITK
from preprocessing_oracle import LABELS, Model, fine_ct
from nnunet_lowmem.preprocessing.case import preprocess_case

file, schemes = sys.argv[1], tuple(sys.argv[2:])
model = Model((1.5, 1.5, 1.5), schemes)
managers = model.managers()
SimpleITK.WriteImage(fine_ct()[:8, :8, :8], file + ".small.nii")
preprocess_case([file + ".small.nii"], None, *managers, LABELS, threads=2)  # imports and compiled code

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous"))

before, peak, done = anonymous(), [0], threading.Event()

def sample():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous() - before)
        time.sleep(0.002)

sampler = threading.Thread(target=sample)
sampler.start()
case = preprocess_case([file], None, *managers, LABELS, threads=2)
done.set()
sampler.join()
print(json.dumps([peak[0], case.image.nbytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures through Linux' /proc")
@pytest.mark.parametrize("scheme, bound", [("CTNormalization", 1.5), ("ZScoreNormalization", 2.2)])
@pytest.mark.slow
def test_peak_memory_in_float32_images(scheme: str, bound: float, tmp_path) -> None:
    # the file's 36 MB are more than malloc ever keeps for itself after they are freed
    grid = SimpleITK.Image(320, 320, 176, SimpleITK.sitkInt16)
    grid.SetSpacing((0.9, 0.9, 1.6))
    coarse = read(CT)
    volume = changed(grid, lambda a: np.resize(SimpleITK.GetArrayFromImage(coarse), a.shape))
    (file,) = write(tmp_path, [volume])
    out = subprocess.run([sys.executable, "-c", MEASURE, file, scheme], cwd=SUPPORT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    peak, image = json.loads(out.stdout.splitlines()[-1])
    print(peak / 4 / 320 / 320 / 176)
    assert image < peak <= bound * 4 * 320 * 320 * 176
