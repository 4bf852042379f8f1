"""The projector and its parts, one `nn.Module` a file; `modules.ablations` holds the paper's comparison designs."""

from spatial_tokens.modules.extractor import SpatialFeatureExtractor
from spatial_tokens.modules.factorized_extractor import FactorizedFeatureExtractor
from spatial_tokens.modules.heads import LinearHead, MLPHead
from spatial_tokens.modules.integrator import DetailFeatureIntegrator
from spatial_tokens.modules.projector import SPProjector

__all__ = [
    "DetailFeatureIntegrator",
    "FactorizedFeatureExtractor",
    "LinearHead",
    "MLPHead",
    "SPProjector",
    "SpatialFeatureExtractor",
]
