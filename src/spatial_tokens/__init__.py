"""Visual spatial tokens for vision-language models (LLaVA-SP): patch features in, spatial and patch tokens out."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatial_tokens.config import SPProjectorConfig
    from spatial_tokens.errors import SpatialTokensError
    from spatial_tokens.modules import DetailFeatureIntegrator, FactorizedFeatureExtractor, SpatialFeatureExtractor, SPProjector
    from spatial_tokens.ops.backends import list_backends
    from spatial_tokens.presets import list_presets

__all__ = [
    "DetailFeatureIntegrator",
    "FactorizedFeatureExtractor",
    "SPProjector",
    "SPProjectorConfig",
    "SpatialFeatureExtractor",
    "SpatialTokensError",
    "__version__",
    "list_backends",
    "list_presets",
]

__version__ = "0.2.0"

if not TYPE_CHECKING:  # a type checker would believe that every name is there

    def __getattr__(name):
        """Imports the library, and torch, when a name is first asked for, so that the command starts before torch is imported."""
        homes = {
            "SPProjectorConfig": "config", "SpatialTokensError": "errors", "list_backends": "ops.backends",
            "list_presets": "presets",
        }  # fmt: skip
        if name in ("config", "errors", "grid", "modules", "ops", "presets", "storage"):
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"{__name__}.{homes.get(name, 'modules')}"), name)
        return value
