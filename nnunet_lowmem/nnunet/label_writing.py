"""What writing a label map takes, and which maps leave in a stream so that it takes little.

Something is known only of what is exactly nnU-Net's own; other writers are called, and counted with a copy.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from nnunet_lowmem.errors import also
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet.read_by import writer_of
from nnunet_lowmem.nnunet.rehearsing import ONE_BYTE, is_tried
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.preprocessing.volume_io import VolumeIO
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.types import Shape3
from nnunet_lowmem.volumes import streamed
from nnunet_lowmem.volumes.tiff_pages import Pages, may_be_pages
from nnunet_lowmem.volumes.verifying import verify_label_file

logger = logging.getLogger(__name__)

_Way = TypeVar("_Way", bound=streamed.Frame | Pages)
#: Of a map. A compressed stream has other bytes than SimpleITK's, and the same content; a smaller copy takes less than
#: predicting the case took.
STREAMED_FROM_BYTES = 2**28
_STREAMED = "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIO"
_BY_PAGES = "nnunetv2.imageio.tif_reader_writer:Tiff3DIO"
_PAGED = (".tif", ".tiff")
# of a page: as it is stored, the strips that are made of it, and what is written at a time
_PAGE_COPIES = 3
# what our own writers take at a time, unless a plane has more
_BLOCK_VOXELS = 2**24
# three images of one byte: made of the array, oriented, and oriented once more by ITK's filter for directions
_TO_ORIENTATION = "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIOWithReorient"
_ORIENTED_BYTES = 3
# nibabel writes slice after slice; copied is what has two bytes and needs one
_BY_SLICES = (
    "nnunetv2.imageio.nibabel_reader_writer:NibabelIO",
    "nnunetv2.imageio.nibabel_reader_writer:NibabelIOWithReorient",
)
# blocks or slices in the order and type of the file, and what they are compressed to
_BUFFER_BYTES = 2**24


def writer_bytes(writer_class: type, ending: str, shape: Sequence[int], label_bytes: int) -> int:
    """Return what writing a label map takes beside the map.

    Parameters
    ----------
    writer_class : type
        The model's.
    ending : str
        Of the file's name.
    shape : int, 3
        Of the map, axes of the file.
    label_bytes : int
        Of a voxel, 1 or 2.
    """
    voxels = math.prod(shape)
    if issubclass(writer_class, VolumeIO):
        return _BUFFER_BYTES + _PAGE_COPIES * label_bytes * max(_BLOCK_VOXELS, math.prod(shape[1:]))
    if _is_streamed(writer_class, ending, voxels * label_bytes):
        return _BUFFER_BYTES
    if _is_paged(writer_class, ending, shape, label_bytes):
        return _BUFFER_BYTES + _PAGE_COPIES * math.prod(shape[1:]) * label_bytes
    return _BUFFER_BYTES + voxels * _copied_bytes(writer_class, label_bytes)


def _copied_bytes(writer_class: type, label_bytes: int) -> int:
    """Of a voxel."""
    if not is_tried(writer_class):
        return label_bytes
    if lookup.is_class(writer_class, _TO_ORIENTATION):
        return _ORIENTED_BYTES
    return label_bytes - any(lookup.is_class(writer_class, writer) for writer in _BY_SLICES)


def _is_streamed(writer_class: type, name: str, size_bytes: int) -> bool:
    if size_bytes < STREAMED_FROM_BYTES or not name.endswith(streamed.ENDINGS):
        return False
    return lookup.is_class(writer_class, _STREAMED) and is_tried(writer_class)


def _is_paged(writer_class: type, name: str, shape: Sequence[int], label_bytes: int) -> bool:
    if math.prod(shape) * label_bytes < STREAMED_FROM_BYTES or not name.endswith(_PAGED) or not may_be_pages(shape):
        return False
    return lookup.is_class(writer_class, _BY_PAGES) and is_tried(writer_class)


def write_segmentation(segmentation: NDArray[Any], properties: dict[str, Any], path: str, plans_manager: Any) -> None:
    """Write as the model's own writer does; the file appears under its name when it is complete.

    A large map is streamed where the content of the file is known to be the same. SimpleITK truncates files on a full
    disk without an error, so every file is decoded to its end first. nnU-Net's own writers keep the shape; what others
    make of it is their business.

    Parameters
    ----------
    segmentation : ndarray
        Axes as in the file, slowest first; three, as the writers take it.
    properties : dict
        Of the case.
    path : str
        The file to be.
    plans_manager : PlansManager
        Has the class of the writer.

    Raises
    ------
    WriteError
        If the file cannot be written whole; of the kind that the writer raises, too.
    Exception
        Of the writer, about anything but the file.
    """
    writer = writer_of(plans_manager)
    is_known = isinstance(writer, VolumeIO) or writer.write_seg.__module__.startswith("nnunetv2.imageio.")
    shape = segmentation.shape if is_known else None
    with output(Path(path), type(writer), shape) as partial_file:
        way = None
        is_paged = _is_paged(type(writer), path, segmentation.shape, segmentation.itemsize)
        if segmentation.size and (is_paged or _is_streamed(type(writer), path, segmentation.nbytes)):
            few = streamed.few_voxels(segmentation.shape, segmentation.dtype, streamed.largest_label(segmentation))
            of_few = Pages.of if is_paged else partial(streamed.Frame.of, few=few.shape, shape=segmentation.shape)
            way = _by_few(writer, few, properties, partial_file, of_few)
        if way is None:
            writer.write_seg(segmentation, str(partial_file), properties)
        else:
            way.write(segmentation, partial_file)


@contextmanager
def output(
    final: Path, writer_class: type, shape: Sequence[int] | None, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Give the path of a label map that a writer of this class would write; see `atomic_output`.

    Parameters
    ----------
    final : Path
    writer_class : type
        An error is of the kind that it raises, too.
    shape : sequence of int or None
        Which the map is to have in the end.
    needed_bytes : int, optional
    """
    by_itk = any(lookup.is_class(cls, _STREAMED) for cls in writer_class.__mro__)  # a RuntimeError, whatever it is
    with (
        also(*[RuntimeError] * by_itk),
        atomic_output(final, partial(verify_label_file, shape=shape), needed_bytes) as partial_file,
    ):
        yield partial_file


def _by_few(
    writer: Any, few: NDArray[Any], properties: dict[str, Any], path: Path, of_few: Callable[[Path], _Way]
) -> _Way | None:
    """Return how a writer writes a map, by a file of a few voxels; None where it has to write the map itself.

    What it writes beside that file is put beside `path`.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder, path.name)
            writer.write_seg(few, str(file), properties)
            way = of_few(file)
            for beside in Path(folder).iterdir():
                if beside != file:
                    beside.rename(path.parent / beside.name)
            return way
    except MemoryError:
        raise
    except Exception as error:  # the same will be said of the whole map
        logger.debug("%s: is written by %s itself: %s", path.name, type(writer).__name__, error)
        return None


@dataclass(frozen=True)
class Leaves:
    """Whether a label map may leave for its file while the case is predicted, and nothing is kept of it.

    Attributes
    ----------
    whole, in_columns : bool
        Where planes come as a whole; and where columns come one after the other.
    """

    whole: bool = False
    in_columns: bool = False

    @staticmethod
    def of(
        writer_class: type, ending: str, shape: Shape3, rule: LabelRule, backward: Sequence[int], axis: int
    ) -> Leaves:
        """Return whether that of a model may.

        Parameters
        ----------
        writer_class, ending
            The model's.
        shape : int, 3
            Of the map.
        rule : LabelRule
            The type of a file is chosen by the labels that are there: it has to be the same for all that may be.
        backward : int, 3
            Which axis of the network is which of the file.
        axis : int
            Of the network, along which planes become final.
        """
        if (
            not _is_streamed(writer_class, ending, math.prod(shape) * rule.dtype.itemsize)
            or rule.labels.max() >= ONE_BYTE
        ):
            return Leaves()
        if ending.endswith(streamed.IN_ORDER):
            return Leaves(backward[0] == axis)
        # along the file's fastest axis, planes would be written voxel by voxel
        anywhere = backward[2] != axis
        return Leaves(anywhere, anywhere)


def leaving_frame(
    writer_class: type, name: str, properties: dict[str, Any], shape: Sequence[int], rule: LabelRule, folder: Path
) -> streamed.Frame | None:
    """Return what is around a map of which no label is known yet; None where its writer has to see it.

    Parameters
    ----------
    writer_class : type
    name : str
        Of the file.
    properties : dict
        Of the case.
    shape : sequence of int
        Of the map in the file.
    rule : LabelRule
        Tells which labels there may be.
    folder : Path
        For temporary files.
    """
    ends = (streamed.few_voxels(shape, rule.dtype, label) for label in (0, int(rule.labels.max())))
    frames = set()
    for few in ends:
        of_few = partial(streamed.Frame.of, few=few.shape, shape=shape)
        frames.add(_by_few(writer_class(), few, properties, folder / name, of_few))
    return frames.pop() if len(frames) == 1 else None
