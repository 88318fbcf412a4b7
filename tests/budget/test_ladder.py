"""Every rung of the ladder, driven by a simulated accelerator that runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from simulated_device import CUDA, simulated_device
from torch import nn

from nnunet_lowmem.boxes import whole
from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.budget.ladder import Recovery
from nnunet_lowmem.budget.planner import all_plans, plan_case
from nnunet_lowmem.errors import MemoryExhaustedError
from nnunet_lowmem.labels.labeller import Labelling, LabelMap, SlabLabeller
from nnunet_lowmem.labels.resampling import resampling_tables
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.network.tile_memory import LiveTensorBytes
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.types import Box, Place, PreprocessedCase
from nnunet_lowmem.window import rolling
from nnunet_lowmem.window.rolling import RollingWindow, roll
from nnunet_lowmem.window.tiles import PredictedTiles, TileSource
from nnunet_lowmem.window.tiling import tile_grid

MIB = 2**20


@dataclass
class Task:
    """A random image, a network of one convolution, and the labels without any limit."""

    heads: int
    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    output: tuple[int, int, int]
    autocast: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.heads)
        self.grid = tile_grid(self.shape, self.patch, 0.5)
        image = np.random.default_rng(1).standard_normal((1, *self.shape), np.float32)
        self.case = PreprocessedCase(image, None, {})
        self.convolution = nn.Conv3d(1, self.heads, 3, padding=1).requires_grad_(False)
        self.convolution.weight.data = torch.randn(self.convolution.weight.shape, generator=generator)
        with torch.inference_mode(), LiveTensorBytes() as counter:
            self.network(torch.zeros((1, 1, *self.patch), device="meta"))
        self.activation_bytes = counter.peak_bytes + 4 * int(np.prod(self.patch))
        self.tables = resampling_tables(self.shape, self.output, None)
        self.rule = LabelRule(True, np.arange(self.heads + 1, dtype=np.uint16), np.dtype(np.uint8))

    def network(self, tile: torch.Tensor) -> torch.Tensor:
        weights = self.convolution.weight.to(tile.device), self.convolution.bias.to(tile.device)
        logits = nn.functional.conv3d(tile, *weights, padding=1)
        return logits.half() if self.autocast else logits

    def plans(self, budget: Budget) -> tuple:
        model = ModelFacts(self.heads, 1, 1, 0, self.activation_bytes, 1, device="cuda")
        case = CaseFacts("sim", self.grid, self.output, self.output, True, 0, 0, 0, image_place=Place.RAM)
        return plan_case(model, case, budget), list(all_plans(model, case, budget))

    def predict(
        self, recovery: Recovery, folder, capacity_bytes: int, with_data: bool = True
    ) -> tuple[np.ndarray, int]:
        labels, written = np.zeros(self.output, np.uint8), []
        chosen = recovery.plan.placement
        accelerator = simulated_device(capacity_bytes, with_data=with_data)
        with RowThreads(1) as threads, accelerator as device, torch.inference_mode():
            near = CUDA if chosen.window is Place.VRAM else "cpu"
            importance = torch.ones(self.grid.tile_shape, dtype=torch.half, device=near)
            spill = folder if chosen.window is Place.DISK else None
            window = RollingWindow(self.grid, self.heads, importance, threads, spill, recovery.run)

            how = Labelling(self.rule, threads, lambda: recovery.plan.placement.slab_limits, recovery.run)
            labeller = SlabLabeller(self.tables, how, Put(labels), whole(self.output))
            tiles = PredictedTiles(self.network, TileSource(self.case, self.grid), self.grid, CUDA)
            with recovery.followed_by(lambda plan: window.move_to(plan.placement.window, folder)):
                for slab in roll(tiles, self.grid, window, lambda: None, None):
                    labeller.add(slab)
                    written.append((slab.axis, np.moveaxis(labels, slab.axis, 0)[: labeller.written].copy()))
            labeller.finish()
        for axis, planes in written:  # what is told to be there was there, wherever the window has been moved meanwhile
            np.testing.assert_array_equal(planes, np.moveaxis(labels, axis, 0)[: len(planes)])
        return labels, device.peak_bytes


class Put(LabelMap):
    """Takes each plane once, from a block of its own, as a file would."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__(labels)
        self.is_put = np.zeros(labels.shape, np.bool_)

    def block(self, box: Box) -> np.ndarray:
        return np.zeros([part.stop - part.start for part in box], self._labels.dtype)

    def put(self, box: Box, values: np.ndarray) -> None:
        assert not self.is_put[box].any()
        self.is_put[box] = True
        super().put(box, values)


@pytest.fixture(autouse=True)
def _plane_by_plane(monkeypatch) -> None:
    """Let a window on disk be mapped a plane at a time, as that of a large case is."""
    monkeypatch.setattr(rolling, "_MAPPED_BYTES", 1)


TASKS = [
    Task(5, (40, 30, 32), (16, 16, 16), (55, 41, 60)),
    Task(40, (40, 30, 32), (16, 16, 16), (40, 30, 32)),
    Task(12, (12, 60, 50), (24, 20, 24), (30, 75, 90), autocast=True),
]
EVERY_TASK = [
    pytest.param(task, id=f"{task.heads} heads", marks=[pytest.mark.slow] if task.heads == 40 else []) for task in TASKS
]


@pytest.mark.parametrize("task", EVERY_TASK)
def test_vram_stays_within_the_budget_and_the_labels_are_the_same(task, tmp_path):
    roomy, _ = task.plans(Budget())
    expected, peak = task.predict(Recovery(roomy, ()), tmp_path, 2**40)
    assert roomy.placement.window is Place.VRAM
    assert peak <= roomy.projected_bytes(Place.VRAM)
    seen = set()
    for vram in np.linspace(task.activation_bytes, roomy.projected_bytes(Place.VRAM), 6).astype(int):
        plan, _ = task.plans(Budget(vram_bytes=int(vram)))
        labels, peak = task.predict(Recovery(plan, ()), tmp_path, 2**40)
        if plan.placement.window is Place.VRAM:
            assert peak <= plan.projected_bytes(Place.VRAM) <= vram
        np.testing.assert_array_equal(labels, expected)
        seen.add((plan.placement.window, plan.placement.block_bytes, plan.placement.slab_planes))
    assert len(seen) >= 3


@pytest.mark.parametrize(
    "heads, shape, patch, output",
    [
        pytest.param(40, (150, 110, 110), (96, 96, 96), (100, 90, 80), marks=pytest.mark.slow),
        (15, (140, 150, 140), (128, 128, 128), (90, 80, 100)),
    ],
)
def test_vram_of_full_tiles_is_what_the_plan_says(heads, shape, patch, output, tmp_path):
    """Counted without data, with every voxel on a boundary: the most that can be."""
    task = Task(heads, shape, patch, output)
    _, plans = task.plans(Budget())
    on_device = [plan for plan in plans if plan.placement.window is Place.VRAM]
    for plan in (on_device[0], min(on_device, key=lambda plan: plan.projected_bytes(Place.VRAM))):
        _, peak = task.predict(Recovery(plan, ()), tmp_path, 2**50, with_data=False)
        assert 0.35 * plan.projected_bytes(Place.VRAM) <= peak <= plan.projected_bytes(Place.VRAM)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_memory_that_is_gone_costs_no_tile_and_no_label(task, tmp_path, caplog):
    plan, plans = task.plans(Budget())
    expected, peak = task.predict(Recovery(plan, plans), tmp_path, 2**40)
    tiles, rungs = [], set()
    network = task.network
    try:
        task.network = lambda tile: tiles.append(1) or network(tile)
        for capacity in np.linspace(0.3 * peak, 0.99 * peak, 6).astype(int):
            tiles.clear()
            recovery = Recovery(plan, plans)
            try:
                labels, within = task.predict(recovery, tmp_path, int(capacity))
            except MemoryExhaustedError:
                continue
            except torch.cuda.OutOfMemoryError:  # not even the empty window: no tile has been lost
                assert not tiles
                continue
            np.testing.assert_array_equal(labels, expected)
            assert within <= capacity
            # one failed attempt per step at most
            assert task.grid.tile_count <= len(tiles) <= task.grid.tile_count + len(recovery.steps)
            assert all("GiB projected to" in step for step in recovery.steps)
            rungs.update([recovery.plan.placement.window, recovery.plan.placement.block_bytes] * bool(recovery.steps))
    finally:
        del task.network
    assert (Place.RAM if task.heads != 12 else 16 * MIB) in rungs
    assert "case sim: VRAM ran out" in caplog.text


def test_window_goes_to_disk_when_ram_runs_out(tmp_path):
    task = TASKS[0]
    plan, plans = task.plans(Budget(vram_bytes=task.activation_bytes + MIB))
    expected, _ = task.predict(Recovery(plan, plans), tmp_path, 2**40)
    assert plan.placement.window is Place.RAM
    recovery = Recovery(plan, plans)
    failures = iter([False] * 5 + [True] * 2)
    network = task.network

    def failing(tile: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise MemoryError("Unable to allocate 1 GiB")
        return network(tile)

    try:
        task.network = failing
        labels, _ = task.predict(recovery, tmp_path, 2**40)
    finally:
        del task.network
    np.testing.assert_array_equal(labels, expected)
    assert len(recovery.steps) == 2
    assert recovery.plan.placement.window is Place.DISK


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("no"), KeyError("x")])
def test_other_errors_pass_through(error):
    plan, plans = TASKS[0].plans(Budget())
    recovery = Recovery(plan, plans)

    def operation() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        recovery.run(operation)
    assert caught.value is error
    assert recovery.steps == []


def test_the_last_rung_tells_the_whole_story():
    plan, plans = TASKS[0].plans(Budget())
    recovery = Recovery(plan, plans)

    def operation() -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate 5 GiB")

    with pytest.raises(MemoryExhaustedError) as caught:
        recovery.run(operation)
    assert 1 <= len(recovery.steps) < len(plans)
    assert all(step in str(caught.value) for step in recovery.steps)
    assert "case sim" in str(caught.value)
