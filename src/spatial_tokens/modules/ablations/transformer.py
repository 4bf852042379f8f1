"""The transformer-block extractor (LLaVA-SP, table 3, type "T"; appendix A)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import KernelSize, Variant, as_size, check_kernel_sizes, check_positive
from spatial_tokens.modules.initialization import checked_factory
from spatial_tokens.modules.inputs import as_patch_map
from spatial_tokens.ops.windows import crop, pool


class TransformerExtractor(nn.Module):
    """One spatial token from each scale of the patch grid, by an encoder-decoder transformer with one learned query.

    The scales are those of `SpatialFeatureExtractor`; each scale's patches, row by row, pass a transformer of their own (pre-norm,
    without biases). The spatial tokens keep the vision encoder's width: `S = C`. In the paper's projector the spatial head that
    follows is `LinearHead(C, D, bias=False)`.

    Args:
        vision_hidden_size: Channels `C` of the patch features and of the spatial tokens.
        grid_size: The patch grid: `(H, W)`, or an integer for a square.
        kernel_sizes: One scale each, as in `SpatialFeatureExtractor`.
        variant: "cropping" or "pooling".
        num_layers: Layers of the encoder, and as many of the decoder.
        num_heads: Attention heads; must divide `C`.
        feedforward_size: Width of the feed-forward layers.
        dropout: In training, on attention and feed-forward.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, K, C)`, one token a scale.

    Raises:
        SpatialTokensError: At construction if a size does not fit; in `forward` if the input does not fit.

    Examples:
        >>> extractor = TransformerExtractor(32, grid_size=8, kernel_sizes=(4, 8), num_heads=4)
        >>> extractor(torch.randn(2, 64, 32)).shape
        torch.Size([2, 2, 32])
    """

    def __init__(
        self,
        vision_hidden_size: int,
        *,
        grid_size: KernelSize,
        kernel_sizes: Sequence[KernelSize],
        variant: Variant = "cropping",
        num_layers: int = 4,
        num_heads: int = 8,
        feedforward_size: int = 1024,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            vision_hidden_size=vision_hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            feedforward_size=feedforward_size,
        )
        if vision_hidden_size % num_heads:
            raise SpatialTokensError(f"num_heads must divide vision_hidden_size, got {num_heads} and {vision_hidden_size}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise SpatialTokensError(f"dropout must be between 0 and 1, got {dropout!r}")
        self.vision_hidden_size = self.spatial_hidden_size = vision_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.kernel_sizes = check_kernel_sizes(self.grid_size, kernel_sizes, variant)
        self.variant = variant
        self.num_layers, self.num_heads = num_layers, num_heads
        self.feedforward_size, self.dropout = feedforward_size, dropout
        self._window = crop if variant == "cropping" else pool
        self._windows = [as_size(size, "kernel size") for size in self.kernel_sizes]
        factory = checked_factory(device, dtype)

        def transformer() -> nn.Transformer:
            layer = nn.TransformerEncoderLayer(
                vision_hidden_size, num_heads, feedforward_size, dropout, batch_first=True, norm_first=True, bias=False,
                **factory,
            )  # fmt: skip
            norm = nn.LayerNorm(vision_hidden_size, bias=False, **factory)
            encoder = nn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)
            return nn.Transformer(
                vision_hidden_size, num_heads, num_layers, num_layers, feedforward_size, dropout, custom_encoder=encoder,
                batch_first=True, norm_first=True, bias=False, **factory,
            )  # fmt: skip

        self.queries = nn.ParameterList(torch.zeros(1, 1, vision_hidden_size, **factory) for _ in self.kernel_sizes)
        self.transformers = nn.ModuleList(transformer() for _ in self.kernel_sizes)

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` an image."""
        return len(self.kernel_sizes)

    def reset_parameters(self) -> None:
        """Zeros the queries, resets the norms, and initializes every matrix by Xavier's rule, as `nn.Transformer` does."""
        for query in self.queries:
            nn.init.zeros_(query)
        for module in self.transformers.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for parameter in self.transformers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, patches: torch.Tensor, grid_sizes: None = None) -> torch.Tensor:
        """Patch features `(B, N, C)` to spatial tokens `(B, K, C)`; no other grid is read, so `grid_sizes` must be None."""
        first = cast(Any, self.transformers[0]).encoder.layers[0].linear1
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, first, grid_sizes)
        scales = [self._window(patch_map, size).flatten(1, 2) for size in self._windows]  # (B, h * w, C) each
        tokens = [
            transformer(scale, query.expand(patches.shape[0], -1, -1))  # (B, 1, C)
            for transformer, scale, query in zip(self.transformers, scales, self.queries, strict=True)
        ]
        return torch.cat(tokens, dim=1)

    def extra_repr(self) -> str:
        return f"{self.vision_hidden_size}, grid_size={self.grid_size}, kernel_sizes={self.kernel_sizes}, variant={self.variant!r}"
