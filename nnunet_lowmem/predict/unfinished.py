"""Labels of a case that is not finished yet, beside the file to be: a run that was killed goes on where it was.

Whatever ends a process leaves this file alone; it goes when the case is done. Chunks are appended, each a box of the
label map with a checksum, so that what a kill or a power cut has torn is the last one and shows itself. A run that
continues reads the files of others and begins its own, so no two processes write to one. Where several processes
label a case, each leaves its box this way, and the last joins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.boxes import NOTHING, common, joined, moved
from nnunet_lowmem.errors import UsageError, WriteError, because
from nnunet_lowmem.labels.heads import Keeper
from nnunet_lowmem.labels.labeller import LabelMap
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.network import choices
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.records import Recipe, states
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.preprocessing.reading import counted_by
from nnunet_lowmem.system.owned_folders import is_left_over, owned_name
from nnunet_lowmem.system.placing import flush
from nnunet_lowmem.types import Box, Shape3, shape3
from nnunet_lowmem.volumes.formats import read_header

logger = logging.getLogger(__name__)

_KIND = "lowmem_unfinished"
#: Seconds between two looks at what is final: what a kill costs, beside one window.
EVERY_S = 60.0
#: Seconds that a part of a case of several folds may take, before a kill costs that much.
PART_S = 1800.0
#: What cuts may cost, of all tiles.
SHARE_OF_CUTS = 0.2
# start and stop along three axes, bytes, and a checksum of these and of what follows
_CHUNK = struct.Struct("<7QI")


@dataclass(frozen=True)
class Key:
    """What labels can be continued by.

    Attributes
    ----------
    made_with : str
        Checksum of model, options, input and torch.
    shape : int, 3
        Of the label map, axes of the network.
    dtype : str
    arithmetic : str
        In which the network was run.
    """

    made_with: str
    shape: Shape3
    dtype: str
    arithmetic: str

    @property
    def line(self) -> bytes:
        """With which a file begins."""
        return json.dumps([vars(self)[name] for name in Key.__annotations__]).encode() + b"\n"


class Unfinished(Keeper):
    """Keeps boxes of one label map as they become final.

    Parameters
    ----------
    output : Path
        The file to be.
    key : Key
    continues : bool
        Take over what an earlier run has left.
    folds : int
    step_size : float
        Between tiles, as a share of the patch.
    arithmetic : callable
        Tells in which the network is run by now.
    within : 3 slices or None
        Where in the label map all lies that is labelled here; others label the rest.
    """

    def __init__(
        self,
        output: Path,
        key: Key,
        continues: bool,
        folds: int,
        step_size: float,
        arithmetic: Callable[[], str],
        within: Box | None = None,
    ) -> None:
        super().__init__()
        assert within is None or not continues, "what is found is all of a case"
        self._output, self._key, self._arithmetic = output, key, arithmetic
        self._own = output.parent / f"{owned_name(_KIND, secrets.token_hex(4))}.{_digest(output)}"
        self._continues, self._folds, self._rows_again = continues, folds, math.ceil(1 / step_size)
        self._earlier = _kept(output, key) if continues else []
        self.found = _joined(box for earlier in self._earlier for box in earlier.boxes)
        self._within = within
        self._pending: list[Box] = []
        self._is_begun, self._last_s = False, time.monotonic()
        self._is_given_up = False

    @property
    def made_with(self) -> str:
        """Checksum of all that the labels depend on."""
        return self._key.made_with

    def counts(self, part: Part, columns: Shape3, seconds: float) -> Shape3:
        """As it says; a long case of several folds is cut along its columns, too, each box with all folds.

        Only for who has said that the run is to be continued: every cut computes again the rows of tiles that reach
        across it, which is `SHARE_OF_CUTS` of all at most.
        """
        if not self._continues or self._folds < 2:
            return columns
        axis = part.grid.roll_axis
        most = 1 + int(SHARE_OF_CUTS * len(part.grid.starts[axis]) / self._rows_again)
        counts = list(columns)
        counts[axis] = max(1, min(most, math.ceil(seconds / PART_S / math.prod(columns))))
        return shape3(counts)

    def label_map(self, make: Callable[[], LabelMap]) -> LabelMap:
        """Return the map, which is filled with what was found when it is asked for first.

        Raises
        ------
        UsageError
            If that is gone.
        """
        is_new = self._labels is None
        labels = super().label_map(make)
        if is_new and self._earlier:
            self._fill(labels)
        return labels

    def _fill(self, labels: LabelMap) -> None:
        found: list[Box] = []
        for earlier in self._earlier:
            boxes: list[Box] = []
            for chunk in _chunks(earlier.file, self._key, earlier.size_bytes):
                labels.put(chunk.box, chunk.values)
                _append(boxes, chunk.box)
            found += boxes
        boxes = _joined(found)
        if boxes != self.found:
            held, holds = (f"{_voxels(found):,} labelled voxels" for found in (self.found, boxes))
            names = ", ".join(earlier.file.name for earlier in self._earlier)
            raise UsageError(f"{names} held {held} when the case began, now it holds {holds}: run again")
        share = 100 * _voxels(boxes) / math.prod(self._key.shape)
        logger.info("goes on behind %.1f %% of the label map, which is labelled", share)

    def labelled(self, labels: LabelMap, box: Box, ends: bool = False) -> None:
        """Keep what is final: each minute, with several folds at the end of each box."""
        _append(self._pending, box)
        is_due = (ends and self._folds > 1) or time.monotonic() >= self._last_s + EVERY_S
        if self._is_given_up or not is_due or not self._pending:
            return
        try:
            self._keep(labels)
        except (OSError, MemoryError) as error:
            self._is_given_up = True
            with contextlib.suppress(OSError):  # it may take the room that the output needs
                self._own.unlink(missing_ok=True)
            if self._within is not None:
                raise because(WriteError, f"{self._own}: labels cannot be kept: {error}", error) from error
            logger.warning(
                "%s: labels cannot be kept, a run that is killed begins where this one did: %s", self._own, error
            )
            return
        if not self._is_begun and self._within is None:  # it holds all that was found, too
            _forget(self._output, self._own)
        self._is_begun, self._last_s = True, time.monotonic()
        self._pending.clear()

    def ended(self) -> None:
        """Keep what is not kept yet, where that is all that is made of the case.

        Raises
        ------
        WriteError
            If it cannot be kept.
        """
        if self._within is not None and self._labels is not None:
            self._last_s = float("-inf")
            self.labelled(self._labels, NOTHING)

    def _has_copied(self, file: BinaryIO) -> bool:
        """Whether the file begins now with what others have kept, which may be gone meanwhile."""
        if not self._earlier or self._arithmetic() != self._key.arithmetic:
            return False
        try:
            for number, earlier in enumerate(self._earlier):
                _copy(earlier, file, 0 if number == 0 else len(self._key.line))
        except OSError:  # it was cut
            file.seek(0)
            file.truncate()
            return False
        return True

    def _keep(self, labels: LabelMap) -> None:
        with self._own.open("ab" if self._is_begun else "wb") as file:
            if not self._is_begun and not self._has_copied(file):
                file.write(replace(self._key, arithmetic=self._arithmetic()).line)
                self._pending[:0] = self.found
            for box in self._pending:
                for chunk in _some_mib(box, np.dtype(self._key.dtype).itemsize):
                    data = zlib.compress(np.ascontiguousarray(labels.read(chunk), self._key.dtype).tobytes(), 1)
                    at = chunk if self._within is None else moved(chunk, self._within)
                    file.write(_CHUNK.pack(*_head(at, data), _checksum(at, data)) + data)
        flush(self._own)
        if not self._is_begun:
            flush(self._own.parent)


def forget(output: Path, of_all: bool = False) -> None:
    """Remove what this process, and those that have ended, have kept of an output that is there; or what all have."""
    _forget(output, of_all=of_all)


def _forget(output: Path, but: Path | None = None, of_all: bool = False) -> None:
    for file in _files_of(output):
        if file != but and (of_all or is_left_over(file, file.name.partition(".")[0], (_KIND,))):
            with contextlib.suppress(OSError):
                file.unlink()


def _joined(boxes: Iterable[Box]) -> list[Box]:
    joined_boxes: list[Box] = []
    for box in boxes:
        _append(joined_boxes, box)
    return joined_boxes


def _append(boxes: list[Box], box: Box) -> None:
    """Add a box that holds a voxel to those before, which it may make longer."""
    if not _voxels([box]):
        return
    longer = joined(boxes[-1], box) if boxes else None
    boxes[-1:] = [longer] if longer is not None else [*boxes[-1:], box]


def _voxels(boxes: Sequence[Box]) -> int:
    return sum(math.prod(part.stop - part.start for part in box) for box in boxes)


def _some_mib(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box into such of some MiB."""
    planes, rows, columns = box
    depth = max(1, 2**22 // (_voxels([(slice(0, 1), rows, columns)]) * itemsize))
    for start in range(planes.start, planes.stop, depth):
        yield slice(start, min(start + depth, planes.stop)), rows, columns


def _head(box: Box, data: bytes) -> list[int]:
    return [*(end for part in box for end in (part.start, part.stop)), len(data)]


def _checksum(box: Box, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_CHUNK.pack(*_head(box, data), 0)))


def _digest(output: Path) -> str:
    return hashlib.blake2b(output.name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _files_of(output: Path) -> list[Path]:
    try:
        return sorted(output.parent.glob(f"{_KIND}-*.{_digest(output)}"))
    except OSError:
        return []


class _Chunk(NamedTuple):
    box: Box
    values: NDArray[Any]
    stop: int


@dataclass(frozen=True)
class _Earlier:
    """What a file of an earlier run holds: boxes, in its first `size_bytes`."""

    file: Path
    boxes: list[Box]
    size_bytes: int


def _kept(output: Path, key: Key) -> list[_Earlier]:
    """Return the files by which a case can be continued, those that hold most, as far as they hold different voxels."""
    earlier = [found for file in _files_of(output) if (found := _found_in(file, key)) is not None]
    taken: list[_Earlier] = []
    for found in sorted(earlier, key=lambda found: -_voxels(found.boxes)):
        if not any(common(box, other) for box in found.boxes for one in taken for other in one.boxes):
            taken.append(found)
    return sorted(taken, key=lambda found: [part.start for part in found.boxes[0]])


def _found_in(file: Path, key: Key) -> _Earlier | None:
    boxes: list[Box] = []
    for chunk in _chunks(file, key):
        _append(boxes, chunk.box)
    return _Earlier(file, boxes, chunk.stop) if boxes else None


def _copy(earlier: _Earlier, file: BinaryIO, start: int) -> None:
    """Append what a file of others holds from a byte on.

    Raises
    ------
    OSError
        If it is not all there any more.
    """
    left = earlier.size_bytes - start
    with earlier.file.open("rb") as source:
        source.seek(start)
        while left and (data := source.read(min(left, 2**22))):
            left -= file.write(data)
    if left:
        raise OSError(f"{earlier.file} has been cut")


def _chunks(file: Path, key: Key, stop: int | None = None) -> Iterator[_Chunk]:
    """Give the whole chunks of a file up to a byte, and where each ends; nothing of one with another key."""
    itemsize = np.dtype(key.dtype).itemsize
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.readline(len(key.line)) != key.line:
            return
        while stream.tell() != stop and len(head := stream.read(_CHUNK.size)) == _CHUNK.size:
            *ends, size, checksum = _CHUNK.unpack(head)
            box = slice(*ends[:2]), slice(*ends[2:4]), slice(*ends[4:])
            inside = all(part.start < part.stop <= full for part, full in zip(box, key.shape, strict=True))
            data = stream.read(size) if inside and size <= 2 * _voxels([box]) * itemsize + 2**10 else b""
            if not data or len(data) != size or _checksum(box, data) != checksum:
                return
            shape = [part.stop - part.start for part in box]
            yield _Chunk(box, np.frombuffer(zlib.decompress(data), key.dtype).reshape(shape), stream.tell())


def unfinished_of(setup: Setup, job: Job, part: Part, dtype: np.dtype[Any]) -> Unfinished | None:
    """Return what keeps the labels of a case whose slabs are labelled as they come; None where nothing is recorded.

    With several folds no plane is final before the last of them, so that a long case is computed in parts.
    """
    recipe, piece, ways = job.recipe, job.piece, Ways(setup)
    if recipe is None or job.files is None:
        return None
    try:
        made_with = (piece and piece.made_with) or _made_with(setup, recipe, job.files.images)
    except (OSError, UsageError) as error:
        logger.warning("labels of %s cannot be kept: %s", recipe.outputs[0].name, error)
        return None
    shape, within = (part.shape, None) if piece is None else (piece.shape, piece.box)
    key = Key(made_with, shape, dtype.name, ways.arithmetic().value)
    # which arithmetic is not known before the first tile
    continues = job.continues and not ways.is_undecided
    folds, step_size = setup.weights.folds, setup.tile_step_size
    return Unfinished(recipe.outputs[0], key, continues, folds, step_size, lambda: ways.arithmetic().value, within)


def _made_with(setup: Setup, recipe: Recipe, images: Sequence[str]) -> str:
    """Return a checksum of all that the bits of labels depend on: one map is never of two kinds of run."""
    library = counted_by(setup.plans_manager.image_reader_writer_class)
    layouts = [read_header(image, library).layout for image in images]
    stored = {part.path for layout in layouts if layout is not None for part in layout.parts}
    told = [
        recipe.made_with,
        states((*recipe.inputs, *sorted(stored))),
        choices.machine(),
        torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else setup.device.type,
        [version_of(package) for package in ("nnunet-lowmem", "nnunetv2")],
        setup.steps.replaced(*Step),
    ]
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=16).hexdigest()
