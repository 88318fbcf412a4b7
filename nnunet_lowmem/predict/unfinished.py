"""Labels of a case that is not finished yet, beside the file to be: a run that was killed goes on where it was.

Whatever ends a process leaves this file (`predict/kept_labels`) alone; it goes when the case is done. A run that
continues reads the files of others and begins its own, so no two processes write to one. Where several processes label
a case, each leaves its box this way, and the last joins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nnunet_lowmem.boxes import NOTHING, moved
from nnunet_lowmem.errors import UsageError, WriteError, because
from nnunet_lowmem.labels.heads import Keeper
from nnunet_lowmem.labels.labeller import LabelMap
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.network import choices
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.kept_labels import Key, append, chunks, copy, joined_boxes, kept, packed, some_mib, voxels
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
_TOKEN_LETTERS = 8
# what cuts may cost, of all tiles
_SHARE = 0.2


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
    token : str
        Tells their files from others; where no earlier run is continued no others are read.
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
        token: str = "",
    ) -> None:
        super().__init__()
        assert within is None or not continues, "what is found is all of a case"
        self._output, self._key, self._arithmetic = output, key, arithmetic
        self._own = output.parent / f"{owned_name(_KIND, secrets.token_hex(4))}.{_digest(output)}{token}"
        self._continues, self._folds, self._rows_again = continues, folds, math.ceil(1 / step_size)
        joins = bool(token) and within is None
        self._earlier = kept(_files_of(output, "" if continues else token), key) if continues or joins else []
        self.found = joined_boxes(box for earlier in self._earlier for box in earlier.boxes)
        self._within = within
        self._pending: list[Box] = []
        self._is_begun, self._last_s = False, time.monotonic()
        self._is_given_up = False

    def counts(self, part: Part, columns: Shape3, seconds: float) -> Shape3:
        """As it says; a long case of several folds is cut along its columns, too, each box with all folds.

        Only for who has said that the run is to be continued: every cut computes again the rows of tiles that reach
        across it, which is `_SHARE` of all at most.
        """
        if not self._continues or self._folds < 2:
            return columns
        axis = part.grid.roll_axis
        most = 1 + int(_SHARE * len(part.grid.starts[axis]) / self._rows_again)
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
            for chunk in chunks(earlier.file, self._key, earlier.size_bytes):
                labels.put(chunk.box, chunk.values)
                append(boxes, chunk.box, by_planes=True)
            found += boxes
        boxes = joined_boxes(found)
        if boxes != self.found:
            held, holds = (f"{voxels(found):,} labelled voxels" for found in (self.found, boxes))
            names = ", ".join(earlier.file.name for earlier in self._earlier)
            raise UsageError(f"{names} held {held} when the case began, now it holds {holds}: run again")
        share = 100 * voxels(boxes) / math.prod(self._key.shape)
        logger.info("goes on behind %.1f %% of the label map, which is labelled", share)

    def labelled(self, labels: LabelMap, box: Box, ends: bool = False) -> None:
        """Keep what is final: each minute, with several folds at the end of each box."""
        append(self._pending, box)
        is_due = (ends and self._folds > 1) or time.monotonic() >= self._last_s + EVERY_S
        if self._is_begun and self._within is not None and not self._own.exists():
            self._is_given_up = True  # the case is done meanwhile
        if self._is_given_up or not is_due or not self._pending:
            return
        try:
            self._keep(labels)
        except (OSError, MemoryError) as error:
            self._is_given_up = True
            with contextlib.suppress(OSError):  # it may take the room that the output needs
                self._own.unlink(missing_ok=True)
            if self._within is not None:
                told = f"{self._own}: labels cannot be kept: {error}; make room there"
                raise because(WriteError, f"{told}, and go on with --continue_prediction", error) from error
            logger.warning(
                "%s: labels cannot be kept, a run that is killed begins where this one did: %s", self._own, error
            )
            return
        if not self._is_begun and self._within is None:  # it holds all that was found, too
            forget(self._output, self._own)
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
                copy(earlier, file, 0 if number == 0 else len(self._key.line))
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
                for chunk in some_mib(box, np.dtype(self._key.dtype).itemsize):
                    at = chunk if self._within is None else moved(chunk, self._within)
                    file.write(packed(at, np.ascontiguousarray(labels.read(chunk), self._key.dtype)))
        flush(self._own)
        if not self._is_begun:
            flush(self._own.parent)


def forget_pieces(output: Path) -> None:
    """Remove what any process has kept of a box of an output that is there."""
    for file in _files_of(output, "?" * _TOKEN_LETTERS):
        with contextlib.suppress(OSError):
            file.unlink()


def token() -> str:
    """Return what tells what is kept of a cut from what others have kept."""
    return secrets.token_hex(_TOKEN_LETTERS // 2)


def forget(output: Path, but: Path | None = None) -> None:
    """Remove what this process, and those that have ended, have kept of an output, but for one file."""
    for file in _files_of(output):
        if file != but and is_left_over(file, file.name.partition(".")[0], (_KIND,)):
            with contextlib.suppress(OSError):
                file.unlink()


def _digest(output: Path) -> str:
    return hashlib.blake2b(output.name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _files_of(output: Path, token: str = "") -> list[Path]:
    try:
        return sorted(output.parent.glob(f"{_KIND}-*.{_digest(output)}{token or '*'}"))
    except OSError:
        return []


def unfinished_of(setup: Setup, job: Job, part: Part, dtype: np.dtype[Any]) -> Unfinished | None:
    """Return what keeps the labels of a case whose slabs are labelled as they come; None where nothing is recorded.

    With several folds no plane is final before the last of them, so that a long case is computed in parts.
    """
    recipe, piece, ways = job.recipe, job.piece, Ways(setup)
    if recipe is None or job.files is None:
        return None
    try:
        made_with, inputs = checksums(setup, recipe, job.files.images)
    except (OSError, UsageError) as error:
        logger.warning("labels of %s cannot be kept: %s", recipe.outputs[0].name, error)
        return None
    if piece is not None and piece.inputs != inputs:
        raise UsageError(f"the files of {recipe.outputs[0].name} have changed since the case was cut: run again")
    shape, within, token = part.shape, None, ""
    if piece is not None:
        made_with, shape, within, token = piece.made_with, piece.shape, piece.box, piece.token
    key = Key(made_with, shape, dtype.name, ways.arithmetic().value)
    # which arithmetic is not known before the first tile
    continues = job.continues and not ways.is_undecided
    how = setup.weights.folds, setup.tile_step_size, lambda: ways.arithmetic().value
    return Unfinished(recipe.outputs[0], key, continues, *how, within, token)


def checksums(setup: Setup, recipe: Recipe, images: Sequence[str]) -> tuple[str, str]:
    """Return a checksum of all that the bits of labels depend on, so that no map is of two kinds of run, and of files.

    Raises
    ------
    OSError, UsageError
        If a file cannot be asked.
    """
    library = counted_by(setup.plans_manager.image_reader_writer_class)
    layouts = [read_header(image, library).layout for image in images]
    stored = {part.path for layout in layouts if layout is not None for part in layout.parts}
    inputs = states((*recipe.inputs, *sorted(stored)))
    told = [
        recipe.made_with,
        inputs,
        choices.machine(),
        torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else setup.device.type,
        [version_of(package) for package in ("nnunet-lowmem", "nnunetv2")],
        setup.steps.replaced(*Step),
    ]
    both = [hashlib.blake2b(json.dumps(of, default=str).encode(), digest_size=16).hexdigest() for of in (told, inputs)]
    return both[0], both[1]
