"""A case on a GPU: stock's labels, no waiting in the tile loop, VRAM within the budget.

Each test is there twice: on the simulated accelerator (`simulated_device` tells what that can show), and with
`pytest -m gpu tests/gpu` on a real CUDA device beside stock on the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray
from oracle import make_predictor
from simulated_device import simulated_device

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget.machine import vram_limit
from nnunet_lowmem.budget.plan import Plan
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.predict.logits import FoldLogits
from nnunet_lowmem.types import Place
from nnunet_lowmem.window.rolling import RollingWindow
from nnunet_lowmem.window.tiles import PredictedTiles

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")

DEVICE = "cuda:0"
ON_CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
)
ON_BOTH = pytest.mark.parametrize("accelerator", ["simulated", ON_CUDA], indirect=True)

PATCH = (32, 36, 28)
REGIONS = {"background": 0, "a": [1, 2, 3], "b": [2, 3], "c": 3}
ONE, TWO = ModelSpec(labels=7, patch_size=PATCH), ModelSpec(labels=5, patch_size=PATCH, folds=(0, 1), mirror_axes=(2,))
CASES = {
    "argmax": (ONE, True),
    "argmax, window in RAM": (ONE, False),
    "folds and mirroring": (TWO, True),
    "folds and mirroring, window in RAM": (TWO, False),
    "regions": (ModelSpec(labels=REGIONS, regions_class_order=(1, 2, 3), patch_size=PATCH), True),
    "flat, window in RAM": (ModelSpec(labels=4, patch_size=(44, 52), spacing=(4.2, 4.3)), False),
}


@contextmanager
def deterministic() -> Iterator[None]:
    """Same algorithms in every run; stock switches the search on whenever a predictor is made."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> str:
    """Device on which stock runs: the simulated one would need more of CUDA than it has."""
    return DEVICE if request.param == "cuda" else "cpu"


@contextmanager
def running(accelerator: str) -> Iterator[None]:
    if accelerator == DEVICE:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with deterministic():
            yield
    else:
        with simulated_device():
            yield


def labels_of(predictor: nnUNetPredictor, files: list[str]) -> NDArray[Any]:
    with deterministic():
        (labels,) = predictor.predict_from_files_sequential([files], None)
    return labels


@cache
def stocks_labels(accelerator: str, model: str, folds: Any, case: tuple[str, ...], on_device: bool) -> NDArray[Any]:
    predictor = make_predictor(nnUNetPredictor, model, folds, accelerator, perform_everything_on_device=on_device)
    return labels_of(predictor, list(case))


@contextmanager
def no_waiting_in_the_tile_loop() -> Iterator[list[int]]:
    """From where a tile is cut out to where its logits are added; the first, which is measured, is waited for."""
    tiles: list[int] = []
    predict, add = PredictedTiles.next, RollingWindow.add

    def watched_tile(self: PredictedTiles, attempt: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return predict(self, attempt)

    def watched_add(self: RollingWindow, logits: torch.Tensor, start: Any) -> None:
        add(self, logits, start)
        torch.cuda.set_sync_debug_mode("default")
        if logits.device == torch.device(DEVICE):  # kernels are warmed up on the CPU
            tiles.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictedTiles, "next", watched_tile)
        patch.setattr(RollingWindow, "add", watched_add)
        try:
            yield tiles
        finally:
            torch.cuda.set_sync_debug_mode("default")


@ON_BOTH
@pytest.mark.parametrize("spec, window_on_device", CASES.values(), ids=CASES)
def test_labels_are_stocks_and_no_tile_waits(spec, window_on_device, accelerator, images, models):
    files = images("head")
    model = models(spec, files)
    options = {"perform_everything_on_device": window_on_device}
    expected = stocks_labels(accelerator, model, spec.folds, tuple(files), window_on_device and accelerator == DEVICE)
    plans: list[Plan] = []
    with running(accelerator), no_waiting_in_the_tile_loop() as tiles:
        predictor = make_predictor(LowMemPredictor, model, spec.folds, DEVICE, on_plan=plans.append, **options)
        labels = labels_of(predictor, files)
        assert torch.cuda.max_memory_allocated() <= plans[0].projected_bytes(Place.VRAM)
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(expected)) > 2
    assert plans[0].placement.window is (Place.VRAM if window_on_device else Place.RAM)
    assert len(tiles) > len(spec.folds)


@ON_BOTH
@pytest.mark.parametrize("name", ["argmax", "folds and mirroring", "argmax, window in RAM"])
def test_labels_of_a_part_are_those_of_stocks_whole_run(name, accelerator, images, models, tmp_path):
    (spec, window_on_device), files = CASES[name], images("head")
    model, on_device = models(spec, files), window_on_device and accelerator == DEVICE
    expected = stocks_labels(accelerator, model, spec.folds, tuple(files), on_device)
    image = SimpleITK.ReadImage(files[0])
    mask = np.zeros(expected.shape, np.uint8)
    mask[2:9, 5:12, 3:30] = mask[30:33, 30:41, 20:30] = 1
    written = SimpleITK.GetImageFromArray(mask)
    written.CopyInformation(image)
    SimpleITK.WriteImage(written, str(tmp_path / "mask.nii.gz"))
    box = (slice(4, 31), slice(8, 20), slice(0, 25))
    for options in ({"bbox": box}, {"bbox": box, "roi": tmp_path / "mask.nii.gz"}):
        plans: list[Plan] = []
        given = {"perform_everything_on_device": window_on_device, "on_plan": plans.append, **options}
        with running(accelerator):
            labels = labels_of(make_predictor(LowMemPredictor, model, spec.folds, DEVICE, **given), files)
            assert torch.cuda.max_memory_allocated() <= plans[0].projected_bytes(Place.VRAM)
        np.testing.assert_array_equal(labels, (np.where(mask, expected, 0) if "roi" in options else expected)[box])


@ON_BOTH
def test_vram_stays_within_what_was_asked_for(accelerator, images, models):
    """From room for all to too little; the driver says that there is more."""
    files = images("head")
    spec = ModelSpec(labels=60, patch_size=PATCH)
    model = models(spec, files)
    expected = stocks_labels(accelerator, model, spec.folds, tuple(files), accelerator == DEVICE)
    placements, refusals = set(), []
    for mebibytes in (400, 48, 12, 3):
        plans: list[Plan] = []
        with running(accelerator):
            predictor = make_predictor(
                LowMemPredictor, model, spec.folds, DEVICE, on_plan=plans.append, max_vram=mebibytes << 20
            )
            try:
                labels = labels_of(predictor, files)
            except CasesFailedError as error:
                refusals.append(str(error))
                continue
            assert torch.cuda.max_memory_allocated() <= plans[0].projected_bytes(Place.VRAM) <= mebibytes << 20
            assert torch.cuda.max_memory_reserved() <= mebibytes << 20
            assert torch.cuda.get_per_process_memory_fraction() == 1
        np.testing.assert_array_equal(labels, expected)
        placements.add((plans[0].placement.window, plans[0].placement.block_bytes, plans[0].placement.slab_planes))
    assert len(placements) >= (2 if accelerator == DEVICE else 3)
    assert refusals
    assert all("VRAM" in refusal or "out of memory" in refusal for refusal in refusals)


def test_what_torch_keeps_of_one_case_is_there_for_the_next(images, models):
    """Only simulated, where the same is kept each time."""
    files = images("head")
    model = models(ModelSpec(labels=60, patch_size=PATCH), files)
    plans: list[Plan] = []
    with simulated_device():
        predictor = make_predictor(LowMemPredictor, model, device=DEVICE, on_plan=plans.append, max_vram=48 << 20)
        with deterministic():
            predictor.predict_from_files_sequential([files, files, files], None)
    assert len({plan.placement for plan in plans}) == 1
    assert plans[2].projected_bytes(Place.VRAM) <= plans[1].projected_bytes(Place.VRAM)


def test_a_window_in_ram_is_added_to_on_all_cores(images, models, monkeypatch):
    """Stock's command leaves torch a single thread beside a GPU."""
    files = images("head")
    seen, add = set(), RollingWindow.add

    def watched(self: RollingWindow, logits: torch.Tensor, start: Any) -> None:
        seen.add(torch.get_num_threads())
        add(self, logits, start)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with simulated_device():
            options = {"perform_everything_on_device": False, "kernel_threads": 3}
            predictor = make_predictor(LowMemPredictor, models(ONE, files), device=DEVICE, **options)
            monkeypatch.setattr(RollingWindow, "add", watched)
            labels_of(predictor, files)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert 3 in seen


def test_limit_for_a_device_without_a_number():
    """Which is what nnU-Net's predictor has unless it is told otherwise."""
    with simulated_device(2**30) as device:
        with vram_limit("256M", torch.device("cuda")):
            assert device.allowed_bytes == 2**28
        assert device.allowed_bytes == 2**30


def test_all_logits_are_in_ram_where_the_device_has_no_room_for_them(images, models, caplog):
    """The method that other tools call for all logits, as stock's."""
    files = images("head")
    model = models(ModelSpec(labels=60, patch_size=PATCH), files)
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 60, 50, 40), np.float32))
    expected = make_predictor(LowMemPredictor, model).predict_sliding_window_return_logits(image)
    with simulated_device(24 << 20):
        predictor = make_predictor(LowMemPredictor, model, device=DEVICE)
        predictor.network = predictor.network.to(DEVICE)
        with torch.inference_mode():
            logits = predictor.predict_sliding_window_return_logits(image)
    assert "once more with all logits in RAM" in caplog.text
    assert torch.equal(logits, expected)


def test_a_device_that_has_less_than_it_says_costs_no_label(images, models, caplog):
    """Only simulated: nobody else takes memory of a real device at the right moment."""
    files = images("head")
    model = models(ModelSpec(labels=60, patch_size=PATCH), files)
    with simulated_device() as device:
        expected = labels_of(make_predictor(LowMemPredictor, model, device=DEVICE), files)
    for share in (0.95, 0.75):
        caplog.clear()
        capacity_bytes = int(share * device.peak_bytes)
        with simulated_device(capacity_bytes, said_bytes=2**33) as smaller:
            labels = labels_of(make_predictor(LowMemPredictor, model, device=DEVICE), files)
        np.testing.assert_array_equal(labels, expected)
        assert smaller.peak_bytes <= capacity_bytes
        assert "VRAM ran out" in caplog.text


def test_memory_that_is_taken_before_the_window_is_made_costs_no_label(images, models, caplog, monkeypatch):
    files = images("head")
    model = models(ONE, files)
    make_window = FoldLogits.window
    expected = labels_of(make_predictor(LowMemPredictor, model), files)
    with simulated_device(said_bytes=2**33) as device:

        def crowded(self: FoldLogits, threads: Any, place: Place, *more: Any) -> RollingWindow:
            free, device.capacity_bytes = device.capacity_bytes, device.live_bytes + 2**16
            try:
                return make_window(self, threads, place, *more)
            finally:
                device.capacity_bytes = free

        monkeypatch.setattr(FoldLogits, "window", crowded)
        labels = labels_of(make_predictor(LowMemPredictor, model, device=DEVICE), files)
    np.testing.assert_array_equal(labels, expected)
    assert "window in RAM" in caplog.text
