"""The path of a case on a GPU, as far as it can be shown without one: on a simulated accelerator (see there what it is)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec
from numpy.typing import NDArray
from oracle import make_predictor
from simulated_device import CUDA, SimulatedDevice, simulated_device

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.allocations import Place
from nnunet_lowmem.planner import Plan
from nnunet_lowmem.sliding_window import RollingWindow, TileFeed

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")

SPECS = {
    "argmax": ModelSpec(labels=7),
    "folds_and_mirroring": ModelSpec(labels=5, folds=(0, 1, 2), mirror_axes=(1, 2)),
    "regions": ModelSpec(labels={"background": 0, "a": [1, 2, 3], "b": [2, 3], "c": 3}, regions_class_order=(1, 2, 3)),
    "flat": ModelSpec(labels=4, patch_size=(24, 28), spacing=(4.2, 4.3)),
}


def labels_of(predictor: LowMemPredictor, files: list[str]) -> NDArray[Any]:
    (labels,) = predictor.predict_from_files_sequential([files], None)
    return labels


def on_device(model: str, folds: Any, **options: Any) -> tuple[LowMemPredictor, list[Plan]]:
    plans: list[Plan] = []
    predictor = LowMemPredictor(device=CUDA, allow_tqdm=False, on_plan=plans.append, **options)
    predictor.initialize_from_trained_model_folder(model, folds)
    return predictor, plans


@contextmanager
def no_waiting_in_the_tile_loop(device: SimulatedDevice, patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """From where a tile is cut out to where its logits are added."""
    begun, tiles = [], []
    feed, add = TileFeed.tile, RollingWindow.add

    def watched_tile(self: TileFeed, start: Any) -> torch.Tensor:
        begun.append(len(device.waits))
        return feed(self, start)

    def watched_add(self: RollingWindow, logits: torch.Tensor, start: Any) -> None:
        assert logits.device == CUDA
        add(self, logits, start)
        assert device.waits[begun[-1] :] == []
        tiles.append(1)

    with patch.context() as inner:
        inner.setattr(TileFeed, "tile", watched_tile)
        inner.setattr(RollingWindow, "add", watched_add)
        yield tiles


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("window_on_device", [True, False])
def test_labels_are_those_of_the_cpu_and_no_tile_waits(spec, window_on_device, images, models, monkeypatch):
    files = images("head")
    model = models(spec, files)
    expected = labels_of(make_predictor(LowMemPredictor, model, spec.folds), files)
    with simulated_device() as device, no_waiting_in_the_tile_loop(device, monkeypatch) as tiles:
        predictor, plans = on_device(model, spec.folds, perform_everything_on_device=window_on_device)
        labels = labels_of(predictor, files)
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(expected)) > 2
    assert plans[0].placement.window is (Place.VRAM if window_on_device else Place.RAM)
    assert len(tiles) > len(spec.folds)
    assert device.peak_bytes <= plans[0].projected_bytes(Place.VRAM)
