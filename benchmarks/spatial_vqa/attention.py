"""Figure 5: what the spatial tokens of a DetailFeatureIntegrator look up, in scenes and in Gaussian noise."""

from typing import Any

import torch

from benchmarks.spatial_vqa import encoder
from spatial_tokens.demo.scenes import SIDE

PICTURES = 64


def noise_pixels(count: int, seed: int = 0) -> torch.Tensor:
    """Gaussian noise as the encoder reads pictures, `(count, 3, SIDE, SIDE)`: grey in the middle, cut at black and white."""
    random = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(count, 3, SIDE, SIDE, generator=random)).clamp(-1, 1)


@torch.inference_mode()
def measure_attention(model: Any, scenes: torch.Tensor) -> dict[str, Any]:
    """The attention of a trained model.

    Args:
        model: A LLaVA whose spatial tokens have an integrator.
        scenes: The encoder's features of scenes, `(B, 1 + N, C)`.

    Returns:
        For "scenes" and "noise": the paper's statistic, largest over smallest weight of a picture's whole map, its median over
        pictures, as is that of the largest weight alone; and the first picture's map `(K, P)`.
    """
    noise = encoder.features_of(model.model.vision_tower.vit, noise_pixels(PICTURES))
    return {name: _statistics(model, features) for name, features in (("scenes", scenes[:PICTURES]), ("noise", noise))}


def _statistics(model: Any, features: torch.Tensor) -> dict[str, Any]:
    weight = next(model.spatial_tokens.parameters())
    _, attention = model.spatial_tokens(features[:, 1:].to(weight), return_attention=True)
    maps = attention.float().flatten(1)
    return {
        "max_over_min": (maps.amax(1) / maps.amin(1)).median().item(),
        "max": maps.amax(1).median().item(),
        "positions": attention.shape[-1],
        "map": [[round(each, 5) for each in row] for row in attention[0].tolist()],
    }
