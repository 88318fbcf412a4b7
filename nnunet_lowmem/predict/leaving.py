"""Labels that go to the file of their case while it is predicted: of its label map nothing is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.labels.counting import LabelCounts
from nnunet_lowmem.labels.labeller import LabelMap
from nnunet_lowmem.labels.parts import Part
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.nnunet.read_by import writer_of
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.types import Box
from nnunet_lowmem.volumes.streamed import Frame
from nnunet_lowmem.volumes.voxel_files import VoxelFile


@dataclass(frozen=True)
class Leaving:
    """The file that labels go to.

    Attributes
    ----------
    frame : Frame
        What is around them there.
    final : Path
        The file to be.
    writer_class : type
        The model's.
    shape : tuple of int
        Of the map, axes of the file.
    backward : int, 3
        Which axis of the network is which of the file.
    part : Part
    dtype : numpy dtype
        Of labels.
    clock : StageClock
        Is told of what fails.
    counts : LabelCounts
        Of what was put so far.
    """

    frame: Frame
    final: Path
    writer_class: type
    shape: tuple[int, ...]
    backward: Sequence[int]
    part: Part
    dtype: np.dtype[Any]
    clock: StageClock
    counts: LabelCounts = field(default_factory=LabelCounts)

    @contextmanager
    def begun(self) -> Iterator[LabelMap]:
        """Give the map that labels are put into; it has its name when the block has ended.

        Raises
        ------
        WriteError
            If the file cannot be written whole.
        """
        needed_bytes = self.frame.file_bytes(math.prod(self.shape))
        passing: Exception | None = None
        try:
            with (
                self.clock.failing_in("writing"),
                label_writing.output(self.final, self.writer_class, self.shape, needed_bytes) as path,
                self.frame.opened(path, self.shape) as voxels,
            ):
                file = _InFile(voxels, self)
                try:
                    yield file
                except Exception as error:
                    if id(error) == file.failure:
                        raise
                    passing = error
                if passing is not None:
                    raise _AbandonedError
        except _AbandonedError:
            pass
        try:
            if passing is not None:
                raise passing
        finally:
            del passing  # its frames would hold it


class _AbandonedError(BaseException):
    """Stands for what has nothing to do with the file, which is removed, and nothing is said of it."""


class _InFile(LabelMap):
    """A label map that is nowhere but in a file."""

    def __init__(self, voxels: VoxelFile, leaving: Leaving) -> None:
        self._voxels, self._leaving = voxels, leaving
        # which error: held, it would hold the frames it came from
        self.failure: int | None = None

    @property
    def kept(self) -> None:
        """Nothing is."""

    def block(self, box: Box) -> NDArray[Any]:
        """Return zeros."""
        return np.zeros([part.stop - part.start for part in box], self._leaving.dtype)

    def put(self, box: Box, values: NDArray[Any]) -> None:
        """Write what is asked for of the labels of a box, which may be changed."""
        mask = self._leaving.part.mask
        if mask is not None:
            values = values if values.flags.writeable else values.copy()
            for plane, inside in zip(values, mask[box], strict=True):
                plane[~inside] = 0
        self._leaving.counts.add(values)
        try:
            with self._leaving.clock.failing_in("writing"):
                self._voxels.put(self._in_file(box), values.transpose(self._leaving.backward))
        except OSError as error:
            self.failure = id(error)
            raise

    def read(self, box: Box) -> NDArray[Any]:
        """Return the labels of a box that were put."""
        return self._voxels.read(self._in_file(box)).transpose(np.argsort(self._leaving.backward))

    def _in_file(self, box: Box) -> Box:
        z, y, x = (box[axis] for axis in self._leaving.backward)
        return z, y, x


def _begins(crop: Box, found: Sequence[Box], axis: int) -> bool:
    """Whether what was found are the first planes of the crop, kept in the order in which a file takes them."""
    others = [found[0][other] == crop[other] for other in range(3) if other != axis]
    return len(found) == 1 and axis == 0 and all(others) and found[0][axis].start == crop[axis].start


def leaving(
    setup: Setup,
    job: Job,
    part: Part,
    rule: LabelRule,
    properties: dict[str, Any],
    found: Sequence[Box],
    clock: StageClock,
    folder: Path,
) -> Leaving | None:
    """Return how the labels of a case can leave for its file; None where they cannot.

    Parameters
    ----------
    setup, job, part, rule
    properties : dict
        Of the part.
    found : sequence of boxes
        What an earlier run has labelled.
    clock : StageClock
    folder : Path
        For temporary files.
    """
    plans, axis = setup.plans_manager, part.grid.roll_axis
    writer_class, backward = type(writer_of(plans)), plans.transpose_backward
    may = label_writing.Leaves.of(writer_class, setup.file_ending, part.shape, rule, backward, axis)
    if job.output is None or not may.whole:
        return None
    if found and not may.in_columns and not _begins(part.crop, found, axis):
        return None
    shape = tuple(part.shape[axis] for axis in backward)
    final = Path(job.output + setup.file_ending)
    frame = label_writing.leaving_frame(writer_class, final.name, properties, shape, rule, folder)
    if frame is None or (frame.in_order and may.in_columns):
        return None
    return Leaving(frame, final, writer_class, shape, backward, part, rule.dtype, clock)
