"""Cases that are refused by their headers, before they cost anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.preprocessing.reading import check_grid, count_channels, library_of, read_by, selection_of
from nnunet_lowmem.preprocessing.refusals import check_names
from nnunet_lowmem.volumes.formats import is_volume, read_header
from nnunet_lowmem.volumes.headers import Header

try:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
except ImportError:  # new in nnU-Net 2.6
    SimpleITKIOWithReorient = None

#: More than any machine can predict; the budget speaks below that.
VOXELS = 2**40
# between the spacing that an array's metadata says and the model's
_LARGEST_FACTOR = 8


def check_headers(
    image_files: Sequence[str],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    given_spacing: Sequence[float] | None = None,
) -> None:
    """Refuse a case by the names and headers of its files.

    Raises
    ------
    UsageError
        With the file and what is the matter.
    """
    check_names(image_files, plans_manager.image_reader_writer_class)
    channels = len(configuration_manager.normalization_schemes)
    forward, spacing = plans_manager.transpose_forward, configuration_manager.spacing
    check_case(image_files, plans_manager.image_reader_writer_class, channels, spacing, forward, given_spacing)


def check_case(
    files: Sequence[str],
    reader: type,
    channels: int,
    target_spacing: Sequence[float],
    order: Sequence[int] = (0, 1, 2),
    given_spacing: Sequence[float] | None = None,
) -> None:
    """Refuse a case by the headers of its files.

    Pictures, formats that are not in the table, and readers that are not nnU-Net's for volumes decide for themselves;
    what they make of the files is checked when it has been read.

    Parameters
    ----------
    files : sequence of str
        One file per channel, or fewer with several channels each.
    reader : type
        The model's reader class.
    channels : int
        How many the model takes.
    target_spacing : sequence of float
        The network's, slowest axis first: of two axes or three.
    order : int, 3
        nnU-Net's ``transpose_forward``.
    given_spacing : (float, float, float), optional
        In the place of what the headers say.

    Raises
    ------
    UsageError
        With the file and what is the matter.
    """
    library = library_of(reader)
    if library is None or not all(is_volume(file, library) for file in files) or lookup.found(Step.READING, reader):
        return
    with read_by(reader):
        headers = [read_header(file, library) for file in files]
    for file, header in zip(files, headers, strict=True) if given_spacing is None else ():
        _check_spacing(file, header)
    known = (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient)
    if reader in known or selection_of(reader) is not None:
        held = sum(count_channels(file, header, reader) for file, header in zip(files, headers, strict=True))
        if held != channels:
            raise twin(UsageError, RuntimeError if 0 < held < channels else IndexError)(
                _wrong_count(files, held, channels)
            )
        check_grid(files, [header.shape for header in headers], [header.spacing for header in headers])
    if headers[0].about.get("is_said"):
        _check_unit(files[0], headers[0].grid()[1], target_spacing, order)
    _check_resampled(files[0], headers[0], given_spacing or headers[0].spacing, target_spacing)


def _check_spacing(file: str, header: Header) -> None:
    """Refuse a spacing as it is stored: of 0 and of what is no number SimpleITK makes 1 without a word."""
    stored = header.layout.spacing[:3] if header.layout is not None and header.components == 1 else ()
    if not all(0 < step < math.inf for step in stored):
        raise UsageError(f"{file}: the spacing in its header is {stored[::-1]} mm; mend it, all must be positive")


def _wrong_count(files: Sequence[str], held: int, channels: int) -> str:
    names = ", ".join([*files[:4], "..."] if len(files) > 4 else files)
    needed = f"one file per channel, _0000 to _{channels - 1:04d}" if channels > 1 else "a single file, _0000"
    return f"The image has {held} channels, the model takes {channels}: give {needed}. Given were {names}"


def _check_unit(file: str, spacing: Sequence[float], target: Sequence[float], order: Sequence[int]) -> None:
    """Refuse a model whose voxels are of another order of size: one of the two is not in millimetres."""
    axes = order[-len(target) :]
    for axis, wanted in zip(axes, target, strict=True):
        if not 1 / _LARGEST_FACTOR <= spacing[axis] / wanted <= _LARGEST_FACTOR:
            trained = [wanted for _, wanted in sorted(zip(axes, target, strict=True))]
            both = f"its voxels are {_in_words(spacing)} mm large, the model's {_in_words(trained)}"
            raise UsageError(
                f"{file}: {both}: along axis {axis} more than {_LARGEST_FACTOR} times apart. If one of them is in "
                "another unit, give the image's as the model has it with --spacing Z Y X"
            )


def _in_words(spacing: Sequence[float]) -> str:
    return " x ".join(f"{float(step):.6g}" for step in spacing)


def _check_resampled(file: str, header: Header, steps: Sequence[float], target_spacing: Sequence[float]) -> None:
    """Sorted, the spacings give the smallest grid that resampling could lead to."""
    spacing = steps[-len(target_spacing) :]
    voxels = math.prod(header.shape[-3:]) * math.prod(spacing) / math.prod(target_spacing)
    if voxels > VOXELS:
        raise UsageError(
            f"{file}: {header.shape[-3:]} voxels of {tuple(steps)} mm make {voxels:.3g} voxels at the model's "
            f"{tuple(target_spacing)} mm, more than {VOXELS:.3g}: the spacing in its header cannot be right"
        )
