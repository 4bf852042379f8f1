"""Spatial tokens in InternVL's own code: an SPProjector beside `mlp1`, on the patches as they were before the pixel shuffle."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn

from spatial_tokens.adapters.fit_config import fitted, require
from spatial_tokens.adapters.prepend import PrependSpatialTokens
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size
from spatial_tokens.ops.dense import check_dense


def add_spatial_tokens(model: Any, preset: str, **fields: Any) -> PrependSpatialTokens:
    """Gives an InternVLChatModel K spatial tokens a tile, before the tile's own tokens.

    `model.mlp1` becomes a `PrependSpatialTokens`, `model.num_image_token` grows by K, and `model.config.spatial_tokens` remembers
    what was added, so that a patched model is rebuilt from its `config.json`.

    Args:
        model: An InternVLChatModel whose `mlp1` is still its own.
        preset: A preset's name; the widths and the grid are those of the model.
        **fields: Fields of an SPProjectorConfig in place of the preset's.

    Returns:
        What is now the model's `mlp1`.

    Raises:
        SpatialTokensError: If it is not such a model, it has spatial tokens already, or the preset or a field does not fit it.
    """
    require(
        model,
        "an InternVLChatModel",
        "mlp1",
        "num_image_token",
        "downsample_ratio",
        "ps_version",
        "config.force_image_size",
        "config.vision_config.image_size",
        "config.vision_config.patch_size",
        "config.vision_config.hidden_size",
        "config.llm_config.hidden_size",
    )
    vision = model.config.vision_config
    side = (model.config.force_image_size or vision.image_size) // vision.patch_size
    config = fitted(
        preset,
        fields,
        vision_hidden_size=vision.hidden_size,
        text_hidden_size=model.config.llm_config.hidden_size,
        grid_size=(side, side),
        patch_head=None,
    )
    factor = int(1 / model.downsample_ratio)
    unmerge = UndoPixelShuffle((side, side), config.vision_hidden_size, factor, transposed=model.ps_version == "v1")
    model.mlp1 = projector = PrependSpatialTokens.from_config(model.mlp1, config, unmerge, (side, side))
    model.num_image_token += projector.num_spatial_tokens
    model.config.spatial_tokens = {"preset": preset, **fields}
    return projector


class UndoPixelShuffle(nn.Module):
    """Takes InternVL's pixel shuffle back: each merged token to the `f x f` patches that it was made of.

    Args:
        grid_size: The patch grid `(H, W)` before it was merged.
        vision_hidden_size: Channels `C` of a patch.
        factor: Patches `f` merged along a side: 2 for a `downsample_ratio` of 0.5.
        transposed: Whether merged tokens lie column after column, as `ps_version` "v1" leaves them.

    Shape:
        - Input: `(B, N / f^2, f^2 * C)`.
        - Output: `(B, N, C)`, the grid's rows one after another.

    Raises:
        SpatialTokensError: At construction if the grid does not merge by `f`; in `forward` if the input is of another shape.

    Examples:
        >>> UndoPixelShuffle((32, 32), 64, 2, transposed=False)(torch.randn(1, 256, 256)).shape
        torch.Size([1, 1024, 64])
    """

    def __init__(self, grid_size: Size, vision_hidden_size: int, factor: int, *, transposed: bool) -> None:
        super().__init__()
        height, width = grid_size
        if height % factor or width % factor:
            raise SpatialTokensError(
                f"a grid of {height} x {width} patches cannot be merged {factor} x {factor}; resize the picture"
            )
        self.factor = factor
        self.transposed = transposed
        self.merged_size: Size = height // factor, width // factor
        self.merged_shape: Size = height * width // factor**2, factor**2 * vision_hidden_size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Merged features `(B, N / f^2, f^2 * C)` to patch features `(B, N, C)`."""
        check_dense(features, "merged features", "(B, N / f^2, f^2 * C)")
        if tuple(features.shape[1:]) != self.merged_shape:
            raise SpatialTokensError(
                f"merged features must have shape (B, {', '.join(map(str, self.merged_shape))}), got {tuple(features.shape)}; "
                "the picture's size or the pixel shuffle is not the config's"
            )
        (rows, columns), order = self.merged_size, "x y" if self.transposed else "y x"
        return rearrange(features, f"b ({order}) (dy dx c) -> b (y dy x dx) c", y=rows, x=columns, dy=self.factor, dx=self.factor)

    def extra_repr(self) -> str:
        return f"{self.merged_shape}, factor={self.factor}, transposed={self.transposed}"
