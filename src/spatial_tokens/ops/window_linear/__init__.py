"""Kernels on windows of a patch map: the extractor's tokens, the integrator's detail map, sliding windows."""

from spatial_tokens.ops.window_linear.op import window_linear

__all__ = ["window_linear"]
