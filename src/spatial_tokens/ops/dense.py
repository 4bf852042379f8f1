"""The check that every operator and module makes of its input first."""

from typing import Any

import torch

from spatial_tokens.errors import SpatialTokensError


def check_dense(value: Any, name: str, shape: str, ndim: int | None = None) -> None:
    """Raises SpatialTokensError unless a value is a dense tensor with one dimension or more, `ndim` where it is given."""
    if not isinstance(value, torch.Tensor):
        raise SpatialTokensError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind, advice = ("a nested tensor", "pad and stack it") if value.is_nested else (value.layout, "call .to_dense()")
        raise SpatialTokensError(f"{name} must be a dense tensor {shape}, got {kind}; {advice}")
    if value.ndim != (ndim or max(value.ndim, 1)):
        raise SpatialTokensError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
