"""Where logits are no numbers, for whoever has to be told."""

from __future__ import annotations

import torch

from nnunet_lowmem.window.tiling import TileGrid


def where_not_finite(logits: torch.Tensor, grid: TileGrid, plane: int) -> str:
    """Say how many logits of a plane are infinite or NaN, and where the first lies.

    Parameters
    ----------
    logits : half tensor, shape (heads, ...)
        Of one plane across the roll axis, with at least one such value.
    grid : TileGrid
    plane : int
        Its position, padding included.
    """
    infinite = int(torch.isinf(logits).sum())
    nan = int(torch.isnan(logits).sum())
    where = torch.nonzero(~torch.isfinite(logits))[0, 1:].tolist()
    where.insert(grid.roll_axis, plane)
    covering = [
        [start for start in grid.starts[axis] if start <= where[axis] < start + grid.tile_shape[axis]]
        for axis in range(3)
    ]
    first, last, at = map(grid.in_whole, ([low for low, *_ in covering], [high for *_, high in covering], where))
    return (
        f"sliding window: the logits hold {infinite} infinite and {nan} NaN values in plane {at[grid.roll_axis]} of "
        f"axis {grid.roll_axis} (network space), the first at {at} in the tiles that start at {first} to {last}. "
        "Check the image for values far out of the ordinary: logits beyond half precision (65504) become infinite."
    )
