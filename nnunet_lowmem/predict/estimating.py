"""What the cases of a folder will take, by their headers: for ``--estimate``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from nnunet_lowmem.budget.arrays import Budget
from nnunet_lowmem.budget.case_facts import CaseSizes
from nnunet_lowmem.budget.estimates import Estimate, estimates
from nnunet_lowmem.budget.facts import ModelFacts
from nnunet_lowmem.names import shown
from nnunet_lowmem.network.tile_memory import TileBytes, copy_of_zeros
from nnunet_lowmem.nnunet import model_files, model_keys
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.predict.case import case_sizes, warm_up_kernels
from nnunet_lowmem.predict.logits import TileNetwork, grid_of
from nnunet_lowmem.predict.parts import mask_file
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.predict.volume_jobs import case_name, check_spacing, files_of, named, setup_for_files, volumes_of
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.types import Place, PreprocessedCase, once

logger = logging.getLogger(__name__)

#: Returns a setup with another network and other axes of mirroring.
WithNetwork = Callable[[Any, tuple[int, ...] | None], Setup]


def estimate(setup: Setup, with_network: WithNetwork, folder: str, probabilities: bool) -> Iterator[Estimate]:
    """Plan every case of a folder: upper bounds, since the nonzero crop is not known yet."""
    configuration, ending = setup.configuration_manager, setup.file_ending
    model_keys.check_case(setup.plans_manager.plans, configuration.configuration, preprocesses=True, exports=True)
    warm_up_kernels(setup)
    budget = setup.budget()
    cascades = configuration.previous_stage_name is not None
    check_spacing(setup)
    source = named(folder)
    volumes = volumes_of(source, None, setup.options, ending)
    case_files = model_files.list_cases(source, ending) if volumes is None else volumes.cases

    def name_of(files: list[str]) -> str:
        return model_files.case_name(files, ending) if volumes is None else case_name(files)

    def setup_of(files: list[str]) -> Setup:
        return setup if volumes is None else setup_for_files(setup, files_of(files, setup))

    cases = [(shown(name_of(files)), files, files[0] if cascades else None) for files in case_files]

    def mask_of(files: list[str]) -> str | None:
        return mask_file(setup.options.roi, name_of(files), setup_of(files).file_ending)

    network, ways = TileNetwork(setup), Ways(setup)
    undecided = [Arithmetic.BFLOAT16, Arithmetic.FLOAT32] if ways.is_undecided else []
    found = []
    for arithmetic in undecided or [ways.arithmetic()]:
        if undecided:
            ways.take(arithmetic)
        model = network.facts(bytes_of_zeros(setup, budget, with_network).with_margin())
        label, numbered = arithmetic.value if undecided else "", ending if volumes is None else None

        def sizes_of(files: list[str], model: ModelFacts = model) -> CaseSizes:
            return case_sizes(setup_of(files), model)

        found.append(estimates(cases, sizes_of, model, budget, probabilities, numbered, label, mask_of))
    if undecided:
        ways.forget()
    return chain.from_iterable(zip(*found, strict=True))


def bytes_of_zeros(setup: Setup, budget: Budget, with_network: WithNetwork) -> TileBytes:
    """Measure a tile of zeros in a copy of the network that nobody else sees, if it fits, or tell what is expected.

    The copy is run in the arithmetic in which the network is.
    """
    known = TileNetwork(setup).tile_bytes()
    place = Place.VRAM if setup.device.type == "cuda" else Place.RAM
    limit = budget.limit(place)
    room = 2**62 if limit is None else limit - budget.reserved(place) - known.certain
    sample = copy_of_zeros(uncompiled(setup.steps.network()), setup.device, room) if known.uncertain else None
    if sample is None:
        return known.after(None)
    patch = setup.patch_size
    two_tiles = (2, *patch) if len(patch) == 2 else (2 * patch[0], *patch[1:])
    case = PreprocessedCase(np.zeros((setup.tile_shape[1], *two_tiles), np.float32), None, {})
    # mirroring along one axis holds as much as along all of them
    network = TileNetwork(with_network(sample, setup.mirrored_axes[:1] or None))
    network.ways.take(Ways(setup).arithmetic())
    try:
        return network.measure(network.tiles(case, grid_of(setup, case)), once)
    except (MemoryError, RuntimeError) as error:
        logger.info("no tile could be run to measure the network: %s", error)
        return known.after(None)
