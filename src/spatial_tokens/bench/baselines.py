"""The projectors that people use instead of LLaVA-SP's, written from their papers, to be timed on the same vision features.

Each takes the channels `C` of the vision features, the language model's width `D` and a patch grid (`(H, W)`, or an integer for a
square), has random weights and the sizes that its docstring names, and says how many tokens `T` it gives: `num_tokens`.
"""

from importlib import import_module
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.grid import KernelSize, as_size, check_fits, check_positive
from spatial_tokens.modules.heads import MLPHead
from spatial_tokens.modules.inputs import as_patch_map

__all__ = ["CAbstractor", "DecoProjector", "LlavaMLP", "PerceiverResampler", "QFormer"]

Device = torch.device | str | None
Dtype = torch.dtype | None


class _Baseline(nn.Module):
    """What all of them have: their widths, their grid and their number of tokens."""

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, grid_size: KernelSize, num_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.grid_size = as_size(grid_size, "grid_size")
        self.num_tokens = self.grid_size[0] * self.grid_size[1] if num_tokens is None else num_tokens
        check_positive(vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size, num_tokens=self.num_tokens)
        self.vision_hidden_size = vision_hidden_size
        self.text_hidden_size = text_hidden_size

    def _token_side(self) -> int:
        """The side of the square that the grid is pooled to."""
        side = isqrt(self.num_tokens)
        if side * side != self.num_tokens:
            raise SpatialTokensError(f"num_tokens must be a perfect square such as {side * side}, got {self.num_tokens}")
        check_fits(self.grid_size, (side, side), "token grid")
        return side

    def extra_repr(self) -> str:
        return f"{self.vision_hidden_size}, {self.text_hidden_size}, grid_size={self.grid_size}, num_tokens={self.num_tokens}"


class LlavaMLP(_Baseline):
    """LLaVA-1.5's projector (arXiv 2310.03744, section 3, "MLP vision-language connector"; `mlp2x_gelu` in its code).

    Linear, GELU, Linear on each patch by itself; the layer between has width `D`.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, N, D)`.

    Examples:
        >>> LlavaMLP(32, 64, grid_size=(8, 12))(torch.randn(2, 96, 32)).shape
        torch.Size([2, 96, 64])
    """

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, *, grid_size: KernelSize, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, grid_size)
        self.mlp = MLPHead(vision_hidden_size, text_hidden_size, device=device, dtype=dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to tokens `(B, N, D)`."""
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.mlp.fc1)
        return self.mlp(patch_map.flatten(1, 2))  # type: ignore[no-any-return]


class DecoProjector(_Baseline):
    """DeCo (arXiv 2405.20985, "2D Adaptive Pooling"): averages the patch grid to 12 x 12, then LLaVA-1.5's MLP.

    Args:
        num_tokens: Tokens `T`, a perfect square: the token grid is square whatever the patch grid is, and no larger.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, T, D)`.

    Examples:
        >>> DecoProjector(32, 64, grid_size=(16, 24))(torch.randn(2, 384, 32)).shape
        torch.Size([2, 144, 64])
    """

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, *, grid_size: KernelSize,
        num_tokens: int = 144, device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        super().__init__(vision_hidden_size, text_hidden_size, grid_size, num_tokens)
        self._side = self._token_side()
        self.mlp = MLPHead(vision_hidden_size, text_hidden_size, device=device, dtype=dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to tokens `(B, T, D)`."""
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.mlp.fc1)
        pooled = F.adaptive_avg_pool2d(patch_map.movedim(-1, 1), self._side)  # (B, C, side, side)
        return self.mlp(rearrange(pooled, "b c h w -> b (h w) c"))  # type: ignore[no-any-return]


class CAbstractor(_Baseline):
    """Honeybee's C-Abstractor (arXiv 2312.06742, section 3.3): convolutions, adaptive average pooling, convolutions, an MLP.

    A learned position is added to each patch. The blocks are RegNet's, as in Honeybee's code: 1 x 1, depthwise 3 x 3,
    squeeze-and-excitation, 1 x 1, with LayerNorm and SiLU. Its learned end tokens are left out: its released configuration for 144
    tokens has none. Needs timm.

    Args:
        num_tokens: Tokens `T`, a perfect square: the token grid is square whatever the patch grid is, and no larger.
        hidden_size: Channels of the blocks.
        num_blocks: Blocks before the pooling, and as many after it.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, T, D)`.
    """

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, *, grid_size: KernelSize,
        num_tokens: int = 144, hidden_size: int = 1024, num_blocks: int = 3, device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        super().__init__(vision_hidden_size, text_hidden_size, grid_size, num_tokens)
        check_positive(hidden_size=hidden_size, num_blocks=num_blocks)
        self._side = self._token_side()
        timm = _optional("timm", "timm")

        def blocks(in_channels: int) -> nn.Module:
            stage: nn.Module = timm.models.regnet.RegStage(
                num_blocks, in_channels, hidden_size, stride=1, dilation=1,
                act_layer=nn.SiLU, norm_layer=timm.layers.LayerNorm2d, device=device, dtype=dtype,
            )  # fmt: skip
            return stage

        self.positions = nn.Parameter(torch.empty(*self.grid_size, vision_hidden_size, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = blocks(vision_hidden_size)
        self.after = blocks(hidden_size)
        self.fc1 = nn.Linear(hidden_size, text_hidden_size, device=device, dtype=dtype)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(text_hidden_size, text_hidden_size, device=device, dtype=dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to tokens `(B, T, D)`."""
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.fc1) + self.positions
        features = self.before(patch_map.movedim(-1, 1))  # (B, hidden, H, W)
        features = self.after(F.adaptive_avg_pool2d(features, self._side))  # (B, hidden, side, side)
        return self.fc2(self.act(self.fc1(rearrange(features, "b c h w -> b (h w) c"))))  # type: ignore[no-any-return]


class PerceiverResampler(_Baseline):
    """Flamingo's Perceiver Resampler (arXiv 2204.14198, section 2.1 and appendix A.1.1), and a linear layer to `D`.

    Learned latents look at the patches and at themselves, layer after layer. The heads, GELU and layers without bias are those of
    OpenFlamingo; the paper has 16 heads and squared ReLU at width 1536, and no layer to `D`: its language model reads the latents
    by cross-attention.

    Args:
        num_tokens: Tokens `T`: the latents.
        num_layers: Layers, each of attention and a feed-forward.
        num_heads: Attention heads.
        head_size: Channels of a head.
        feedforward_multiple: Width of the feed-forward, in units of `C`.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, T, D)`.

    Examples:
        >>> PerceiverResampler(32, 64, grid_size=(8, 12))(torch.randn(2, 96, 32)).shape
        torch.Size([2, 64, 64])
    """

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, *, grid_size: KernelSize,
        num_tokens: int = 64, num_layers: int = 6, num_heads: int = 8, head_size: int = 64, feedforward_multiple: int = 4,
        device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        super().__init__(vision_hidden_size, text_hidden_size, grid_size, num_tokens)
        check_positive(num_layers=num_layers, num_heads=num_heads, head_size=head_size, feedforward_multiple=feedforward_multiple)
        self.latents = nn.Parameter(torch.randn(num_tokens, vision_hidden_size, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            _ResamplerLayer(vision_hidden_size, num_heads, head_size, feedforward_multiple * vision_hidden_size, device, dtype)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(vision_hidden_size, device=device, dtype=dtype)
        self.projection = nn.Linear(vision_hidden_size, text_hidden_size, device=device, dtype=dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to tokens `(B, T, D)`."""
        features = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.projection).flatten(1, 2)
        latents = self.latents.expand(patches.shape[0], -1, -1)  # (B, T, C)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.projection(self.norm(latents))  # type: ignore[no-any-return]


class _ResamplerLayer(nn.Module):
    """Attention of the latents to patches and latents together, then a feed-forward: each with norms before, and added."""

    def __init__(self, width: int, num_heads: int, head_size: int, feedforward_size: int, device: Device, dtype: Dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_size
        self.patch_norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.latent_norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.query = nn.Linear(width, inner, bias=False, device=device, dtype=dtype)
        self.key_value = nn.Linear(width, 2 * inner, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(inner, width, bias=False, device=device, dtype=dtype)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(width, device=device, dtype=dtype),
            nn.Linear(width, feedforward_size, bias=False, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(feedforward_size, width, bias=False, device=device, dtype=dtype),
        )

    def forward(self, latents: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Latents `(B, T, C)` and patches `(B, N, C)` to latents `(B, T, C)`."""
        latents = latents + self._attend(self.latent_norm(latents), self.patch_norm(patches))
        return latents + self.feedforward(latents)  # type: ignore[no-any-return]

    def _attend(self, latents: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        query = rearrange(self.query(latents), "b t (h d) -> b h t d", h=self.num_heads)
        both = self.key_value(torch.cat([patches, latents], dim=1))  # (B, N + T, 2 * inner)
        key, value = rearrange(both, "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.output(rearrange(found, "b h t d -> b t (h d)"))  # type: ignore[no-any-return]


class QFormer(_Baseline):
    """BLIP-2's Q-Former (arXiv 2301.12597, section 3.1) and its linear layer to `D`: transformers' `Blip2QFormerModel`.

    BERT-base, with dropout 0.1 in training, whose learned queries look at the patches in every second layer. It is the part that
    a language model needs; the paper's 188 M parameters count the text branch too. How attention is computed is up to
    transformers: 5.0 multiplies matrices, newer ones call `scaled_dot_product_attention`. Needs transformers.

    Args:
        num_tokens: Tokens `T`: the queries.
        hidden_size: Channels of the queries.
        num_layers: Layers; the first, third and so on have cross-attention.
        num_heads: Attention heads; must divide `hidden_size`.
        feedforward_size: Width of the feed-forward layers.
        vision_norm: Whether a LayerNorm reads the patches first, BLIP-2's `ln_vision`.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, T, D)`.
    """

    def __init__(
        self, vision_hidden_size: int, text_hidden_size: int, *, grid_size: KernelSize,
        num_tokens: int = 32, hidden_size: int = 768, num_layers: int = 12, num_heads: int = 12, feedforward_size: int = 3072,
        vision_norm: bool = True, device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        super().__init__(vision_hidden_size, text_hidden_size, grid_size, num_tokens)
        check_positive(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, feedforward_size=feedforward_size)
        if hidden_size % num_heads:
            raise SpatialTokensError(f"num_heads must divide hidden_size, got {num_heads} and {hidden_size}")
        transformers = _optional("transformers", "hf")
        config = transformers.Blip2QFormerConfig(
            hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads,
            intermediate_size=feedforward_size, encoder_hidden_size=vision_hidden_size, cross_attention_frequency=2,
        )  # fmt: skip
        with torch.device(torch.get_default_device() if device is None else device):  # it takes neither device nor dtype
            self.qformer: nn.Module = transformers.Blip2QFormerModel(config).to(dtype=dtype)
        self.queries = nn.Parameter(torch.empty(num_tokens, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.queries, std=config.initializer_range)
        self.vision_norm = nn.LayerNorm(vision_hidden_size, device=device, dtype=dtype) if vision_norm else nn.Identity()
        self.projection = nn.Linear(hidden_size, text_hidden_size, device=device, dtype=dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to tokens `(B, T, D)`."""
        features = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.projection).flatten(1, 2)
        queries = self.queries.expand(patches.shape[0], -1, -1)  # (B, T, hidden)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=self.vision_norm(features))
        return self.projection(found.last_hidden_state)  # type: ignore[no-any-return]


def _optional(library: str, extra: str) -> Any:
    """Imports a library that only one of these needs; as Any, since its types change from version to version."""
    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtraError(library, extra) from error
