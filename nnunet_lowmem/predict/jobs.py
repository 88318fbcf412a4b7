"""Cases waiting to be predicted, as plain data: what there is to read, and where to write."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_lowmem.errors import LowMemError, UsageError, twin
from nnunet_lowmem.names import shown
from nnunet_lowmem.predict.records import Recipe
from nnunet_lowmem.types import Box, Shape3
from nnunet_lowmem.volumes.selection import Selection


@dataclass(frozen=True)
class Files:
    """What there is to read of a case.

    Attributes
    ----------
    images : list of str
        Of all channels: paths, or addresses of stores elsewhere.
    stage, roi : str or None
        The segmentation of the previous stage of a cascade, and the mask of a region.
    selection : Selection or None
        By which the images are read here, as volumes; None leaves that to the model's reader.
    ending : str
        Of the label map; empty is the model's.
    """

    images: list[str]
    stage: str | None = None
    roi: str | None = None
    selection: Selection | None = None
    ending: str = ""


@dataclass(frozen=True)
class Array:
    """An image in memory, shape (channels, x, y, z), with nnU-Net's properties.

    Attributes
    ----------
    stage : array, shape (x, y, z), or None
        Labels of the previous stage.
    by_adapter : bool
        nnU-Net's adapter is somebody else's: it preprocesses the image.
    """

    image: Any
    stage: Any
    properties: Any
    by_adapter: bool = False


@dataclass(frozen=True)
class Item:
    """A preprocessed image of one of stock's data iterators: an array, a tensor, or the path of a .npy file."""

    data: Any
    properties: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A case of a preprocessed data set, by the name it has there."""

    name: str


@dataclass(frozen=True)
class Refused:
    """A case that cannot be right, and why."""

    kind: type[LowMemError]
    text: str


@dataclass(frozen=True)
class Piece:
    """What is to be made of a case that several processes label, each a box of it.

    Attributes
    ----------
    made_with : str
        Checksum of all that its labels depend on, of who has cut it: labels are joined by that.
    inputs : str
        Checksum of the states of its files when it was cut.
    token : str
        Tells what is kept of this cut from what others have kept.
    shape : int, 3
        Of what is asked for of the case, axes of the network.
    box : 3 slices or None
        Of that shape: what is labelled, and kept beside the output. None joins what is kept, labels what is not, and
        writes the file.
    stored : Path or None
        Where the preprocessed case is; None where it is read as it is needed.
    """

    made_with: str
    inputs: str
    token: str
    shape: Shape3
    box: Box | None = None
    stored: Path | None = None


@dataclass(frozen=True)
class Job:
    """One case to predict.

    Attributes
    ----------
    name : str
        As messages show it.
    output : str or None
        Where to write, without the file ending; None returns the arrays.
    source : Files, Array, Item, Stored or Refused
        What it is made from.
    recipe : Recipe or None
        What a done-record of the case is about; None where nothing is recorded.
    continues : bool
        Goes on with what an earlier run has left of it.
    piece : Piece or None
        What is made of it, where that is not all.
    """

    name: str
    output: str | None
    source: Files | Array | Item | Stored | Refused
    recipe: Recipe | None = None
    continues: bool = False
    piece: Piece | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown(self.name))

    @property
    def files(self) -> Files | None:
        """What there is to read, if it is files."""
        return self.source if isinstance(self.source, Files) else None


def refused(job: Job, error: LowMemError) -> Job:
    """Return a job that fails when its turn comes."""
    return replace(job, source=Refused(type(error), str(error)))


def job_of_item(item: dict[str, Any]) -> Job:
    """Make a job of an item of one of stock's data iterators: 'data', 'ofile', 'data_properties'."""
    output = item["ofile"]
    name = os.path.basename(output) if output else "array"
    return Job(name, output, Item(item["data"], item["data_properties"]))


def jobs_of_arrays(images: Any, stages: Any, properties: Any, outputs: Any) -> list[Job]:
    """Make jobs of arrays.

    Properties are copied: stock sends them to other processes, so that the caller's stay as they are.

    Parameters
    ----------
    images, properties : list, or the only one
    stages, outputs : list, the only one, or None

    Raises
    ------
    UsageError
        If there are not as many of each.
    """
    count = len(images) if isinstance(images, list) else 1
    columns = [
        value if isinstance(value, list) else [None] * count if value is None else [value]
        for value in (images, stages, properties, outputs)
    ]
    if {*map(len, columns)} != {count}:
        numbers = "images {}, segmentations of the previous stage {}, properties {}, outputs {}"
        raise twin(UsageError, RuntimeError)(f"one of each is needed: {numbers.format(*map(len, columns))}")
    return [
        Job(f"array {number}", output, Array(image, stage, copy.copy(entry)))
        for number, (image, stage, entry, output) in enumerate(zip(*columns, strict=True))
    ]
