"""Labels of a case that is not finished yet, beside the file to be: a run that was killed goes on where it was.

Whatever ends a process leaves this file alone; it goes when the case is done. Chunks are appended, each a stack of
planes with a checksum, so that what a kill or a power cut has torn is the last one and shows itself. A run that
continues reads the file of another and begins its own, so no two processes write to one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels.parts import Part, Span
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
from nnunet_lowmem.types import Shape3
from nnunet_lowmem.volumes.formats import read_header

logger = logging.getLogger(__name__)

_KIND = "lowmem_unfinished"
#: Seconds between two chunks: what a kill costs, beside one window.
EVERY_S = 60.0
#: Seconds that a part of a case of several folds may take, before a kill costs that much.
PART_S = 1800.0
# what cuts may cost, of all tiles
_SHARE = 0.2
# planes, bytes, and a checksum of these and of what follows
_CHUNK = struct.Struct("<QQI")


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
    axis : int
        Along which planes become final.
    arithmetic : str
        In which the network was run.
    """

    made_with: str
    shape: Shape3
    dtype: str
    axis: int
    arithmetic: str

    @property
    def line(self) -> bytes:
        """With which a file begins."""
        return json.dumps([vars(self)[name] for name in Key.__annotations__]).encode() + b"\n"


class Unfinished:
    """Keeps planes of one label map as they become final.

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

    Attributes
    ----------
    found : int
        Planes that an earlier run has labelled.
    """

    def __init__(
        self, output: Path, key: Key, continues: bool, folds: int, step_size: float, arithmetic: Callable[[], str]
    ) -> None:
        self._output, self._key, self._arithmetic = output, key, arithmetic
        self._own = output.parent / f"{owned_name(_KIND, secrets.token_hex(4))}.{_digest(output)}"
        self._continues, self._folds, self._rows_again = continues, folds, math.ceil(1 / step_size)
        self._labels: NDArray[Any] | None = None
        self._ends_count = False
        self._earlier = _longest(output, key) if continues else None
        self.found = 0 if self._earlier is None else self._earlier[1]
        self._kept, self._last_s = 0, time.monotonic()
        self._is_given_up = False

    @property
    def rest(self) -> Span:
        """Behind what was found."""
        return Span(self._key.axis, self.found, self._key.shape[self._key.axis])

    def spans(self, part: Part, seconds: float) -> list[Span]:
        """Return in which parts a long case of several folds is computed, one after the other; none if all at once.

        Only for who has said that the run is to be continued: every cut computes again the rows of tiles that reach
        across it, which is `_SHARE` of all at most.
        """
        axis, grid, tables = self._key.axis, part.grid, part.resampling.tables
        rows = len(grid.starts[axis])
        count = min(math.ceil(seconds / PART_S), 1 + int(_SHARE * rows / self._rows_again))
        if not self._continues or self._folds < 2 or count < 2 or tables is None or grid.roll_axis != axis:
            return []
        first = [grid.starts[axis][number * rows // count] - grid.padding[axis] for number in range(1, count)]
        # a part reads nothing of the row of tiles that the next one begins with
        cuts = [part.crop[axis].start + int(np.searchsorted(tables[axis].high, plane)) for plane in first]
        ends = [self.found, *cuts, self._key.shape[axis]]
        self._ends_count = True
        return [Span(axis, start, stop) for start, stop in itertools.pairwise(ends) if start < stop]

    def label_map(self, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the map, which is made of zeros and filled with what was found when it is asked for first.

        Raises
        ------
        UsageError
            If that is gone.
        """
        if self._labels is None:
            self._labels = make()
            self._fill(self._labels)
        return self._labels

    def _fill(self, labels: NDArray[Any]) -> None:
        if self._earlier is None:
            return
        along, start = np.moveaxis(labels, self._key.axis, 0), 0
        for planes in _chunks(self._earlier[0], self._key):
            along[start : start + len(planes)] = planes
            start += len(planes)
        if start != self.found:
            held = f"held {self.found} labelled planes when the case began, now it holds {start}"
            raise UsageError(f"{self._earlier[0].name} {held}: run again")
        logger.info("goes on behind %d of %d planes that an earlier run has labelled", start, len(along))

    def labelled(self, labels: NDArray[Any], axis: int, planes: int, ends: bool = False) -> None:
        """Keep the first `planes` along an axis, which are final: at the end of a part, else each minute."""
        is_due = (ends and self._ends_count) or time.monotonic() >= self._last_s + EVERY_S
        if self._is_given_up or axis != self._key.axis or not is_due:
            return
        try:
            self._append(np.moveaxis(labels, axis, 0)[self._kept : planes])
        except (OSError, MemoryError) as error:
            self._is_given_up = True
            with contextlib.suppress(OSError):  # it may take the room that the output needs
                self._own.unlink(missing_ok=True)
            logger.warning("%s: labels cannot be kept, a run that is killed begins anew: %s", self._own, error)
            return
        if not self._kept:  # it holds all that was found, too
            _forget(self._output, self._own)
        self._kept, self._last_s = planes, time.monotonic()

    def _append(self, planes: NDArray[Any]) -> None:
        with self._own.open("ab" if self._kept else "wb") as file:
            if not self._kept:
                file.write(replace(self._key, arithmetic=self._arithmetic()).line)
            for start in range(0, len(planes), depth := _depth(planes)):
                data = zlib.compress(np.ascontiguousarray(planes[start : start + depth]).tobytes(), 1)
                count = len(planes[start : start + depth])
                file.write(_CHUNK.pack(count, len(data), _checksum(count, data)) + data)
        flush(self._own)
        if not self._kept:
            flush(self._own.parent)


def forget(output: Path) -> None:
    """Remove what this process, and those that have ended, have kept of an output that is there."""
    _forget(output)


def _forget(output: Path, but: Path | None = None) -> None:
    for file in _files_of(output):
        if file != but and is_left_over(file, file.name.partition(".")[0], (_KIND,)):
            with contextlib.suppress(OSError):
                file.unlink()


def _checksum(count: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_CHUNK.pack(count, len(data), 0)))


def _depth(planes: NDArray[Any]) -> int:
    """Return how many planes have some MiB."""
    return max(1, 2**22 * len(planes) // max(1, planes.nbytes))


def _digest(output: Path) -> str:
    return hashlib.blake2b(output.name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _files_of(output: Path) -> list[Path]:
    try:
        return sorted(output.parent.glob(f"{_KIND}-*.{_digest(output)}"))
    except OSError:
        return []


def _longest(output: Path, key: Key) -> tuple[Path, int] | None:
    """Return the file with most planes among those by which a case can be continued, and how many."""
    found = [(file, sum(map(len, _chunks(file, key)))) for file in _files_of(output)]
    return max((entry for entry in found if entry[1]), key=lambda entry: entry[1], default=None)


def _chunks(file: Path, key: Key) -> Iterator[NDArray[Any]]:
    """Give the whole chunks of a file, axis of the planes first; nothing of one with another key."""
    shape = list(key.shape)
    shape.insert(0, shape.pop(key.axis))
    left, plane_bytes = shape[0], int(np.prod(shape[1:])) * np.dtype(key.dtype).itemsize
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.readline(len(key.line)) != key.line:
            return
        while len(head := stream.read(_CHUNK.size)) == _CHUNK.size:
            count, size, checksum = _CHUNK.unpack(head)
            data = stream.read(size) if 0 < count <= left and size <= 2 * count * plane_bytes + 2**10 else b""
            if not data or len(data) != size or _checksum(count, data) != checksum:
                return
            left -= count
            yield np.frombuffer(zlib.decompress(data), key.dtype).reshape(count, *shape[1:])


def unfinished_of(setup: Setup, job: Job, part: Part, dtype: np.dtype[Any]) -> Unfinished | None:
    """Return what keeps the labels of a case whose slabs are labelled as they come; None where nothing is recorded.

    With several folds no plane is final before the last of them, so that a long case is computed in parts.
    """
    recipe, ways = job.recipe, Ways(setup)
    if recipe is None or job.files is None:
        return None
    try:
        made_with = _made_with(setup, recipe, job.files.images)
    except (OSError, UsageError) as error:
        logger.warning("labels of %s cannot be kept: %s", recipe.outputs[0].name, error)
        return None
    key = Key(made_with, part.shape, dtype.name, part.grid.roll_axis, ways.arithmetic().value)
    # which arithmetic is not known before the first tile
    continues, folds = job.continues and not ways.is_undecided, setup.weights.folds
    step_size = setup.tile_step_size
    return Unfinished(recipe.outputs[0], key, continues, folds, step_size, lambda: ways.arithmetic().value)


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
