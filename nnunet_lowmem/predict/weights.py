"""The weights of all folds: read once, then kept in RAM or in a file without a name; no checkpoint is read again.

``list_of_parameters`` is a plain list of dicts of tensors as in stock, and whoever embeds the predictor holds and edits
them. So a tensor stays the same object when its memory moves to a mapped file, tensors that share memory go on sharing
it, and memory that something else shares (a view, a numpy array, the network) stays where it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_lowmem.errors import ModelError, because
from nnunet_lowmem.network import denormals
from nnunet_lowmem.network.tile_memory import storage_users
from nnunet_lowmem.nnunet.model import check_finite, uncompiled, why_not_loaded
from nnunet_lowmem.overrides.foreign import foreign
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.allocator import return_freed_memory
from nnunet_lowmem.system.clock import StageClock
from nnunet_lowmem.volumes.mapped import spilled_array
from nnunet_lowmem.volumes.spilling import spill_bytes, spill_folder

Parameters = Sequence[Mapping[str, Any]]

#: Of the RAM that is free before the first fold is read, all folds together take no more than one part in so many.
SHARE_OF_FREE_RAM = 4
# smaller blocks lie between others in the heap, so that the pages they free are few
_LEAST_BYTES = 128 * 1024
_ALIGNMENT = 64

_logger = logging.getLogger(__name__)

# the files there are, as long as a tensor lies in them
_files: list[weakref.ref[np.ndarray[Any, Any]]] = []


@dataclass(frozen=True)
class FoldWeights:
    """The weights of all folds of a predictor.

    Attributes
    ----------
    parameters : list of dict, or None
        nnU-Net's ``list_of_parameters``; without it the network is used as it is.
    checkpoints : tuple of Path
        What they were read from.
    folder : Path
        Where they go when RAM gets scarce.
    """

    parameters: Parameters | None
    checkpoints: tuple[Path, ...]
    folder: Path

    @property
    def folds(self) -> int:
        """Passes over an image."""
        return 1 if self.parameters is None else len(self.parameters)

    @property
    def movable_bytes(self) -> int:
        """What is in RAM and `move` would free."""
        return sum(_size_bytes(tensors) for tensors in _sharing(self.parameters) if _is_movable(tensors))

    @property
    def missing_bytes(self) -> int:
        """What is described and not read: on the device "meta"."""
        return sum(_size_bytes(tensors) for tensors in _sharing(self.parameters) if tensors[0].is_meta)

    @property
    def are_on_disk(self) -> bool:
        """Whether `move` has moved any of these weights."""
        _files[:] = [file for file in _files if file() is not None]
        areas = [(mapped.ctypes.data, mapped.nbytes) for file in _files if (mapped := file()) is not None]
        places = [tensors[0].untyped_storage().data_ptr() for tensors in _sharing(self.parameters)] if areas else []
        return any(0 <= place - start < size_bytes for place in places for start, size_bytes in areas)

    def move(self) -> int:
        """Let the tensors have their memory in a file in `folder`; return how many bytes have moved.

        The file has no name, is mapped, and goes with the last of the tensors. Nothing is held twice in RAM.

        Raises
        ------
        WriteError
            If the folder has too little room.
        """
        blocks = [tensors for tensors in _sharing(self.parameters) if _is_movable(tensors)]
        sizes = list(map(_size_bytes, blocks))
        if not blocks:
            return 0
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        mapped = spilled_array((starts[-1],), np.dtype(np.uint8), self.folder)
        _files.append(weakref.ref(mapped))
        for tensors, start, size_bytes in zip(blocks, starts, sizes, strict=False):
            _move(tensors, torch.from_numpy(mapped[start : start + size_bytes]))
        return_freed_memory()
        _logger.info("weights, %s: kept in a file in %s", format_gib(sum(sizes)), self.folder)
        return sum(sizes)

    def name(self, fold: int) -> str:
        """Name the checkpoint of a fold, as long as the list is as long as it was read."""
        if self.parameters is not None and len(self.checkpoints) == len(self.parameters):
            return str(self.checkpoints[fold])
        return f"entry {fold} of list_of_parameters"


def keep(
    folds: Iterable[Mapping[str, Any]], free_bytes: int, tmp_dir: str | os.PathLike[str] | None
) -> list[Mapping[str, Any]]:
    """Return the weights of folds, each read when it is asked for: in RAM and, beyond a part of that, on disk."""
    kept: list[Mapping[str, Any]] = []
    disk_bytes, folder = spill_bytes(tmp_dir), spill_folder(tmp_dir)
    room_bytes = free_bytes // SHARE_OF_FREE_RAM
    for number, fold in enumerate(folds):
        kept.append(fold)
        _tell_of_denormals(fold, number)
        _make_movable(fold)
        weights = FoldWeights([fold], (), folder)
        if room_bytes < (size_bytes := weights.movable_bytes) <= disk_bytes:
            weights.move()
            disk_bytes -= size_bytes
        else:
            room_bytes -= size_bytes
    return kept


def denormals_of(fold: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many weights of a fold are denormal numbers, and how many there are."""
    # one may stand under several names
    found = (value for value in fold.values() if isinstance(value, torch.Tensor))
    tensors = {(value.data_ptr() or id(value), value.numel()): value for value in found}.values()
    return sum(map(denormals.count, tensors)), sum(tensor.numel() for tensor in tensors)


def _tell_of_denormals(fold: Mapping[str, Any], number: int) -> None:
    """Say how many weights are denormal numbers, where that may cost time."""
    found, all_of_them = denormals_of(fold)
    if found * denormals.WORTH_A_WORD > all_of_them:
        _logger.info(
            "fold %d of those asked for: %s of %s weights are below 1.2e-38, which many processors are slow with",
            number, f"{found:,}", f"{all_of_them:,}",
        )  # fmt: skip


def load_into(network: Any, weights: Mapping[str, torch.Tensor], name: str, clock: StageClock | None) -> None:
    """Load the weights of a fold; `clock` is told of what somebody else's hook raises.

    Raises
    ------
    ModelError
        If they do not fit the network, or are no numbers.
    """
    check_finite(weights, name)
    with foreign(clock):
        try:
            uncompiled(network).load_state_dict(weights)
        except RuntimeError as error:
            if "state_dict" not in str(error):  # a hook's
                raise
            raise because(ModelError, why_not_loaded(name, error), error) from error


def _make_movable(fold: Mapping[str, Any]) -> None:
    """Let weights that have just been read, and are nobody else's yet, have memory of torch's own.

    What torch reads cannot be told from memory that came from elsewhere, and a loader may have mapped the checkpoint.
    """
    for tensors in _sharing([fold]):
        storage = tensors[0].untyped_storage()
        if _is_ours(tensors) and not storage.resizable():
            _move(tensors, torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu"))


def _move(tensors: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    memory = target.untyped_storage()
    memory.copy_(tensors[0].untyped_storage())
    with torch.no_grad():
        for tensor in tensors:
            tensor.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def _size_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the size of the memory that tensors share."""
    return tensors[0].untyped_storage().nbytes()


def _sharing(parameters: Parameters | None) -> list[list[torch.Tensor]]:
    """Group the tensors of all folds by the memory that they share."""
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for fold in () if parameters is None else parameters:
        for value in fold.values() if isinstance(fold, Mapping) else ():
            if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
                groups.setdefault(value.untyped_storage()._cdata, {})[id(value)] = value
    return [list(group.values()) for group in groups.values()]


def _is_movable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the memory is torch's own and no one else's.

    Memory that came from elsewhere, or was ever seen as a numpy array, cannot be resized.
    """
    return _is_ours(tensors) and tensors[0].untyped_storage().resizable()


def _is_ours(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether there is enough memory in RAM to care, and these tensors are all that use it."""
    if tensors[0].device.type != "cpu" or any(tensor.is_inference() for tensor in tensors):
        return False
    return _size_bytes(tensors) >= _LEAST_BYTES and storage_users(tensors[0]) == len(tensors)


def digests(parameters: Parameters) -> Iterator[bytes]:
    """Yield what tells weights apart: names, types, shapes and a checksum of the bytes; shared memory is read once."""
    known: dict[tuple[Any, ...], bytes] = {}
    for number, fold in enumerate(parameters):
        for name, value in fold.items() if isinstance(fold, Mapping) else [("", fold)]:
            if not isinstance(value, torch.Tensor):
                yield repr((number, name, value)).encode()
                continue
            yield repr((number, name, str(value.dtype), tuple(value.shape))).encode()
            where = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if where not in known:
                # `Tensor.numpy` would fix the memory where it is for good
                values = np.from_dlpack(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
                known[where] = hashlib.blake2b(values.data, digest_size=16).digest()
            yield known[where]
