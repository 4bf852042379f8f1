"""The vision tower of `ready.trained_llava`: a small ViT whose features give wrong places.

Each picture is rolled, as on a torus, before the encoder, and its features are rolled back. So a patch's features say what is
there, and how patches lie to each other, but give its place with an offset that differs from picture to picture. The offset is
computed from the pixels, so that a picture always has the same features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class RolledViTConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The sizes of a ViT, under transformers' names."""

    model_type = "rolled_vit"

    def __init__(
        self,
        image_size: int = 96,
        patch_size: int = 8,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)


class Block(nn.Module):
    """A pre-norm transformer layer; its parameters have timm's names."""

    def __init__(self, config: RolledViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "act": nn.GELU(), "fc2": nn.Linear(config.intermediate_size, width)}
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, 1 + N, C)` to the same."""
        query, key, value = self.attn["qkv"](self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.attn["proj"](seen)
        hidden: torch.Tensor = self.norm2(tokens)
        for layer in self.mlp.values():
            hidden = layer(hidden)
        return tokens + hidden


class RolledViT(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A ViT with a class token, and learned embeddings of places, that sees each picture rolled."""

    config_class = RolledViTConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: RolledViTConfig) -> None:
        super().__init__(config)
        side, width = config.image_size // config.patch_size, config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_size, config.patch_size)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Pixels `(B, 3, H, W)`, from -1 to 1, to the hidden states before and after each layer, `(B, 1 + N, C)` each."""
        patch = self.config.patch_size
        shifts = self.shifts_of(pixel_values)
        rolled = _roll(pixel_values, patch * shifts)
        patches = self.patch_embed["proj"](rolled.to(self.cls_token.dtype))
        tokens = (
            torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1) + self.pos_embed
        )
        states = [tokens]
        for block in self.blocks:
            states.append(block(states[-1]))
        back = tuple(self._roll_back(each, shifts) for each in states)
        return BaseModelOutputWithPooling(last_hidden_state=back[-1], hidden_states=back)

    def shifts_of(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """By how many patches each picture is rolled down and to the right, `(B, 2)`: any shift is as likely as any other."""
        side = self.config.image_size // self.config.patch_size
        total = (127.5 * (pixel_values.float() + 1)).round().long().sum((1, 2, 3)) % side**2
        return torch.stack([total // side, total % side], dim=1)

    def _roll_back(self, tokens: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size // self.config.patch_size
        maps = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side)
        return torch.cat([tokens[:, :1], _roll(maps, -shifts).flatten(2).transpose(1, 2)], dim=1)


def _roll(maps: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Maps `(B, C, H, W)`, each rolled down and to the right by a shift of its own, `(B, 2)`."""
    if len(maps) == 0:
        return maps
    return torch.stack([each.roll(tuple(shift), (1, 2)) for each, shift in zip(maps, shifts.tolist(), strict=True)])


AutoConfig.register(RolledViTConfig.model_type, RolledViTConfig)
AutoModel.register(RolledViTConfig, RolledViT)
