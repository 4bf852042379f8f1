"""An SPProjector beside a model's own projector, both in the place of the one."""

from __future__ import annotations

import torch
from torch import nn

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size
from spatial_tokens.modules import SPProjector


class PrependSpatialTokens(nn.Module):
    """Spatial tokens, then the tokens of a model's own projector, which stay what they were, bit for bit.

    The own projector's state dict is under `projector.`, the spatial tokens' under `spatial_projector.`.

    Args:
        projector: The model's own: what it is given to `(B, M, D)`.
        spatial_projector: An SPProjector without patch head: patch features `(B, N, C)` to `(B, K, D)`.
        unmerge: What the own projector is given to patch features; left out where they are the same.
        grid_size: The patch grid, which a projector of any grid is given; its own when left out.

    Shape:
        - Input: what the own projector is given.
        - Output: `(B, K + M, D)`, the spatial tokens first.

    Raises:
        SpatialTokensError: At construction if the SPProjector is none, or has a patch head; in `forward` if the input does not fit.

    Examples:
        >>> config = SPProjectorConfig(
        ...     vision_hidden_size=32, text_hidden_size=64, grid_size=8, kernel_sizes=(4, 8),
        ...     spatial_hidden_size=16, detail_kernel_size=4, patch_head=None,
        ... )
        >>> PrependSpatialTokens(nn.Linear(32, 64), SPProjector.from_config(config))(torch.randn(2, 64, 32)).shape
        torch.Size([2, 66, 64])
    """

    def __init__(
        self,
        projector: nn.Module,
        spatial_projector: SPProjector,
        unmerge: nn.Module | None = None,
        grid_size: Size | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(projector, nn.Module) or not isinstance(spatial_projector, SPProjector):
            raise SpatialTokensError(
                f"a projector and an SPProjector are needed, got {type(projector).__name__} and {type(spatial_projector).__name__}"
            )
        if spatial_projector.patch_head is not None:
            raise SpatialTokensError(
                "the SPProjector has a patch head, but the model projects its patches itself; give patch_head=None"
            )
        self.projector = projector
        self.spatial_projector = spatial_projector
        self.unmerge = unmerge
        self.grid_size = grid_size if spatial_projector.any_grid else None

    @classmethod
    def from_config(
        cls,
        projector: nn.Module,
        config: SPProjectorConfig,
        unmerge: nn.Module | None = None,
        grid_size: Size | None = None,
    ) -> PrependSpatialTokens:
        """A fresh SPProjector beside a projector, on its device, in its dtype and mode.

        Raises:
            SpatialTokensError: If the projector has spatial tokens already, or the config a patch head.
        """
        if isinstance(projector, cls):
            raise SpatialTokensError("this model has spatial tokens already; add them to a model that has its own projector")
        like = next(projector.parameters(), torch.empty(0))
        spatial_projector = SPProjector.from_config(config, device=like.device, dtype=like.dtype)
        return cls(projector, spatial_projector, unmerge, grid_size).train(projector.training)

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` of each image that the projector is given: of each tile, where images come in tiles."""
        return self.spatial_projector.num_spatial_tokens

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """What the own projector is given to tokens `(B, K + M, D)`."""
        patches = features if self.unmerge is None else self.unmerge(features)
        grid_argument = () if self.grid_size is None else (self.grid_size,)
        return torch.cat([self.spatial_projector(patches, *grid_argument), self.projector(features)], dim=1)
