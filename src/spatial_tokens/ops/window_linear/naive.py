"""The specification: each kernel is a Linear that meets every one of its windows (LLaVA-SP, equations 2 to 4)."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from spatial_tokens.grid import Size, Window
from spatial_tokens.ops.windows import unfold


def window_linear(
    patch_map: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size
) -> torch.Tensor:
    """A patch map `(B, H, W, C)` and weights `(S, h * w * C)` to tokens `(B, K * P, S)`."""
    return torch.cat(
        [
            functional.linear(unfold(patch_map, window, step, count), weight)
            for weight, window in zip(weights, windows, strict=True)
        ],
        dim=1,
    )
