"""With what weights a factorized kernel reads the patches of a grid: a few maps on its window, for a grid of any size.

A window is given in patches of one grid, the kernel's own, and is meant as a share of the picture. On another grid a patch has the
weight of the area that it covers, so that a map whose patches are repeated is read as the map itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi, sin, sqrt
from typing import Any

import torch

from spatial_tokens.grid import Size, Window
from spatial_tokens.ops.windows import ONCE


@dataclass(frozen=True)
class WindowBasis:
    """The maps that one kernel has on its window.

    Args:
        window: In patches of the kernel's own grid.
        frequencies: `F`: there are `F * F` maps, products of the `F` lowest cosines of each side unless others are learned.
        bins: Rows and columns of bins that the window is averaged to first (section 3.2, "pooling"); None for none.
        step: Rows and columns from a window to the next.
        count: Rows and columns of windows, `P` in all, that the kernel meets.
    """

    window: Window
    frequencies: int
    bins: Size | None = None
    step: Size = ONCE
    count: Size = ONCE

    @property
    def num_windows(self) -> int:
        """`P`."""
        return self.count[0] * self.count[1]

    @property
    def num_maps(self) -> int:
        """`F * F`."""
        return self.frequencies**2

    @property
    def map_size(self) -> Size:
        """What a map has a value for: the patches of the window, or its bins."""
        return self.bins or (self.window.height, self.window.width)


def weights(basis: WindowBasis, own: Size, grid: Size, maps: torch.Tensor | None = None, device: Any = None) -> torch.Tensor:
    """The weights `(P * F * F, N)` of a grid's patches in float64, or in the dtype of learned maps.

    Args:
        basis: The windows and frequencies.
        own: The grid that the windows are given in.
        grid: The grid whose patches are read.
        maps: Learned maps `(F * F, h, w)`; None for cosines.
        device: Of the result, where there are no maps.
    """
    tops = [basis.window.top + i * basis.step[0] for i in range(basis.count[0])]
    lefts = [basis.window.left + i * basis.step[1] for i in range(basis.count[1])]
    if maps is None and basis.bins is None:
        rows = _cosine_integrals(grid[0], own[0], tops, basis.window.height, basis.frequencies, device)
        columns = _cosine_integrals(grid[1], own[1], lefts, basis.window.width, basis.frequencies, device)
        found = torch.einsum("pfh,qgw->pqfghw", rows, columns)
    else:
        maps = cosine_maps(basis.map_size, basis.frequencies, device) if maps is None else maps
        bins = basis.bins or basis.map_size
        rows = _averages(grid[0], own[0], tops, basis.window.height, bins[0], maps)
        columns = _averages(grid[1], own[1], lefts, basis.window.width, bins[1], maps)
        found = torch.einsum("mij,pih,qjw->pqmhw", maps, rows, columns)
    return found.reshape(-1, grid[0] * grid[1])


def cosine_weights(bases: tuple[WindowBasis, ...], own: Size, grid: Size, like: torch.Tensor) -> torch.Tensor:
    """The weights of cosines on all windows, one after another: `(sum of P * F * F, N)`, in a tensor's dtype and on its device."""
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
        return _all_cosine_weights(bases, own, grid, like.device, like.dtype)
    return _cached(bases, own, grid, like.device, like.dtype)


def _all_cosine_weights(
    bases: tuple[WindowBasis, ...], own: Size, grid: Size, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    return torch.cat([weights(basis, own, grid, device=device) for basis in bases]).to(dtype)


@lru_cache(maxsize=64)
def _cached(bases: tuple[WindowBasis, ...], own: Size, grid: Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be used in training
        return _all_cosine_weights(bases, own, grid, device, dtype)


def cosine_maps(size: Size, frequencies: int, device: Any = None) -> torch.Tensor:
    """Products of the lowest cosines of a window's two sides, orthonormal: `(F * F, h, w)`, in float64 (the DCT-II's)."""
    rows, columns = (_cosine_integrals(side, side, [0], side, frequencies, device)[0] for side in size)
    return torch.einsum("fh,gw->fghw", rows, columns).flatten(0, 1)


def _cosine_integrals(length: int, own: int, starts: list[int], size: int, frequencies: int, device: Any) -> torch.Tensor:
    """`(windows, F, length)`: each cosine's integral over the part of each patch that is in the window.

    They are scaled so that on the kernel's own grid they are the orthonormal DCT-II of the window's `size` patches: the integral of
    `cos(pi f t)` over patch `p` is `cos(pi f (p + 1/2) / size)` times what does not depend on `p`.
    """
    edges = _edges(length, own, device)
    shares = torch.stack([((edges - start) / size).clamp(0, 1) for start in starts])  # of the window, before each edge
    sums = [shares * sqrt(size)]
    for f in range(1, frequencies):
        sums.append(torch.sin(pi * f * shares) / (sqrt(2 * size) * sin(pi * f / (2 * size))))
    return torch.stack(sums, dim=1).diff(dim=-1)


def _averages(length: int, own: int, starts: list[int], size: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """`(windows, bins, length)`: what each patch has of the mean of each bin.

    Bins are those of `grid.pool_bins`, also where there is one for each patch.
    """
    edges = _edges(length, own, like.device)
    lows = torch.tensor([[start + i * size // bins for i in range(bins)] for start in starts], device=like.device)
    highs = torch.tensor([[start - (-(i + 1) * size // bins) for i in range(bins)] for start in starts], device=like.device)
    shares = (edges - lows[..., None]) / (highs - lows)[..., None]
    return shares.clamp(0, 1).diff(dim=-1).to(like.dtype)


def _edges(length: int, own: int, device: Any) -> torch.Tensor:
    """Where patches begin and end, in patches of the kernel's own grid."""
    dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    return torch.arange(length + 1, dtype=dtype, device=device) * own / length
