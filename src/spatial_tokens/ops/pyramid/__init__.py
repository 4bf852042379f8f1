"""Adaptive average poolings of one map to several sizes."""

from spatial_tokens.ops.pyramid.op import pyramid

__all__ = ["pyramid"]
