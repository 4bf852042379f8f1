"""The same without forming keys and values: the `K` queries are projected where the `P` positions would be.

With `n` a position normalized, `g`, `b` its LayerNorm's scale and shift and `W`, `c` the Linear, a key is `W (g * n + b) + c`. So
`q . key = (W^T q * g) . n + q . (W b + c)`; and as attention sums to one, `attention @ values = W (g * (attention @ n) + b) + c`.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from spatial_tokens.ops.integrate.naive import project


def integrate(
    spatial_tokens: torch.Tensor,
    detail: torch.Tensor,
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    eps: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spatial tokens `(B, K, S)` and detail `(B, P, S)` to `(B, K, 2S)` and the attention `(B, K, P)`."""
    key_scale, key_shift, key_weight, key_bias = key
    value_scale, value_shift, value_weight, value_bias = value
    queries = project(spatial_tokens, query, eps[0]) * spatial_tokens.shape[-1] ** -0.5
    normed = functional.layer_norm(detail, detail.shape[-1:], None, None, eps[1])  # (B, P, S)
    constant = queries @ functional.linear(key_shift, key_weight, key_bias)  # (B, K): the same for every position
    scores = (queries @ key_weight * key_scale) @ normed.transpose(1, 2) + constant.unsqueeze(2)
    attention = scores.softmax(dim=-1)
    if eps[2] != eps[1]:
        normed = functional.layer_norm(detail, detail.shape[-1:], None, None, eps[2])
    seen = attention @ normed * value_scale + value_shift
    return torch.cat([spatial_tokens, functional.linear(seen, value_weight, value_bias)], dim=-1), attention
