"""Which families the plugin serves: those whose tokens were compared with transformers', and those that vLLM computes otherwise."""

from __future__ import annotations

import warnings
from typing import Any

from spatial_tokens.errors import SpatialTokensError

# Compared, on tiny models: the same tokens as `attach` and `generate` (tests/serving).
COMPARED = ("idefics3", "internvl", "llava", "llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl")

BOTH_WAYS = "an image's tokens attend to one another both ways, which vLLM does on no CPU, and else for spatial tokens too"
LAYERS = "its vision encoder adds to several layers of the language model, which vLLM's Transformers backend does not do"

# What vLLM's own Transformers backend computes otherwise than transformers, without spatial tokens too.
REFUSED_IN_VLLM = {
    # Compared without spatial tokens, with vLLM 0.32 (tests/serving): tiny models answer otherwise where there are pictures. Both
    # ways alone changes Gemma 3's answers less than vLLM does, so there is another difference, not found yet.
    "gemma3": BOTH_WAYS,
    "qwen3_vl": LAYERS,
    # The same in a trial, of which no test is kept.
    "cohere_compass": LAYERS,
    "qwen3_vl_moe": LAYERS,
    # vLLM starts neither, without spatial tokens too.
    "gemma4": BOTH_WAYS,
    "qwen3_omni_moe_thinker": LAYERS,
    # Not compared: by reading vLLM's and transformers' code, they have the same attention or the same vision encoder.
    "cosmos3_omni": LAYERS,
    "paligemma": BOTH_WAYS,
    "shieldgemma2": BOTH_WAYS,
}


def require_served(hf_config: Any) -> None:
    """Raises SpatialTokensError, with the reason, if vLLM computes a model of this config otherwise than transformers.

    Warns if they have not been compared.
    """
    kind, why = hf_config.model_type, refusal(hf_config)
    if why is not None:
        raise SpatialTokensError(f"{kind} with spatial tokens is not served by vLLM: {why}; use transformers' generate()")
    if kind not in COMPARED:
        warnings.warn(
            f"vLLM's answers of {kind} with spatial tokens have not been compared with transformers', only those of "
            f"{', '.join(COMPARED)}; compare some yourself",
            stacklevel=2,
        )


def refusal(hf_config: Any) -> str | None:
    """Why a model of this config is refused, or None."""
    if getattr(getattr(hf_config, "vision_config", None), "deepstack_visual_indexes", None):
        return LAYERS
    return REFUSED_IN_VLLM.get(hf_config.model_type)
