"""The writer is tried before a case is computed: a few voxels, under the case's name and with its properties.

Writers of nnU-Net take their format from the ending and hand the name to a library, which may refuse it, write another
file, or name a data file in the header that is not there. That hardly depends on how many voxels there are, so it shows
in a map of a few voxels, which is verified and read as the real one would be, after it was moved as that would.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.errors import DamagedFileError, WriteError, because, of_kinds, twin
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.names import is_utf8, shown
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import READERS, Step
from nnunet_lowmem.system.placing import place_of
from nnunet_lowmem.volumes.formats import format_of
from nnunet_lowmem.volumes.verifying import verify_label_file

logger = logging.getLogger(__name__)

# so many voxels along an axis tell labels, axes and slices apart
_EXTENT = 6
#: The writers choose two bytes a voxel by whether a map holds a label from here on.
ONE_BYTE = 255
_trying = threading.Lock()
_ROOM_BYTES = 2**12
# libraries, how nnU-Net's readers call them, and what of them they use
_LIBRARIES = (
    ("SimpleITK", ("sitk",), ("WriteImage", "GetImageFromArray", "DICOMOrient")),
    ("nibabel", ("nibabel", "nib"), ("save", "Nifti1Image")),
    ("skimage.io", ("io",), ("imsave",)),
    ("tifffile", ("tifffile",), ("imwrite",)),
)
# what nnU-Net's writers look up; the rest may be large, or nothing that can be copied
_OF_WRITERS = ("sitk_stuff", "nibabel_stuff", "spacing")
# What ends the process, or leaves voxels in the working folder, cannot be tried. ITK's MetaImage takes the name of the
# data for a pattern of printf, and what begins like a user's home or a drive for an absolute path.
_UNTRIED = (
    (".mhd", re.compile(r".*%[^a-zA-Z]*[^diouxX%\W0-9]", re.DOTALL), "it is taken for a pattern"),
    (".mhd", re.compile("~"), "it is taken for an absolute path"),
    (".nhdr", re.compile(".:", re.DOTALL), "it is taken for an absolute path"),
)


def rehearse(
    writer_class: type, output: str, ending: str, properties: dict[str, Any], shape: Sequence[int],
    rule: LabelRule | None, folder: Path,
) -> None:  # fmt: skip
    """Refuse a case whose label map could not be written, before it is computed.

    Only writers of nnU-Net's own are tried: others may count their calls, or write to anywhere.

    Parameters
    ----------
    writer_class : type
        The model's.
    output, ending : str
        The file to be, without its ending, and that.
    properties : dict
        Of the case; the writer gets a copy.
    shape : sequence of int
        Of the label map, axes as in the file.
    rule : LabelRule or None
        Tells which labels there may be.
    folder : Path
        For temporary files.

    Raises
    ------
    WriteError
        With the file, the reason, and what to change; of the kind that the writer raises, too.
    """
    if not is_tried(writer_class) or not _has_room(folder):  # which says nothing of the disk that the output is on
        return
    trial = _Trial(writer_class, properties, shape, folder)
    labels = np.array([0, 1]) if rule is None else rule.labels
    final, few = Path(output + ending), labels[labels < ONE_BYTE]
    try:
        names = trial.run(final, ending, few)
    except WriteError as error:
        error.args = (f"{shown(output + ending)}: {error}; {trial.advice(Path(output), ending, few)}",)
        raise
    for name in names:  # what is written beside it takes the place of what is there as well
        place_of(Path(output).parent / name)
    if labels.max() >= ONE_BYTE:
        try:
            trial.run(final, ending, labels)
        except WriteError as error:  # a case need not hold the others
            told = "%s: labels of %d and more cannot be written there: %s"
            logger.warning(told, shown(str(final)), ONE_BYTE, shown(str(error)))


def is_tried(writer_class: type) -> bool:
    """Whether a writer is nnU-Net's, and so is all that it calls."""
    own = any(lookup.is_class(writer_class, reader) for reader in READERS)
    return own and not lookup.found(Step.WRITING, writer_class) and not any(_is_replaced(*row) for row in _LIBRARIES)


def _is_replaced(package: str, aliases: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a library is another where nnU-Net's readers look for it, or one of its functions."""
    module = importlib.import_module(package)
    home = package.partition(".")[0]
    return any(vars(reader).get(alias, module) is not module for reader in _readers() for alias in aliases) or any(
        not lookup.is_stocks(getattr(module, name), name, home) for name in names
    )


def _readers() -> list[Any]:
    return [
        sys.modules[module]
        for module in dict.fromkeys(reader.partition(":")[0] for reader in READERS)
        if module in sys.modules
    ]


class _Trial:
    """One writer with the properties of one case, for maps of a few voxels."""

    def __init__(self, writer_class: Any, properties: dict[str, Any], shape: Sequence[int], folder: Path) -> None:
        self._class = writer_class
        self._properties = {key: properties[key] for key in _OF_WRITERS if key in properties}
        self._shape = [min(extent, _EXTENT) for extent in shape]
        self._folder = folder
        self._by_itk = writer_class.__name__.startswith("SimpleITKIO")

    def run(self, final: Path, ending: str, labels: NDArray[Any]) -> list[str]:
        """Write these labels under the name of `final`, move and verify them; return the names of all files there are.

        Raises
        ------
        WriteError
        """
        self._check_name(final, ending)
        if self._by_itk and (format_of(final) is None or not is_utf8(self._folder)):
            return []  # a few voxels as .dcm end the process, where a whole map is written
        voxels = np.resize(labels[::-1], self._shape).astype(np.uint16 if labels.max() >= ONE_BYTE else np.uint8)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder, _quiet():
            written, moved = Path(folder, "written"), Path(folder, "moved")
            written.mkdir()
            try:
                writer = self._class()
                writer.write_seg(voxels.copy(), str(written / final.name), deepcopy(self._properties))
                written.rename(moved)
                names = _checked_names(moved, final.name)
                verify_label_file(moved / final.name, voxels.shape)
                self._check_values(writer, moved / final.name, voxels)
            except MemoryError:
                raise
            except Exception as error:
                raise self._told(error, written, moved) from error
            return names

    def advice(self, output: Path, ending: str, labels: NDArray[Any]) -> str:
        """Say what to change, once a run has failed: what is to blame is found by another name."""
        spacing = self._properties.get("sitk_stuff", {}).get("spacing", ())
        if len(spacing) > 3:
            words = f"the image has {len(spacing)} dimensions, which a label map has not"
            return f"{words}: store every channel in a file of its own, CASE_0000, CASE_0001 and so on"
        if self._by_itk and not is_utf8(output.parent):
            return "give another folder"
        try:
            self.run(Path("labels" + ending), ending, labels)
        except WriteError:
            known = getattr(self._class, "supported_file_endings", ())
            if ending not in known:
                made_for = f"{self._class.__name__} is made for {', '.join(known)}"
                return f"{made_for}: convert the images, and name such a 'file_ending' in the model's dataset.json"
            return "mend the header of the image, or the properties given"
        return "give the case another name"

    def _check_name(self, final: Path, ending: str) -> None:
        if self._by_itk and not is_utf8(final):
            raise twin(WriteError, RuntimeError)("the path is not UTF-8, and SimpleITK takes no other")
        for untried, names, why in _UNTRIED if self._by_itk else ():
            if ending == untried and names.match(final.name.removesuffix(ending)):
                raise twin(WriteError, RuntimeError)(f"SimpleITK cannot be given this name with {ending}: {why}")

    def _told(self, error: Exception, *folders: Path) -> WriteError:
        reason = " ".join(str(error).split())
        for folder in folders:
            reason = reason.replace(f"{folder}{os.sep}", "")
        kind = "" if isinstance(error, DamagedFileError) else type(error).__name__
        why = ": ".join(word for word in (kind, reason) if word)
        told = because(WriteError, f"{self._class.__name__} would not write the labels: {why}", error)
        return of_kinds(told, *[RuntimeError] * (self._by_itk and isinstance(error, DamagedFileError)))

    def _check_values(self, writer: Any, file: Path, voxels: NDArray[Any]) -> None:
        if lookup.found(Step.READING, self._class):
            return
        try:
            held = writer.read_seg(str(file))[0][0]
        except MemoryError:
            raise
        except Exception as error:  # a reader takes fewer formats than its writer
            logger.debug("%s writes %s and cannot read it: %s", self._class.__name__, file.name, error)
            return
        # where a reader turns axes, that is not about the writer
        if held.size == voxels.size and not np.array_equal(np.sort(held, axis=None), np.sort(voxels, axis=None)):
            raise DamagedFileError(f"{shown(file.name)} holds other labels than were written, as the format keeps them")


@contextmanager
def _quiet() -> Iterator[None]:
    """Log what nnU-Net's writers print: they will do so again, and what others print is none of ours."""
    with _trying:
        for reader in _readers():
            reader.print = _logged
        try:
            yield
        finally:
            for reader in _readers():
                del reader.print


def _logged(*words: object, **_: object) -> None:
    logger.debug("%s", " ".join(map(str, words)))


def _checked_names(folder: Path, name: str) -> list[str]:
    names = sorted(os.listdir(folder))
    if name not in names:
        raise DamagedFileError(f"it writes {', '.join(map(shown, names)) or 'nothing'} instead")
    if not all((folder / name).is_file() for name in names):
        raise DamagedFileError("it writes a folder")
    return names


def _has_room(folder: Path) -> bool:
    """Whether a folder takes the files of a trial: bytes or numbers of files may be used up, or it is for reading."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as trial:
            for name in ("written", "moved", "more"):
                Path(trial, name).write_bytes(bytes(_ROOM_BYTES))
    except OSError:
        return False
    return True
