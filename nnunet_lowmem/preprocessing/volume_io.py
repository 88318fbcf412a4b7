"""A reader and writer of nnU-Net's kind for all volumes of the table of formats, whatever the model's own takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.preprocessing.reading import read_channels, selection_of
from nnunet_lowmem.volumes.formats import format_of
from nnunet_lowmem.volumes.label_images import LabelImage
from nnunet_lowmem.volumes.selection import OWN, Selection

_logger = logging.getLogger(__name__)


class VolumeIO(BaseReaderWriter):  # type: ignore[misc]  # nnU-Net ships no types
    """Reads what `selection` selects; writes by the ending of a name.

    Parameters
    ----------
    classes : dict
        Names of labels.
    made : callable
        Returns how they are made, as the files are to say.
    """

    selection = Selection()
    supported_file_endings = OWN

    def __init__(self, classes: Mapping[int, str] | None = None, made: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._classes, self._made = classes or {}, made

    def read_images(self, image_fnames: Sequence[str]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return channels, shape (channels, z, y, x), and nnU-Net's properties."""
        channels, properties = read_channels(type(self), list(image_fnames))
        return np.stack([channel.astype(np.float32) for channel in channels]), properties

    def read_seg(self, seg_fname: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return labels, shape (1, z, y, x)."""
        return self.read_images([seg_fname])

    def write_seg(self, seg: NDArray[Any], output_fname: str, properties: dict[str, Any]) -> None:
        """Write labels of shape (z, y, x), which may be mapped.

        Raises
        ------
        UsageError
            If nothing is known of such files.
        """
        row = format_of(output_fname)
        if row is None or row.write is None:
            raise UsageError(f"{output_fname}: no label map is written with that ending, but with {', '.join(OWN)}")
        about = properties.get("volume", {})
        spacing = tuple(map(float, properties["spacing"]))
        if about.get("is_flat"):  # nnU-Net's thickness of a picture is no length
            spacing = (min(spacing[1:]), *spacing[1:])
        _tell_directions(output_fname, properties)
        image = LabelImage(
            spacing,
            _origin(properties),
            str(about.get("unit", "")),
            str(about.get("version", "")),
            self._classes,
            self._made(),
        )
        row.write(seg, Path(output_fname), image)


def _origin(properties: Mapping[str, Any]) -> tuple[float, ...]:
    """Return where the first voxel lies, slowest axis first; mm, to the left, the back and upwards as in ITK."""
    if "sitk_stuff" in properties:
        found = properties["sitk_stuff"]["origin"][:3]
    elif "nibabel_stuff" in properties:
        found = np.asarray(properties["nibabel_stuff"]["original_affine"])[:3, 3] * [-1, -1, 1]
    else:
        return (0.0, 0.0, 0.0)
    values = [float(value) for value in found][::-1]
    return tuple([0.0] * (3 - len(values)) + values)


def _tell_directions(output: str, properties: Mapping[str, Any]) -> None:
    """Log that axes are turned in space, which arrays cannot say."""
    if "sitk_stuff" in properties:
        directions = np.asarray(properties["sitk_stuff"]["direction"])
        is_turned = not np.allclose(directions, np.eye(round(directions.size**0.5)).ravel())
    else:
        affine = np.asarray(properties.get("nibabel_stuff", {}).get("original_affine", np.diag([-1.0, -1, 1, 1])))
        lengths = np.diag(affine)[:3] * [-1, -1, 1]
        is_turned = not np.allclose(affine[:3, :3], np.diag(lengths * [-1, -1, 1])) or min(lengths) < 0
    if is_turned:
        _logger.warning("%s: the axes of the image are turned in space, of which such a file says nothing", output)


@cache
def volume_io(selection: Selection) -> type[VolumeIO]:
    """Return the class that reads by a selection: nnU-Net makes its readers without arguments."""
    return type("VolumeIO", (VolumeIO,), {"selection": selection, "__module__": __name__})


def reader_of_labels(reader: type) -> type:
    """Return what reads label maps and masks beside images: they have a level, and data set, of their own."""
    return reader if selection_of(reader) is None else volume_io(Selection())
