"""The ways in which the network of now can be run, and which is taken: asked for, chosen by a trial, or kept."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from nnunet_lowmem.network import choices, denormals
from nnunet_lowmem.network.exact import ExactNetwork, exact_network
from nnunet_lowmem.network.fast_network import FastNetwork, fast_network, parts_of, put_back
from nnunet_lowmem.network.known import why_watched
from nnunet_lowmem.network.tile_memory import TileBytes, measured
from nnunet_lowmem.network.trial import Trial, is_unknown_to_torch, try_both
from nnunet_lowmem.nnunet import adapter
from nnunet_lowmem.nnunet.model import uncompiled
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.overrides.bypassed import Step
from nnunet_lowmem.predict.setup import Setup
from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.system.threads import torch_threads
from nnunet_lowmem.types import Attempt, once

logger = logging.getLogger(__name__)


class Ways:
    """How the network of now is run; all that is known of it is remembered with the predictor.

    Parameters
    ----------
    setup : Setup
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def arithmetic(self) -> Arithmetic:
        """Tell in which arithmetic the network of now is run or, as long as that is not chosen, may be run."""
        return self._taken()[0]

    def taken(self) -> FastNetwork | ExactNetwork | None:
        """Return how the network of now is run; None where nnU-Net's own method runs it."""
        return self._taken()[1]

    def _taken(self) -> tuple[Arithmetic, FastNetwork | ExactNetwork | None]:
        asked = self._setup.arithmetic
        way = self.of(asked)
        if asked is Arithmetic.BFLOAT16 and way is not None and (chosen := self._chosen() or asked) is not asked:
            asked, way = chosen, self.of(chosen)
        return (asked, way) if way is not None else (Arithmetic.EXACT, self.of(Arithmetic.EXACT))

    def prepare(self) -> None:
        """Let the network that is run now have its weights of now, in the order in memory that its way needs."""
        memo, network = self._setup.memo, uncompiled(self._setup.steps.network())
        if memo.watched != (watched := why_watched(network)):  # classes may be patched, which the network does not show
            memo.ways, memo.watched = (None, {}), watched
        way = self.taken()
        if not isinstance(way, FastNetwork) and isinstance(network, torch.nn.Module):
            put_back(network)
        if way is not None:
            way.refresh()

    def of(self, arithmetic: Arithmetic) -> FastNetwork | ExactNetwork | None:
        """Return how the network of now is run in an arithmetic; None where it cannot be."""
        setup = self._setup
        if setup.device.type != "cpu" or setup.steps.replaced(Step.NETWORK, Step.WINDOW):
            return None
        given = setup.steps.network()
        network = uncompiled(given)
        if setup.memo.ways[0] != (parts := parts_of(network)):
            setup.memo.ways = parts, {}
        ways = setup.memo.ways[1]
        if arithmetic not in ways:
            if arithmetic is not Arithmetic.EXACT:
                ways[arithmetic] = fast_network(network, setup.tile_shape, setup.kernel_threads, arithmetic)
            else:  # a compiled network is run by what has compiled it
                ways[arithmetic] = exact_network(network, setup.kernel_threads) if network is given else None
        return ways[arithmetic]

    def _chosen(self) -> Arithmetic | None:
        """Return what was chosen of the network before: in this process, for the files that it continues, or here."""
        setup, network = self._setup, self._setup.steps.network()
        if setup.memo.chosen is None or setup.memo.chosen[0] is not network:
            found = None if (key := setup.choice_key()) is None else choices.remembered(key)
            if found is not None:
                self._take(found, " earlier")
        chosen = setup.memo.chosen
        return None if chosen is None or chosen[0] is not network else chosen[1]

    @property
    def is_undecided(self) -> bool:
        """Whether bfloat16 is asked for, could be used, and has not been compared with float32 here."""
        asked = self._setup.arithmetic
        if asked is not Arithmetic.BFLOAT16 or self.of(asked) is None or self.of(Arithmetic.FLOAT32) is None:
            return False
        return self._chosen() is None

    def take(self, arithmetic: Arithmetic) -> None:
        """Run the network of now in an arithmetic, whatever is known of it."""
        self._setup.memo.chosen = self._setup.steps.network(), arithmetic

    def forget(self) -> None:
        """Choose again."""
        self._setup.memo.chosen = None

    def _take(self, trial: Trial, when: str = "") -> None:
        self.take(Arithmetic.BFLOAT16 if trial.chooses else Arithmetic.FLOAT32)
        logger.info("fast bfloat16%s %s", when, trial.in_words())

    def choose(
        self,
        middle: Callable[[], torch.Tensor],
        attempt: Attempt = once,
        has_room: Callable[[TileBytes], bool] = lambda _: True,
    ) -> int:
        """Run a tile in float32 and in bfloat16, and take the better one; return the bytes that this took.

        Parameters
        ----------
        middle : callable
            Returns a real tile: float32, shape (1, channels, *patch_size).
        attempt : Attempt
        has_room : callable
            Whether the plan has room for a tile in float32; else a part of the tile is compared.
        """
        if not self.is_undecided:
            return 0
        setup, half = self._setup, self.of(Arithmetic.BFLOAT16)
        single = self.of(Arithmetic.FLOAT32)
        assert isinstance(half, FastNetwork), "what can be run in bfloat16"
        assert isinstance(single, FastNetwork), "can be run in float32"
        for way in (single, half):
            way.refresh()
        bounded = self.bounded(Arithmetic.FLOAT32)
        whole = has_room(bounded)
        rule = adapter.label_rule(setup.label_manager)
        tile, ranked = middle(), rule is None or rule.ranked
        with torch_threads(usable_cores()), single.threads, half.threads, torch.inference_mode():
            try:
                trial, taken = measured(
                    lambda: attempt(lambda: try_both(single, half, tile, ranked=ranked, has_room=whole)), setup.device
                )
            except (NotImplementedError, RuntimeError) as error:
                if not is_unknown_to_torch(error):
                    raise
                logger.warning("fast bfloat16: the network runs as it does without: %s", error)
                self.take(Arithmetic.EXACT)
                self.prepare()
                return 0
        self._take(trial)
        if trial.half_s is not None and (key := setup.choice_key()) is not None:
            choices.remember(key, trial)
        return bounded.after(taken).certain if whole else taken.size_bytes

    def bounded(self, arithmetic: Arithmetic) -> TileBytes:
        """Tell what the network's tensors take for a tile in an arithmetic, and what may be beside them."""
        setup, way = self._setup, self.of(arithmetic)
        mirrored = bool(setup.mirrored_axes)
        if isinstance(way, FastNetwork):
            # the mean, and where there is neither mirror nor head what is no bfloat16 any more
            copied = way.channels if mirrored or way.head_layer is None else 0
            return TileBytes.bounded(way.body, setup.tile_shape, copied, way.input_dtype)
        network = uncompiled(setup.steps.network())
        if way is None:
            return TileBytes.bounded(network, setup.tile_shape, 2 * setup.heads if mirrored else 0)
        if not self.denormal_bytes():
            return TileBytes.bounded(way.body, setup.tile_shape, setup.heads if mirrored else 0)
        # a tile that is run both ways leaves its output, and may then be run by nnU-Net's method
        return TileBytes.bounded(network, setup.tile_shape, (3 if mirrored else 1) * setup.heads)

    def denormal_bytes(self) -> int:
        """Of the fold that has most: the tensors that hold denormal weights, of which a way has others."""
        memo, parameters = self._setup.memo, self._setup.weights.parameters
        tensors = [[v for v in fold.values() if isinstance(v, torch.Tensor)] for fold in parameters or ()]
        state = [list(map(id, fold)) for fold in tensors]
        if memo.denormal is None or memo.denormal[0] != state:
            sizes = [sum(v.numel() * v.element_size() for v in fold if denormals.count(v)) for fold in tensors]
            memo.denormal = state, max(sizes, default=0)
        return memo.denormal[1]

    def is_unwatched(self) -> bool:
        """Whether nobody would see the network run a tile less often."""
        network = self._setup.steps.network()
        return not self._setup.steps.replaced(Step.NETWORK) and not why_watched(network)
