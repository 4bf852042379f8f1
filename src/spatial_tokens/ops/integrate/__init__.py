"""Spatial tokens look up details: LayerNorms, projections, attention and concatenation."""

from spatial_tokens.ops.integrate.naive import attend
from spatial_tokens.ops.integrate.op import integrate

__all__ = ["attend", "integrate"]
