"""What writing a label map takes, and which maps leave in a stream so that it takes little.

Something is known only of what is exactly nnU-Net's own; other writers are called, and counted with a copy.
"""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nnunet_lowmem.errors import also
from nnunet_lowmem.nnunet.rehearsing import is_tried
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.volumes import streamed
from nnunet_lowmem.volumes.verifying import verify_label_file

logger = logging.getLogger(__name__)

#: Of a map. A compressed stream has other bytes than SimpleITK's, and the same content; a smaller copy takes less than
#: predicting the case took.
STREAMED_FROM_BYTES = 2**28
_STREAMED = "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIO"
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


def writer_bytes(writer_class: type, ending: str, voxels: int, label_bytes: int) -> int:
    """Return what writing a label map takes beside the map.

    Parameters
    ----------
    writer_class : type
        The model's.
    ending : str
        Of the file's name.
    voxels, label_bytes : int
        Of the map; bytes of a voxel, 1 or 2.
    """
    if _is_streamed(writer_class, ending, voxels * label_bytes):
        return _BUFFER_BYTES
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
    writer = plans_manager.image_reader_writer_class()
    shape = segmentation.shape if writer.write_seg.__module__.startswith("nnunetv2.imageio.") else None
    by_itk = any(lookup.is_class(cls, _STREAMED) for cls in type(writer).__mro__)  # a RuntimeError, whatever it is
    with (
        also(*[RuntimeError] * by_itk),
        atomic_output(Path(path), partial(verify_label_file, shape=shape)) as partial_file,
    ):
        frame = _frame(writer, segmentation, partial_file, properties)
        if frame is None:
            writer.write_seg(segmentation, str(partial_file), properties)
        else:
            frame.write(segmentation, partial_file)


def _frame(writer: Any, labels: NDArray[Any], path: Path, properties: dict[str, Any]) -> streamed.Frame | None:
    """Return what the writer puts around a map that is streamed; None where it has to write the map itself."""
    if not _is_streamed(type(writer), path.name, labels.nbytes):
        return None
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            few, file = streamed.few_voxels(labels), Path(folder, path.name)
            writer.write_seg(few, str(file), properties)
            return streamed.Frame.of(file, few.shape, labels.shape)
    except MemoryError:
        raise
    except Exception as error:  # the same will be said of the whole map
        logger.debug("%s: is written by %s itself: %s", path.name, type(writer).__name__, error)
        return None
