"""From maps of patches to spatial tokens, in whatever runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.layouts import fitted, packed
from spatial_tokens.adapters.huggingface.model_parts import device_of
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size
from spatial_tokens.modules import SPProjector

Resize = Literal["pool", "interpolate"]


@dataclass(frozen=True)
class MapsToTokens:
    """What a projector takes, read off it before another library wraps it.

    Args:
        grid_size: The grid that maps are brought to; None if it takes them as they are.
        vision_hidden_size: The channels that it takes; None if it does not say.
        any_grid: Whether it reads patches of any grid.
        resize: How maps of another grid are brought to its own; None: they are refused, or read as they are by a projector of any
            grid.
    """

    grid_size: Size | None
    vision_hidden_size: int | None
    any_grid: bool
    resize: Resize | None

    @classmethod
    def of(cls, projector: SPProjector, resize: Resize | None) -> MapsToTokens:
        """What this projector takes."""
        own_grid = resize is not None or not projector.any_grid
        return cls(
            getattr(projector.extractor, "grid_size", None) if own_grid else None,
            getattr(projector.extractor, "vision_hidden_size", None),
            projector.any_grid,
            resize,
        )

    def __call__(self, projector: nn.Module, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps `(H, W, C)` each to spatial tokens `(maps, K, D)`, in the projector's dtype and on its device.

        Args:
            projector: The projector, which may be wrapped.
            maps: At least one.

        Raises:
            SpatialTokensError: If a map is of another grid and may not be resized, or has other channels.
        """
        if self.vision_hidden_size not in (None, maps[0].shape[-1]):
            raise SpatialTokensError(
                f"the patch features have {maps[0].shape[-1]} channels, the projector's config says "
                f"{self.vision_hidden_size}; attach with vision_hidden_size of the former"
            )
        weight = next(projector.parameters())
        patches, grids = packed([fitted(each, self.grid_size, self.resize) for each in maps])
        grid_argument = () if self.grid_size is not None or not self.any_grid else (grids,)
        return projector(patches.to(device=device_of(projector, weight), dtype=weight.dtype), *grid_argument)  # type: ignore[no-any-return]
