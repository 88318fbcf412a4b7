"""``nnunet-lowmem ensemble``: nnU-Net's ensembling of .npz archives, one head at a time."""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, load_pickle, save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.labels.heads import HeadContest
from nnunet_lowmem.labels.probabilities import npz_sink
from nnunet_lowmem.labels.rules import LabelRule
from nnunet_lowmem.nnunet.adapter import label_rule, write_properties
from nnunet_lowmem.nnunet.label_writing import write_segmentation
from nnunet_lowmem.nnunet.rehearsing import rehearse
from nnunet_lowmem.options import Options, asks_for_cluster
from nnunet_lowmem.system.atomic_files import atomic_output

_ENTRY = "probabilities.npy"


@dataclass
class HeadArchive:
    """The probabilities of one .npz, read head after head.

    Attributes
    ----------
    path : Path
    shape : tuple of int
        (heads, x, y, z)
    dtype : numpy dtype
    fortran_order : bool
        Whether x is the fastest axis; numpy says so of one head whose axes were reversed, and of no more than one.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    _file: IO[bytes]

    def read_head(self) -> NDArray[np.float32]:
        """Return the next head as float32, shape (x, y, z).

        Raises
        ------
        UsageError
            If it is damaged, or not all there.
        """
        shape = self.shape[1:]
        needed_bytes = math.prod(shape) * self.dtype.itemsize
        try:
            data = self._file.read(needed_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}") from error
        if len(data) < needed_bytes:
            raise UsageError(f"{self.path} ends after {len(data):,} of the {needed_bytes:,} bytes of a head")
        head = np.frombuffer(data, self.dtype).reshape(shape, order="F" if self.fortran_order else "C")
        return head.astype(np.float32, order="C")


@contextmanager
def open_heads(path: Path) -> Iterator[HeadArchive]:
    """Open an archive of probabilities.

    Raises
    ------
    UsageError
        If it is no .npz with an array ``probabilities`` of four dimensions that lies head after head.
    """
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open(_ENTRY)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no archive of probabilities: {error}") from error
    with archive, file:
        if len(shape) != 4 or (fortran_order and shape[0] != 1):
            raise UsageError(f"{path} holds an array of shape {shape} in an order that cannot be read head by head")
        yield HeadArchive(path, shape, dtype, fortran_order, file)


def ensemble_folders(
    folders: Sequence[Path], output: Path, save_npz: bool, options: Options | None = None
) -> Iterator[Path]:
    """Average the archives of the same name in all folders and write segmentations, as ``nnUNetv2_ensemble`` does.

    Parameters
    ----------
    folders : sequence of Path
        Outputs of ``--save_probabilities``; dataset.json and plans.json are taken from the first.
    output : Path
    save_npz : bool
        Write the averaged probabilities, too.
    options : Options or None
        Where these ask for a cluster, its workers do it, case by case.

    Yields
    ------
    Path
        Each segmentation, when it is there.

    Raises
    ------
    UsageError
        If a folder lacks a case, or the archives of a case disagree in shape.
    """
    many = options is not None and asks_for_cluster(options)
    if many:  # whose workers are in other folders
        folders, output = [Path(os.path.abspath(folder)) for folder in folders], Path(os.path.abspath(output))
    _managers(folders[0])
    names = _common_archives(folders)
    output.mkdir(parents=True, exist_ok=True)
    save_json(load_json(str(folders[0] / "dataset.json")), str(output / "dataset.json"), sort_keys=False)
    calls = [(name.removesuffix(".npz"), folders, output, save_npz) for name in names]
    if options is not None and many:
        from nnunet_lowmem.cluster.spreading import on_workers  # nobody else loads Dask

        yield from on_workers(ensemble_case, calls, options)
        return
    for call in calls:
        yield ensemble_case(*call)


def _managers(folder: Path) -> tuple[dict[str, Any], PlansManager, LabelRule]:
    dataset_json, plans = load_json(str(folder / "dataset.json")), load_json(str(folder / "plans.json"))
    plans_manager = PlansManager(plans)
    rule = label_rule(plans_manager.get_label_manager(dataset_json))
    if rule is None:
        raise UsageError("the plans use a label manager that is not nnU-Net's own; use nnUNetv2_ensemble")
    return dataset_json, plans_manager, rule


def ensemble_case(name: str, folders: Sequence[Path], output: Path, save_npz: bool) -> Path:
    """Average the archives of one case and write its segmentation, which is returned. See `ensemble_folders`."""
    dataset_json, plans_manager, rule = _managers(folders[0])
    ending, case = dataset_json["file_ending"], output / name
    properties = load_pickle(str(folders[0] / f"{name}.pkl"))
    archives = [folder / f"{name}.npz" for folder in folders]
    with open_heads(archives[0]) as archive:
        shape = archive.shape[1:]
    reader = plans_manager.image_reader_writer_class
    rehearse(reader, str(case), ending, properties, shape, rule, Path(tempfile.gettempdir()))
    labels = _merge(archives, rule, Path(f"{case}.npz") if save_npz else None)
    if save_npz:
        write_properties(properties, f"{case}.pkl")
    write_segmentation(labels, properties, f"{case}{ending}", plans_manager)
    return Path(f"{case}{ending}")


def _common_archives(folders: Sequence[Path]) -> list[str]:
    names = [{path.name for path in folder.glob("*.npz")} for folder in folders]
    everything = set().union(*names)
    for folder, present in zip(folders, names, strict=True):
        if missing := sorted(everything - present):
            raise UsageError(f"{folder} lacks {len(missing)} of {len(everything)} archives; the first is {missing[0]}")
    if not everything:
        raise UsageError(f"{folders[0]} holds no .npz; predict with --save_probabilities first")
    return sorted(everything)


def _merge(files: Sequence[Path], rule: LabelRule, target: Path | None) -> NDArray[np.uint16]:
    """Average head after head; write the averages to `target`, if any, and return the labels."""
    with ExitStack() as stack:
        archives = [stack.enter_context(open_heads(file)) for file in files]
        heads, *shape = archives[0].shape
        for archive in archives[1:]:
            if archive.shape != archives[0].shape:
                raise UsageError(
                    f"{archive.path} has shape {archive.shape}, but {archives[0].path} has {archives[0].shape}"
                )
        sink = None
        if target is not None:
            path = stack.enter_context(atomic_output(target))
            sink = stack.enter_context(npz_sink(path, heads, tuple(shape), [0, 1, 2], np.dtype(np.float32)))
        labels = np.zeros(shape, np.uint16)
        contest = HeadContest(rule, labels)
        for _ in range(heads):
            mean = _mean(archives)
            if sink is not None:
                sink(mean)
            contest.show(mean)
        return labels


def _mean(archives: Sequence[HeadArchive]) -> NDArray[np.float32]:
    total = archives[0].read_head()
    for archive in archives[1:]:
        total += archive.read_head()
    total /= len(archives)
    return total
