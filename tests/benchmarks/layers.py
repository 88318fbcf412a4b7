"""Where the time of a tile goes: per kind of layer and resolution, as stock runs the network and as we do.

    THP_MEM_ALLOC_ENABLE=1 python layers.py [--arithmetic stock exact fast bfloat16] [--patch 128] [--repeat 3]

*stock* is the network as it is, *exact* how we run it unless asked otherwise, *fast* and *bfloat16* are `--fast`
without and with that value. The network of `overhead.py` with random weights, one tile, no mirroring, all cores. Hooks
time every layer; medians of the passes after one to warm up. *Joining* is ``torch.cat`` of what comes from below with
what comes from the side, and *rest* is what is left of a pass: the tile with its channels put last, and all that is no
layer. `--fast` takes the last convolution off, to apply it while a tile is added to the sums, which is not in these
numbers, and makes one layer of a normalisation and its activation: "layers" counts those of the first column.

The commands have torch ask for huge pages, and this script does not, for it would have to before torch is imported:
hence the variable.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from make_model import build_network
from overhead import HEADS, PATCH, realistic_plans
from torch import nn

from nnunet_lowmem.network.exact import exact_network
from nnunet_lowmem.network.fast_network import fast_network
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.system.platform import usable_cores

ARITHMETICS = ("stock", "exact", "fast", "bfloat16")
CONVOLUTION, TRANSPOSED, NORM, JOINING, REST = KINDS = (
    "convolution",
    "transposed convolution",
    "normalisation and activation",
    "joining",
    "rest",
)
#: The first that a layer is, or holds, tells its kind; what is none of them is named by its class.
CLASSES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.ConvTranspose3d, TRANSPOSED),
    (nn.Conv3d, CONVOLUTION),
    (nn.InstanceNorm3d, NORM),
    (nn.LeakyReLU, NORM),
)


class Row(NamedTuple):
    """Layers that do the same work."""

    kind: str
    what: str


class Spent(dict[Row, list[float]]):
    """Seconds of the layers of one pass, by row, in the order in which they were run."""

    def add(self, row: Row, seconds: float) -> None:
        self.setdefault(row, []).append(seconds)


class Timing(NamedTuple):
    """Medians over passes, in seconds, and how many layers each row has."""

    rows: dict[Row, float]
    layers: dict[Row, int]
    kinds: dict[str, float]
    whole: float


class TilePass(NamedTuple):
    """How a tile is predicted: the module whose layers are run, the call, and what to enter meanwhile."""

    body: nn.Module
    predict: Callable[[torch.Tensor], torch.Tensor]
    inside: AbstractContextManager[object]


def tile_pass(network: nn.Module, arithmetic: str, tile_shape: tuple[int, ...], threads: int) -> TilePass:
    if arithmetic == "stock":
        return TilePass(network, network, nullcontext())
    if arithmetic == "exact":
        exact = exact_network(network, threads)
        assert exact is not None, "nobody watches this network"
        return TilePass(exact.body, lambda tile: exact.logits(tile, ()), exact.threads)
    numbers = Arithmetic.BFLOAT16 if arithmetic == "bfloat16" else Arithmetic.FLOAT32
    fast = fast_network(network, tile_shape, threads, numbers)
    assert fast is not None, "this network can be rearranged"
    return TilePass(fast.body, lambda tile: fast.features(tile, ()), fast.threads)


def layers_of(body: nn.Module) -> list[nn.Module]:
    """Modules that compute: those without children, and ours around them, which may or may not call these."""
    wrappers = [module for module in body.modules() if wraps_layers(module)]
    wrapped = {id(child) for wrapper in wrappers for child in wrapper.children()}
    plain = [module for module in body.modules() if next(module.children(), None) is None and id(module) not in wrapped]
    return wrappers + [module for module in plain if not isinstance(module, nn.Identity)]


def wraps_layers(module: nn.Module) -> bool:
    children = list(module.children())
    ours = type(module).__module__.startswith("nnunet_lowmem.")
    return ours and bool(children) and not any(next(child.children(), None) for child in children)


def row_of(layer: nn.Module, tile: torch.Tensor, output: torch.Tensor) -> Row:
    held = list(layer.modules())
    kind = next((kind for cls, kind in CLASSES if any(isinstance(module, cls) for module in held)), REST)
    channels, at = f"{tile.shape[1]}→{output.shape[1]}", f"at {size_of(output)}"
    if kind == NORM:
        return Row(kind, f"{output.shape[1]} channels {at}")
    if kind == REST:
        return Row(kind, f"{type(layer).__name__} {channels} {at}")
    convolution: Any = next(module for module in held if hasattr(module, "kernel_size"))
    words = [channels, "of one voxel" if set(convolution.kernel_size) == {1} else ""]
    words += [f"from {size_of(tile)}" if tile.shape[2:] != output.shape[2:] else "", at]
    return Row(kind, " ".join(filter(None, words)))


def size_of(tensor: torch.Tensor) -> str:
    sizes = tensor.shape[2:]
    return f"{sizes[0]}³" if len(set(sizes)) == 1 else "×".join(map(str, sizes))


def watch(layer: nn.Module, spent: Spent) -> None:
    """Have a layer add its seconds to `spent`, pass by pass."""
    begun: list[float] = []

    def end(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seconds = time.perf_counter() - begun.pop()
        spent.add(row_of(layer, inputs[0], output), seconds)

    layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    layer.register_forward_hook(end)


@contextmanager
def watched_joining(spent: Spent) -> Iterator[None]:
    """Time ``torch.cat``, which is no layer."""
    join = torch.cat

    def timed(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> torch.Tensor:
        start_s = time.perf_counter()
        joined: torch.Tensor = join(tensors, *args, **kwargs)
        parts = "+".join(str(tensor.shape[1]) for tensor in tensors)
        spent.add(Row(JOINING, f"{parts} channels at {size_of(joined)}"), time.perf_counter() - start_s)
        return joined

    with mock.patch.object(torch, "cat", timed):
        yield


def measure(network: nn.Module, arithmetic: str, tile: torch.Tensor, threads: int, repeat: int) -> Timing:
    """Time passes of a copy: `fast_network` changes how the weights lie in memory."""
    how = tile_pass(copy.deepcopy(network).eval(), arithmetic, tuple(tile.shape), threads)
    spent, passes, whole_s = Spent(), [], []
    for layer in layers_of(how.body):
        watch(layer, spent)
    with torch.inference_mode(), how.inside, watched_joining(spent):
        for _ in range(1 + repeat):
            spent.clear()
            start_s = time.perf_counter()
            how.predict(tile)
            whole_s.append(time.perf_counter() - start_s)
            left_s = whole_s[-1] - sum(map(sum, spent.values()))
            spent.add(Row(REST, "what is no layer"), left_s)
            passes.append(dict(spent))
    return summary(passes[1:], whole_s[1:])


def summary(passes: Sequence[Mapping[Row, list[float]]], whole_s: Sequence[float]) -> Timing:
    rows = {row: statistics.median(sum(spent[row]) for spent in passes) for row in passes[0]}
    kinds = {
        kind: statistics.median(sum(sum(spent[row]) for row in spent if row.kind == kind) for spent in passes)
        for kind in KINDS
    }
    layers = {row: len(seconds) for row, seconds in passes[0].items()}
    return Timing(rows, layers, kinds, statistics.median(whole_s))


def table(timings: Mapping[str, Timing]) -> Iterator[str]:
    """Lines of Markdown: rows by kind, each kind with its sum above them."""
    yield f"| ms | layers | {' | '.join(timings)} |"
    yield "|---" * (2 + len(timings)) + "|"
    yield line("**one tile**", "", [timing.whole for timing in timings.values()])
    for kind in KINDS:
        yield line(f"**{kind}**", "", [timing.kinds[kind] for timing in timings.values()])
        rows = dict.fromkeys(row for timing in timings.values() for row in timing.rows if row.kind == kind)
        for row in rows:
            layers = next(timing.layers[row] for timing in timings.values() if row in timing.layers)
            yield line(f"{row.kind}, {row.what}", str(layers), [timing.rows.get(row) for timing in timings.values()])


def line(name: str, layers: str, seconds: Sequence[float | None]) -> str:
    cells = ["-" if value is None else f"{1000 * value:.1f}" for value in seconds]
    return f"| {' | '.join([name, layers, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETICS, default=["stock", "fast"])
    parser.add_argument("--patch", type=int, default=PATCH, help="a multiple of 32, at least 64 (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="passes after the one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="(default: all cores, %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = build_network(realistic_plans(), HEADS)
    tile = torch.randn((1, 1, *[options.patch] * 3))
    timings = {
        arithmetic: measure(network, arithmetic, tile, options.threads, options.repeat)
        for arithmetic in options.arithmetic
    }
    pages = "with" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "without"
    print(
        f"Patch {options.patch}³, {options.threads} threads, {pages} huge pages, medians of {options.repeat} passes.\n"
    )
    print("\n".join(table(timings)))


if __name__ == "__main__":
    main()
