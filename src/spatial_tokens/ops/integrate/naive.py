"""The specification: cross-attention of one head (LLaVA-SP, section 3.3, equation 4)."""

from collections.abc import Sequence

import torch
from torch.nn import functional


def integrate(
    spatial_tokens: torch.Tensor,
    detail: torch.Tensor,
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    eps: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spatial tokens `(B, K, S)` and detail `(B, P, S)` to `(B, K, 2S)` and the attention `(B, K, P)`."""
    queries = project(spatial_tokens, query, eps[0])
    return attend(spatial_tokens, queries, project(detail, key, eps[1]), project(detail, value, eps[2]))


def project(features: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float) -> torch.Tensor:
    """LayerNorm, then Linear; the parameters are the two weights with their biases."""
    norm_weight, norm_bias, weight, bias = parameters
    normed = functional.layer_norm(features, features.shape[-1:], norm_weight, norm_bias, eps)
    return functional.linear(normed, weight, bias)


def attend(
    spatial_tokens: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the projections: query `(B, K, S)`, key and value `(B, P, S)`."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(1, 2)  # (B, K, P); scaled first for float16's range
    attention = scores.softmax(dim=-1)
    return torch.cat([spatial_tokens, attention @ value], dim=-1), attention
