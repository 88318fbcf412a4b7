"""What a tile takes, where the system keeps a peak that can be set back and where it does not."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch

from nnunet_lowmem.network import tile_memory
from nnunet_lowmem.network.tile_memory import Taken, TileBytes, measured

MIB = 2**20
CPU = torch.device("cpu")


def take() -> str:
    held = np.ones(200 * MIB, np.uint8)
    time.sleep(0.1)
    del held
    return "made"


@pytest.mark.parametrize(
    "resets", [pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")), False]
)
def test_what_is_taken_and_given_back_is_seen(resets, monkeypatch):
    """As in gVisor: clear_refs cannot be written, and there is no VmHWM."""
    if not resets:
        monkeypatch.setattr(tile_memory, "_reset_peak", lambda: None)
    result, taken = measured(take, CPU)
    assert (result, taken.is_peak) == ("made", resets)
    assert 199 * MIB < taken.size_bytes < 220 * MIB


@pytest.mark.parametrize("field", [b"VmHWM:", b"VmRSS:"])
def test_peak_that_the_kernel_does_not_keep_is_not_set_back(field, monkeypatch):
    real = tile_memory.status_bytes
    monkeypatch.setattr(tile_memory, "status_bytes", lambda *names: None if names == (field,) else real(*names))
    assert tile_memory._reset_peak() is None


@pytest.mark.parametrize(
    "known, taken, expected",
    [
        (TileBytes(100, 100), None, 200),
        (TileBytes(100, 100), Taken(0), 200),
        (TileBytes(100, 100), Taken(130), 130),
        (TileBytes(100, 100), Taken(130, is_peak=False), 200),
        (TileBytes(100, 100), Taken(230, is_peak=False), 230),
        (TileBytes(0, tile_memory._ANYTHING), Taken(70, is_peak=False), 70),
    ],
)
def test_samples_never_make_less_of_what_was_expected(known, taken, expected):
    assert known.after(taken) == TileBytes(expected)
