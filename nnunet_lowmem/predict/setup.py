"""What one case works with: the predictor's attributes as they are when it begins, and the methods others may override.

The attributes that nnU-Net's predictor has are the only truth, and clients set them whenever they like. A `Setup` is a
picture of them that is held for a case and by nobody longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nnunet_lowmem.boxes import parse_box
from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.machine import machine_budget
from nnunet_lowmem.network import choices
from nnunet_lowmem.network.exact import ExactNetwork
from nnunet_lowmem.network.fast_network import FastNetwork
from nnunet_lowmem.network.tile_memory import TileBytes
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.options import OF_VOLUMES, Arithmetic, Options, arithmetic, on_network_grid, values_of
from nnunet_lowmem.predict.records import fingerprint, stated
from nnunet_lowmem.predict.weights import FoldWeights, digests
from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.types import BBox
from nnunet_lowmem.volumes.selection import spacing_of
from nnunet_lowmem.volumes.spilling import spill_folder


@dataclass(frozen=True)
class Steps:
    """Methods of the predictor that a subclass, or a client, may have replaced.

    Attributes
    ----------
    network : callable
        Returns the network of now: a client may put another in its place under way.
    place_network : callable
        Brings it to its device, for inference.
    predict_tile : callable
        ``_internal_maybe_mirror_and_predict``.
    predict_logits : callable
        ``predict_logits_from_preprocessed_data``.
    replaced : callable
        `overrides.lookup.replaced` for the predictor.
    """

    network: Callable[[], Any]
    place_network: Callable[[], None]
    predict_tile: Callable[[torch.Tensor], torch.Tensor]
    predict_logits: Callable[[torch.Tensor], Any]
    replaced: Callable[..., list[str]]


@dataclass
class Memo:
    """What is remembered of the network from case to case; a copy of the predictor begins anew.

    Attributes
    ----------
    ways : (parts, dict)
        How it is run in each `Arithmetic`, None where it cannot be, as long as it has these parts.
    watched : str
        Who watched it when a case last began.
    chosen : (network, Arithmetic), or None
        What was found by a trial, or is recorded of the files that a run continues, as long as it is this network.
    proven : (parts, dict)
        Of each state of its weights, whether its bits are the same without denormal ones.
    denormal : (ids of tensors, bytes), or None
        Of the tensors of a fold that hold denormal weights, at most.
    tile : (network, circumstances, TileBytes), or None
        What it takes for a tile, as long as it is this network under these circumstances.
    tile_s : float
        How long the tile took that was measured last; it warms up what later ones find.
    read : dict
        The files that the model was read from, with their state then.
    configuration : str or None
        Name of the configuration, as the checkpoints tell it.
    checksums : dict
        Of these files.
    """

    ways: tuple[Any, dict[Arithmetic, FastNetwork | ExactNetwork | None]] = field(default_factory=lambda: (None, {}))
    watched: str = ""
    chosen: tuple[Any, Arithmetic] | None = None
    proven: tuple[Any, dict[Any, bool]] = field(default_factory=lambda: (None, {}))
    denormal: tuple[Any, int] | None = None
    tile: tuple[Any, tuple[Any, ...], TileBytes] | None = None
    tile_s: float = 0.0
    read: Mapping[Path, list[str | int]] = field(default_factory=dict)
    configuration: str | None = None
    checksums: dict[Path, str] = field(default_factory=dict)

    @staticmethod
    def of_files(folder: Path, checkpoints: Sequence[Path], configuration: str) -> Memo:
        """Return that of a model that has just been read."""
        files = [folder / "plans.json", folder / "dataset.json", *checkpoints]
        return Memo(read=dict(zip(files, stated(files), strict=False)), configuration=configuration)

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


@dataclass(frozen=True)
class Setup:
    """A predictor with a model when a case begins; names are those of its attributes, but for these.

    Attributes
    ----------
    mirrored_axes : tuple of int
        Along which tiles are mirrored; empty without mirroring.
    is_mirroring : bool
        Whether nnU-Net's own method would mirror, or refuse axes that are none.
    weights : FoldWeights
        ``list_of_parameters``.
    options : Options
        Ours.
    steps : Steps
    memo : Memo
    """

    plans_manager: Any
    configuration_manager: Any
    label_manager: Any
    dataset_json: dict[str, Any]
    trainer_name: str
    device: torch.device
    perform_everything_on_device: bool
    tile_step_size: float
    use_gaussian: bool
    mirrored_axes: tuple[int, ...]
    is_mirroring: bool
    weights: FoldWeights
    network_threads: int | None
    verbose: bool
    verbose_preprocessing: bool
    allow_tqdm: bool
    options: Options
    steps: Steps
    memo: Memo

    @staticmethod
    def of(predictor: Any, steps: Steps, memo: Memo, checkpoints: tuple[Path, ...]) -> Setup:
        """Return a picture of a predictor; `checkpoints` are those that its ``list_of_parameters`` was read from."""
        axes, options = predictor.allowed_mirroring_axes, values_of(predictor)
        # axes may be an array of numpy; what is no collection is the network's to refuse
        mirrored = map(int, axes) if predictor.use_mirroring and isinstance(axes, Iterable) else ()
        own: dict[str, Any] = {
            "mirrored_axes": tuple(mirrored),
            "is_mirroring": bool(predictor.use_mirroring) and axes is not None,
            "weights": FoldWeights(predictor.list_of_parameters, checkpoints, spill_folder(options.tmp_dir)),
            "options": options,
            "steps": steps,
            "memo": memo,
        }
        alike = {entry.name: getattr(predictor, entry.name) for entry in fields(Setup) if entry.name not in own}
        return Setup(**alike, **own)

    @property
    def heads(self) -> int:
        """Of the network: classes, or regions."""
        return int(self.label_manager.num_segmentation_heads)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Of a tile, in voxels: two axes or three."""
        return tuple(self.configuration_manager.patch_size)

    @property
    def arithmetic(self) -> Arithmetic:
        """That is asked for."""
        return arithmetic(self.options.fast) if self.device.type == "cpu" else Arithmetic.EXACT

    @property
    def bbox(self) -> BBox | None:
        """The box that is asked for."""
        return parse_box(self.options.bbox)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """What is asked for in the place of what files say: mm, slowest axis of the file first."""
        return spacing_of(self.options.spacing)

    @property
    def on_network_grid(self) -> bool:
        """Whether labels are wanted on the grid of the network."""
        return on_network_grid(self.options)

    @property
    def name_suffix(self) -> str:
        """What is added to the names of cases, where outputs in a folder are named for them: it is not stock's file."""
        return "_network" if self.on_network_grid else ""

    @property
    def file_ending(self) -> str:
        """Of images and label maps."""
        return str(self.dataset_json["file_ending"])

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Of the network's input: (1, channels, *patch_size)."""
        channels = stock_calls.input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        return (1, channels, *self.patch_size)

    @property
    def kernel_threads(self) -> int:
        """Threads of the compiled kernels."""
        return self.options.kernel_threads or usable_cores()

    def choice_key(self) -> str | None:
        """Return the name under which a choice between arithmetics is kept; None where no file tells the model."""
        files = self.weights.checkpoints
        try:
            told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        except OSError:
            return None
        model = [self.plans_manager.plans, self.configuration_manager.configuration, self.trainer_name, self.heads]
        loaded = self.weights.parameters is not None and len(self.weights.parameters) == len(files)
        return choices.key_of([*model, told], self.tile_shape) if told and loaded else None

    def budget(self, with_children: bool = True) -> Budget:
        """Return limits, and what is in use but for weights that can be moved: the plan says where these are."""
        options = self.options
        budget = machine_budget(options.max_ram, options.max_vram, self.device, options.tmp_dir, with_children)
        return budget.with_in_use(-self.weights.movable_bytes)


def checksum(setup: Setup, probabilities: bool) -> str:
    """Return a checksum of all that labels, or probabilities, depend on beside the images."""
    description = {
        "plans": setup.plans_manager.plans,
        "configuration": setup.configuration_manager.configuration,
        "dataset": setup.dataset_json,
        "step": setup.tile_step_size,
        "gaussian": setup.use_gaussian,
        "mirroring": list(setup.mirrored_axes),
        "device": setup.device.type,
        "accept_nan": setup.options.accept_nan,
        "probabilities": setup.options.probabilities_dtype if probabilities else None,
        "fast": setup.options.fast,
    }
    if setup.bbox is not None:
        description["bbox"] = setup.bbox
    for name in (*OF_VOLUMES, "output_grid"):
        if getattr(setup.options, name) != getattr(Options, name):
            description[name] = getattr(setup.options, name)
    if setup.options.roi is not None:  # of a mask the record has size and time
        description["roi"] = True
    weights = setup.weights.parameters
    if weights is None:  # the network is used as it is, whatever a client has made of it
        weights = [getattr(uncompiled(setup.steps.network()), "state_dict", dict)()]
    return fingerprint(description, digests(weights))
