"""Dense kernels to factorized ones, with a sample of the features that they read."""

from spatial_tokens.compression.api import compress
from spatial_tokens.compression.report import CompressionReport, CurvePoint, TokenReport

__all__ = ["CompressionReport", "CurvePoint", "TokenReport", "compress"]
