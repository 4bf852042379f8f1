"""Visual spatial tokens for vision-language models (LLaVA-SP): patch features in, spatial and patch tokens out."""

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.modules import DetailFeatureIntegrator, SpatialFeatureExtractor, SPProjector

__all__ = [
    "DetailFeatureIntegrator",
    "SPProjector",
    "SPProjectorConfig",
    "SpatialFeatureExtractor",
    "SpatialTokensError",
    "__version__",
]

__version__ = "0.1.0"
