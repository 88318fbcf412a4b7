"""What a predictor of ours has beside nnU-Net's attributes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_lowmem.budget.planner import Plan
from nnunet_lowmem.network.fast_network import FastNetwork
from nnunet_lowmem.network.tile_memory import TileBytes
from nnunet_lowmem.nnunet.trust import Trust
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.predict.progress import Listener
from nnunet_lowmem.system.clock import Progress, StageClock
from nnunet_lowmem.system.threads import usable_cores


class Options:
    """The values that hold where nobody sets them: programs derive classes whose ``__init__`` does not call ours."""

    max_ram: int | str | None = None
    max_vram: int | str | None = None
    tmp_dir: Path | None = None
    kernel_threads = usable_cores()
    probabilities_dtype = "float32"
    worker_timeout_s = 600.0
    prefetch: bool | None = None
    continue_on_error = True
    accept_nan = False
    trust = Trust()
    fast = False
    report = False
    on_plan: Callable[[Plan], None] | None = None
    on_case: Callable[[CaseReport], None] | None = None
    on_progress: Callable[[Progress], None] | None = None

    #: What the network, an override or a callback raises ends a run at once. For commands it is a failure of the case.
    foreign_ends_run = True
    #: At most; None takes stock's number, which it sets for predictions and not for validations.
    network_threads: int | None = None

    _clock: StageClock | None = None  # of the case under way
    _fast_network: tuple[Any, FastNetwork | None] = (None, None)
    _listener: Listener | None = None
    _known_tile: tuple[Any, tuple[Any, ...], TileBytes] | None = None
