"""Smaller kernels: dense ones as factorized ones, with a sample of the features that they read, or in 8 bits."""

from spatial_tokens.compression.api import compress
from spatial_tokens.compression.int8 import quantize_int8
from spatial_tokens.compression.report import CompressionReport, CurvePoint, TokenReport

__all__ = ["CompressionReport", "CurvePoint", "TokenReport", "compress", "quantize_int8"]
