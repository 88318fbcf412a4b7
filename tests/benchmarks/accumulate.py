"""Time of adding one tile to the sums: stock's two expressions beside `RollingWindow.add`, same numbers, same threads.

    python accumulate.py --heads 118 --patch 96

Both add the same tiles in turn, several times; the medians are compared, and the sums must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_lowmem.system.threads import RowThreads, usable_cores
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
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    heads, size = options.heads, options.patch
    torch.set_num_threads(usable_cores())
    gaussian = compute_gaussian((size,) * 3, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    # stock's sums are a part of a larger array, as ours are
    shape = (size + size // 2,) * 3
    sums = torch.zeros((heads, *shape), dtype=torch.half)
    weights = torch.zeros(shape, dtype=torch.half)
    tile = torch.randn((heads, size, size, size), generator=torch.Generator().manual_seed(0))
    stock_s, ours_s = [], []

    def stock(prediction: torch.Tensor) -> None:
        prediction.mul_(gaussian)
        sums[:, :size, :size, :size] += prediction
        weights[:size, :size, :size] += gaussian

    with RowThreads(usable_cores()) as threads:
        window = RollingWindow(tile_grid(shape, (size,) * 3, 0.5), heads, gaussian, threads)
        for _ in range(options.repeat):
            stock_s.append(timed(partial(stock, tile.clone())))
            ours_s.append(timed(partial(window.add, tile.clone(), (0, 0, 0))))
    assert torch.equal(window._buffer[:, 1:, :size, :size], sums[:, :size, :size, :size]), "the sums differ"
    stock_median, ours_median = statistics.median(stock_s), statistics.median(ours_s)
    print(f"{heads} heads, patch {size}, {usable_cores()} cores, median of {options.repeat}, the sums are equal")
    for name, times_s in (("stock", stock_s), ("ours", ours_s)):
        print(f"{name}: {statistics.median(times_s):.3f} s ({min(times_s):.3f}-{max(times_s):.3f})")
    print(f"{stock_median / ours_median:.1f} times as fast")


if __name__ == "__main__":
    main()
