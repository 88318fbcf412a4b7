"""Every large array of a case under a placement: what, where, how large, and in which stages it is alive.

Pure numbers, for `planner`. A constant here is a size that was measured or counted, with the reason beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from nnunet_lowmem.budget.facts import CaseFacts, ModelFacts
from nnunet_lowmem.system.memory_limits import RamLimit
from nnunet_lowmem.types import Place, Shape3, SlabLimits

MIB = 2**20
HALF_BYTES = 2
SINGLE_BYTES = 4
# winner index, gap exponent and magnitude exponent of a surveyed voxel
_SURVEY_BYTES = 4
# the same with torch operations: best and lower logits, their temporaries in float32, exponents
_DEVICE_SURVEY_BYTES = 40
# per output voxel there: extremes over the corners, masks, the label as int64, the list of boundary voxels
_DEVICE_OUTPUT_BYTES = 72
# of a plane that is checked for infinity: a copy without sign and three masks
_CHECK_BYTES = 5
# weight of a tile's voxels as half and as float32
_IMPORTANCE_BYTES = 6
# freed blocks below glibc's largest threshold for mapping (32 MiB) stay with the process, at most twice that at the top
HEAP_BYTES = 64 * MIB
# stack, and blocks of a few MiB that a kernel's thread reads and normalises
THREAD_BYTES = 16 * MIB
# of a winner that becomes a label: the number as an index, and the label
_LOOKUP_BYTES = 10
# a process that has imported torch and nnU-Net, and compiled the kernels of preprocessing
WORKER_BYTES = 640 * MIB


class Stage(Enum):
    """Stages of a case that follow each other; labelling runs inside prediction, slab by slab."""

    READING = "reading"
    PREPROCESSING = "preprocessing"
    LOADING = "loading weights"
    PREDICTION = "prediction"
    EXPORT = "export"
    WRITING = "writing"


@dataclass(frozen=True)
class Origins:
    """Where the limits of a budget come from, for whoever has to be told.

    Attributes
    ----------
    ram_asked, vram_asked : bool
        A flag, or the variable of its name, sets the limit; else what is free.
    machine : RamLimit or None
        The tightest bound of the machine as it was then; None where none is known.
    in_use_bytes : int
        What this process held then.
    folder : str
        For temporary files.
    nothing_spilled_because : str
        What the folder is or does that rules it out; empty if arrays can be spilled there.
    """

    ram_asked: bool = True
    vram_asked: bool = True
    machine: RamLimit | None = None
    in_use_bytes: int = 0
    folder: str = ""
    nothing_spilled_because: str = ""


@dataclass(frozen=True)
class Budget:
    """Limits in bytes, and what is already in use; None means no limit is known (no such device).

    Attributes
    ----------
    ram_bytes, vram_bytes, disk_bytes : int or None
        Disk: what is free in the folder for temporary files; 0 where that folder is itself kept in RAM.
    reserved_ram_bytes, reserved_vram_bytes : int
    origins : Origins
        Of these; no plan depends on it.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    reserved_ram_bytes: int = 0
    reserved_vram_bytes: int = 0
    disk_bytes: int | None = None
    origins: Origins = field(default=Origins(), compare=False)

    def limit(self, place: Place) -> int | None:
        """Return the limit of a place."""
        return {Place.RAM: self.ram_bytes, Place.VRAM: self.vram_bytes, Place.DISK: self.disk_bytes}[place]

    def reserved(self, place: Place) -> int:
        """Return what is in use before the plan begins."""
        return {Place.RAM: self.reserved_ram_bytes, Place.VRAM: self.reserved_vram_bytes, Place.DISK: 0}[place]

    def with_in_use(self, ram_bytes: int) -> Budget:
        """Return the budget with so much more RAM in use, or less."""
        return replace(self, reserved_ram_bytes=self.reserved_ram_bytes + ram_bytes)


@dataclass(frozen=True)
class Placement:
    """What there is to choose; the first of the values named is the fastest.

    Attributes
    ----------
    window : Place
        Of the rolling window: VRAM (on CUDA), RAM, disk.
    image : Place
        RAM or disk.
    label_map : Place or None
        RAM or disk; None where labels go to their file as they become final.
    planes : Place
        Of finished planes outside the window (sum over folds, heads needed as a whole): RAM or disk; many always go to
        disk where there is room.
    threads : int
        Of the compiled kernels: all, or one.
    slab_planes : int or None
        Network planes whose labels are found at a time: all that are final, or few.
    block_bytes : int
        Working memory of labelling on a device: large or small, which is how many classes are interpolated at a time.
    input : Place
        The input image: RAM, or where it is stored, on disk.
    weights : Place
        Of all folds, where each is copied from before it is used: RAM or disk.
    columns : int, 3
        Into how many pieces planes are cut along each axis, each predicted by itself.
    """

    window: Place = Place.RAM
    image: Place = Place.RAM
    label_map: Place | None = Place.RAM
    planes: Place = Place.RAM
    threads: int = 1
    slab_planes: int | None = None
    block_bytes: int = 256 * MIB
    weights: Place = Place.RAM
    input: Place = Place.RAM
    columns: Shape3 = (1, 1, 1)

    @property
    def slab_limits(self) -> SlabLimits:
        """For whoever labels."""
        return SlabLimits(self.slab_planes, self.block_bytes)

    def in_words(self) -> str:
        """Name what is not in the fastest place."""
        places = {
            "input": self.input,
            "window": self.window,
            "image": self.image,
            "label map": self.label_map,
            "finished planes": self.planes,
            "weights": self.weights,
        }
        spilled = [name for name, place in places.items() if place is Place.DISK]
        cut = f" for one of {count} columns" if (count := math.prod(self.columns)) > 1 else ""
        leaves = "; labels straight to their file" if self.label_map is None else ""
        return f"window in {self.window.value}{cut}" + (f"; on disk: {', '.join(spilled)}" if spilled else "") + leaves


@dataclass(frozen=True)
class Allocation:
    """One large array: what, where, how large, and in which stages it is alive."""

    name: str
    place: Place
    size_bytes: int
    stages: tuple[Stage, ...]


def allocations(model: ModelFacts, case: CaseFacts, placement: Placement) -> Iterator[Allocation]:
    """Every large array of a case under a placement."""
    case = case.cut(placement.columns)
    compute = Place.VRAM if model.device == "cuda" else Place.RAM
    predict = (Stage.PREDICTION,)
    with_window = (Stage.LOADING, Stage.PREDICTION)
    from_prediction = (Stage.PREDICTION, Stage.EXPORT, Stage.WRITING)
    ram = Place.RAM

    yield from _input_allocations(case, placement)
    if case.previous_stage_bytes:
        yield Allocation("labels of the previous stage", ram, case.previous_stage_bytes, tuple(Stage)[1:])
    if case.region_bytes:
        yield Allocation("mask of the region", ram, case.region_bytes, tuple(Stage))
    yield Allocation("threads of the kernels", ram, placement.threads * THREAD_BYTES, tuple(Stage)[1:])
    yield Allocation("freed blocks that the allocator keeps", ram, HEAP_BYTES, tuple(Stage))
    if model.worker_bytes:
        yield Allocation("process that preprocesses the next case", ram, model.worker_bytes, tuple(Stage))
    if model.kept_bytes:
        yield Allocation("weights of all folds", placement.weights, model.kept_bytes, tuple(Stage))
    if model.weight_bytes:
        # in RAM they are from the start
        stages = tuple(Stage) if compute is ram else tuple(Stage)[2:]
        yield Allocation("weights of the network", compute, model.weight_bytes, stages)
    yield Allocation("network on one tile", compute, model.activation_bytes + model.unmeasured_bytes, predict)
    if model.reused_bytes:
        yield Allocation("output of a constant tile", compute, model.reused_bytes, predict)
    yield from _window_allocations(model, case, placement, compute, with_window)
    if case.next_stages_bytes:
        yield Allocation("labels for the next stages", ram, case.next_stages_bytes, predict)
    if case.held_logits_bytes:
        held = case.held_logits_bytes
        yield Allocation("all logits, which an overridden method makes", ram, held, (Stage.PREDICTION, Stage.EXPORT))
    if placement.label_map is None:
        block_bytes = _labelled_voxels(case, placement) * model.label_bytes + case.writer_bytes
        yield Allocation("labels on their way to their file", ram, block_bytes, predict)
    else:
        label_map_bytes = math.prod(case.original_shape) * model.label_bytes
        yield Allocation("label map", placement.label_map, label_map_bytes, from_prediction)
    yield Allocation("what writing takes beside the label map", ram, case.writer_bytes, (Stage.WRITING,))
    if not case.streams:
        logits_bytes = finished_bytes(model, case)
        yield Allocation("finished logits", placement.planes, logits_bytes, (Stage.PREDICTION, Stage.EXPORT))
        yield Allocation("heads being resampled", ram, case.export_bytes, (Stage.EXPORT,))


def _input_allocations(case: CaseFacts, placement: Placement) -> Iterator[Allocation]:
    ram, given, from_preprocessing = Place.RAM, case.input, tuple(Stage)[1:]
    is_on_disk = placement.input is Place.DISK
    is_image = is_on_disk and given.is_image
    kept_bytes = given.block_bytes if is_on_disk else given.kept_bytes
    if is_on_disk:
        stages = tuple(Stage) if is_image else (Stage.READING, Stage.PREPROCESSING)
        yield Allocation("input image", Place.DISK, (given.spilled_bytes or 0) + given.mask_bytes, stages)
    reading_bytes = max(kept_bytes + case.reading_bytes, case.region_reading_bytes)
    yield Allocation("input image while it is read", ram, reading_bytes, (Stage.READING,))
    working_bytes = kept_bytes + (0 if is_on_disk else given.mask_bytes) + case.preprocessing_bytes
    yield Allocation("input image and working arrays", ram, working_bytes, (Stage.PREPROCESSING,))
    if not is_image:
        yield Allocation("preprocessed image", placement.image, case.image_bytes, from_preprocessing)
        return
    tile_bytes = math.prod(case.grid.tile_shape) * given.tile_voxel_bytes
    yield Allocation("tile of the input on its way", ram, tile_bytes, (Stage.PREDICTION,))


def _window_allocations(
    model: ModelFacts, case: CaseFacts, placement: Placement, compute: Place, stages: tuple[Stage, ...]
) -> Iterator[Allocation]:
    grid, predict = case.grid, (Stage.PREDICTION,)
    near = Place.VRAM if placement.window is Place.VRAM else Place.RAM
    tile_voxels = math.prod(grid.tile_shape)
    depth = grid.tile_shape[grid.roll_axis] + 1
    plane_voxels = math.prod(grid.padded_shape) // grid.padded_shape[grid.roll_axis]
    plane_bytes = model.heads * plane_voxels * HALF_BYTES
    window_bytes = model.heads * depth * plane_voxels * HALF_BYTES
    yield Allocation("rolling window", placement.window, window_bytes, stages)
    weights_bytes = depth * plane_voxels * HALF_BYTES + tile_voxels * _IMPORTANCE_BYTES
    yield Allocation("weights of voxels and tiles", near, weights_bytes, stages)
    planes = _labelled_planes(case, placement)
    # by torch on a device, and of a window that is moved from there; a window in RAM is checked as it is divided
    check_bytes = model.heads * plane_voxels * _CHECK_BYTES
    if near is Place.VRAM:
        outputs = _labelled_voxels(case, placement)
        slab_bytes = planes * plane_voxels * _DEVICE_SURVEY_BYTES + outputs * _DEVICE_OUTPUT_BYTES
        yield Allocation("labels of a slab", near, max(check_bytes, slab_bytes + placement.block_bytes), predict)
        row = math.prod(case.cropped_shape[1:])
        # a buffer that had to grow leaves smaller ones behind, less than its own size in all
        winners_bytes = 2 * page_locked_bytes(outputs * HALF_BYTES) + row * _LOOKUP_BYTES
        yield Allocation("winners of a slab", Place.RAM, winners_bytes, predict)
    else:
        moved_bytes = check_bytes if compute is Place.VRAM else 0
        yield Allocation("labels of a slab", near, max(moved_bytes, planes * plane_voxels * _SURVEY_BYTES), predict)
    if compute is Place.VRAM:
        tiles_bytes = 2 * page_locked_bytes(model.channels * tile_voxels * SINGLE_BYTES)
        if near is Place.RAM:
            tiles_bytes += page_locked_bytes(model.heads * tile_voxels * SINGLE_BYTES)
        yield Allocation("tiles on their way", Place.RAM, tiles_bytes, predict)
    if model.folds > 1:
        yield Allocation("sum over folds", placement.planes, finished_bytes(model, case), predict)
        sum_bytes = 2 * plane_bytes + (check_bytes if near is Place.RAM else 0)
        yield Allocation("plane of the sum", Place.RAM, sum_bytes, predict)


def _labelled_planes(case: CaseFacts, placement: Placement) -> int:
    """Planes of the network grid that are labelled at a time, at most."""
    depth = case.grid.tile_shape[case.grid.roll_axis] + 1
    return depth if placement.slab_planes is None else min(depth, placement.slab_planes)


def _labelled_voxels(case: CaseFacts, placement: Placement) -> int:
    """Voxels of the label map that those become."""
    planes = _labelled_planes(case, placement)
    return -(-planes * math.prod(case.cropped_shape) // case.grid.image_shape[case.grid.roll_axis])


def page_locked_bytes(size_bytes: int) -> int:
    """Return what torch takes for a page-locked buffer: the next power of two, which it keeps for the next one."""
    return 1 << max(0, size_bytes - 1).bit_length()


def finished_bytes(model: ModelFacts, case: CaseFacts) -> int:
    """Bytes of all finished logits: the running sum over folds, or where heads are needed as a whole."""
    return model.heads * math.prod(case.grid.image_shape) * HALF_BYTES
