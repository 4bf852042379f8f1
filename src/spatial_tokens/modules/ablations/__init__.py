"""The designs that the paper compares its extractor with; each takes the extractor's place in an `SPProjector`."""

from spatial_tokens.modules.ablations.sliding_window import SlidingWindowExtractor
from spatial_tokens.modules.ablations.transformer import TransformerExtractor

__all__ = ["SlidingWindowExtractor", "TransformerExtractor"]
