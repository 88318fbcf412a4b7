"""Constant tiles: the network sees one of those that are the same, unless somebody would miss a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.predict.logits import TileNetwork
from nnunet_lowmem.types import PreprocessedCase, once
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource
from nnunet_lowmem.window.tiling import tile_grid

pytestmark = pytest.mark.timeout(120)

MR = ModelSpec(labels=5, mirror_axes=(0, 1, 2), folds=(0, 1), normalisation=("NoNormalization",), resampling="none")
PROPERTIES = {"spacing": [3.9, 4.2, 4.3]}


@pytest.fixture
def model(models, images) -> str:
    return models(MR, images("head"))


def masked_array() -> np.ndarray:
    """One half and more is exactly -1, as masked background is after normalisation; air is nonzero for nnU-Net."""
    array = np.full((1, 60, 34, 26), -1, np.float32)
    array[:, :24] = np.random.default_rng(0).standard_normal((1, 24, 34, 26), dtype=np.float32) * 40 + 60
    return array


def labels_and_passes_of(predictor: Any) -> tuple[np.ndarray, int]:
    """Predict, and count the passes of stock's network, or of what ours makes of it, by the first convolution."""
    made: list[int] = []
    convolution = torch.nn.Conv3d._conv_forward

    def counted(self, tile, *rest):
        if tile.shape[1] == 1 and not tile.is_meta and tile.shape[2:] == (24, 28, 20):
            made.append(1)
        return convolution(self, tile, *rest)

    torch.nn.Conv3d._conv_forward = counted
    try:
        return labels_of(predictor), len(made)
    finally:
        torch.nn.Conv3d._conv_forward = convolution


def labels_of(predictor: Any) -> np.ndarray:
    return predictor.predict_single_npy_array(masked_array(), dict(PROPERTIES), None, None, False)


@pytest.mark.parametrize("mirrored", [False, True])
def test_labels_are_stocks_in_half_the_passes(model, mirrored):
    reports: list[Any] = []
    stock = make_predictor(nnUNetPredictor, model, (0, 1), use_mirroring=mirrored)
    ours = make_predictor(LowMemPredictor, model, (0, 1), use_mirroring=mirrored, on_case=reports.append)
    (expected, all_passes), (labels, passes) = map(labels_and_passes_of, (stock, ours))
    assert np.array_equal(expected, labels)
    assert 0 < passes <= 0.6 * all_passes
    grid = tile_grid(masked_array().shape[1:], MR.patch_size, 0.5)
    assert reports[-1].reused_tiles > 0.4 * 2 * grid.tile_count
    allocated = {allocation.name: allocation.size_bytes for allocation in reports[-1].plan.allocations}
    assert allocated["output of a constant tile"] == 4 * 5 * np.prod(MR.patch_size)


def test_fast_reuses_them_too(model):
    both = [make_predictor(LowMemPredictor, model, (0, 1), use_mirroring=False, fast=fast) for fast in (False, True)]
    exact, fast = both
    assert np.mean(labels_of(exact) == labels_of(fast)) > 0.999
    assert fast.run_report.done[0].reused_tiles == exact.run_report.done[0].reused_tiles > 0


def test_whoever_watches_sees_every_tile(model):
    predictor = make_predictor(LowMemPredictor, model, (0,), use_mirroring=False)
    seen: list[Any] = []
    predictor.network.register_forward_hook(lambda *_: seen.append(1))
    labels_of(predictor)
    grid = tile_grid(masked_array().shape[1:], MR.patch_size, 0.5)
    assert len(seen) == grid.tile_count
    assert predictor.run_report.done[0].reused_tiles == 0


def test_whoever_overrides_the_step_sees_every_tile(model):
    seen: list[Any] = []

    class Own(LowMemPredictor):
        def _internal_maybe_mirror_and_predict(self, x):
            seen.append(1)
            return super()._internal_maybe_mirror_and_predict(x)

    predictor = make_predictor(Own, model, (0,), use_mirroring=False)
    labels_of(predictor)
    assert len(seen) == tile_grid(masked_array().shape[1:], MR.patch_size, 0.5).tile_count


def test_without_room_for_the_output_every_tile_is_run(model, monkeypatch):
    monkeypatch.setattr(TileNetwork, "output_bytes", lambda _: 2**50)  # made up: more than any machine has
    predictor = make_predictor(LowMemPredictor, model, (0,), use_mirroring=False)
    labels_of(predictor)
    assert predictor.run_report.done[0].reused_tiles == 0


def test_the_output_that_is_kept_goes_with_the_last_tile_that_wants_it(model):
    """One is planned, and every fold makes one."""
    image = masked_array()
    grid = tile_grid(image.shape[1:], MR.patch_size, 0.5)
    stored = TileSource(PreprocessedCase(image, None, {}), grid)
    tiles = PredictedTiles(lambda tile: tile.clone(), stored, grid, torch.device("cpu"))
    told: list[int] = []
    repeated = stored.repeated()
    tiles.reuse(repeated, lambda: told.append(1))
    outputs = [tiles.next(once) for _ in range(grid.tile_count)]
    assert tiles._kept is None
    assert len(told) == len(repeated) - 1
    starts = [start for row, _ in grid.rows() for start in grid.row_tiles(row)]
    for start, output in zip(starts, outputs, strict=True):
        assert torch.equal(output, stored.tile(start)[0])
    assert len({output.data_ptr() for output in outputs}) == len(outputs), (
        "each is multiplied with its weights in place"
    )


def source(image: np.ndarray, stage: np.ndarray | None = None) -> TileSource:
    grid = tile_grid(image.shape[1:], (4, 4, 4), 1.0)
    return TileSource(PreprocessedCase(image, stage, {}), grid, (1,))


def test_repeated_tiles_are_the_largest_group_bit_by_bit():
    image = np.zeros((2, 12, 4, 4), np.float32)
    assert source(image).repeated() == {(0, 0, 0), (4, 0, 0), (8, 0, 0)}
    image[1, 4:8] = -0.0
    assert source(image).repeated() == {(0, 0, 0), (8, 0, 0)}
    image[1, 9, 2, 1] = 1
    assert source(image).repeated() == frozenset()


def test_labels_of_the_previous_stage_are_part_of_a_tile():
    image, stage = np.zeros((1, 12, 4, 4), np.float32), np.zeros((12, 4, 4), np.int8)
    stage[5, 1, 1] = 1
    assert source(image, stage).repeated() == {(0, 0, 0), (8, 0, 0)}
    stage[8:] = 1
    assert source(image, stage).repeated() == frozenset()


def test_padding_is_part_of_a_tile():
    grid = tile_grid((9, 3, 3), (4, 4, 4), 0.5)
    case = PreprocessedCase(np.zeros((1, 9, 3, 3), np.float32), None, {})
    assert len(TileSource(case, grid).repeated()) == grid.tile_count
    case = PreprocessedCase(np.ones((1, 9, 3, 3), np.float32), None, {})
    assert TileSource(case, grid).repeated() == frozenset()
