"""The simplest alternatives to kernels on windows: bins that are averaged, and places that are learned."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


class PooledBins(nn.Module):
    """In an extractor's place: each central crop averaged to a few bins, all channels projected by one matrix, and a Linear each.

    Bins are scaled so that tokens start with the variance that kernels give them.
    """

    def __init__(self, channels: int, size: int, *, grid_size: int, kernel_sizes: Sequence[int], bins: int, rank: int) -> None:
        super().__init__()
        self.grid_size, self.crops = grid_size, tuple((side, min(bins, side)) for side in kernel_sizes)
        self.channel_projection = nn.Linear(channels, rank, bias=False)
        nn.init.orthogonal_(self.channel_projection.weight)
        self.linears = nn.ModuleList(nn.Linear(bins**2 * rank, size, bias=False) for _, bins in self.crops)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to `(B, crops, size)`."""
        maps = self.channel_projection(patches).transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        tokens = []
        for (side, bins), linear in zip(self.crops, self.linears, strict=True):
            start = (self.grid_size - side) // 2
            crop = maps[..., start : start + side, start : start + side]
            tokens.append(linear(functional.adaptive_avg_pool2d(crop, bins).flatten(1) * (side / bins)))
        return torch.stack(tokens, dim=1)


class PlaceEmbedding(nn.Module):
    """Added to each patch's token: what is learned for its place, zero at first."""

    def __init__(self, places: int, size: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(places, size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` with their places in them."""
        return tokens + self.places
