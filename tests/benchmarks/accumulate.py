"""Time of adding a tile to the sums and of finishing half a patch: stock's expressions beside `RollingWindow`'s.

    python accumulate.py --heads 118 --patch 96 --half --threads 8

Both add the same tiles in turn, several times; the medians are compared, and the sums must be equal bit for bit.
Tiles of halves, as a GPU makes them, are added by torch on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_lowmem.system.platform import usable_cores
from nnunet_lowmem.system.threads import RowThreads
from nnunet_lowmem.window.rolling import RollingWindow
from nnunet_lowmem.window.tiling import tile_grid


def timed(operation: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    operation()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=118)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--half", action="store_true", help="tiles of halves")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    heads, size, threads_count = options.heads, options.patch, options.threads
    torch.set_num_threads(threads_count)
    gaussian = compute_gaussian((size,) * 3, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    # stock's sums are a part of a larger array, as ours are
    shape = (size + size // 2,) * 3
    sums = torch.zeros((heads, *shape), dtype=torch.half)
    weights = torch.zeros(shape, dtype=torch.half)
    tile = torch.randn((heads, size, size, size), generator=torch.Generator().manual_seed(0))
    tile = tile.half() if options.half else tile
    stock_s, ours_s, stock_finish_s, ours_finish_s = [], [], [], []
    final = (slice(None), slice(0, size // 2))

    def stock(prediction: torch.Tensor) -> None:
        prediction.mul_(gaussian)
        sums[:, :size, :size, :size] += prediction
        weights[:size, :size, :size] += gaussian

    def stock_finish() -> None:
        sums[final] /= weights[final[1:]]
        assert not torch.any(torch.isinf(sums[final]))

    with RowThreads(threads_count) as threads:
        window = RollingWindow(tile_grid(shape, (size,) * 3, 0.5), heads, gaussian, threads)
        for _ in range(options.repeat):
            stock_s.append(timed(partial(stock, tile.clone())))
            ours_s.append(timed(partial(window.add, tile.clone(), (0, 0, 0))))
        assert torch.equal(window._buffer[:, 1:, :size, :size], sums[:, :size, :size, :size]), "the sums differ"
        for both in (weights, window._weight_sum):  # the same planes are divided again and again
            both.fill_(1.25)
        for _ in range(options.repeat):
            stock_finish_s.append(timed(stock_finish))
            ours_finish_s.append(timed(partial(window.finish, size // 2)))
        assert torch.equal(window._buffer[:, 1 : 1 + size // 2], sums[final]), "the quotients differ"
    print(f"{heads} heads, patch {size}, {threads_count} threads, median of {options.repeat}, results are equal")
    tell("adding a tile", stock_s, ours_s)
    tell(f"finishing {size // 2} planes", stock_finish_s, ours_finish_s)


def tell(what: str, stock_s: list[float], ours_s: list[float]) -> None:
    """Print the medians of both and their ratio."""
    stock, ours = statistics.median(stock_s), statistics.median(ours_s)
    print(f"{what}: stock {stock:.3f} s, ours {ours:.3f} s, {stock / ours:.1f} times as fast")


if __name__ == "__main__":
    main()
