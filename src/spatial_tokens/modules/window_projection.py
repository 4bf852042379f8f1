"""Kernels held as Linears, applied to their windows."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from spatial_tokens.grid import Size, Window
from spatial_tokens.modules.inputs import is_plain
from spatial_tokens.ops.window_linear import window_linear
from spatial_tokens.ops.windows import ONCE, unfold


def apply_kernels(
    kernels: Iterable[nn.Module], patch_map: torch.Tensor, windows: Sequence[Window], step: Size = ONCE, count: Size = ONCE
) -> torch.Tensor:
    """`(B, H, W, C)` to tokens `(B, K * P, S)`: `ops.window_linear`, or each kernel called where one is wrapped."""
    layers = list(kernels)
    if all(is_plain(layer) for layer in layers):
        weights = [cast(nn.Linear, layer).weight for layer in layers]
        return window_linear(patch_map, weights, windows, step=step, count=count)
    tokens = [layer(unfold(patch_map, window, step, count)) for layer, window in zip(layers, windows, strict=True)]
    return torch.cat(tokens, dim=1)
