"""The specification: adaptive average pooling to each size (LLaVA-SP, section 3.2, "pooling")."""

from collections.abc import Sequence

import torch

from spatial_tokens.grid import Size
from spatial_tokens.ops.windows import pool


def pyramid(patch_map: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """A patch map `(B, H, W, C)` to its poolings one after another, `(B, 1, R, C)`, `R` the sum of the sizes' areas."""
    return torch.cat([pool(patch_map, size).flatten(1, 2) for size in sizes], dim=1).unsqueeze(1)
