"""vLLM's plugin: spatial tokens in every model of its Transformers backend. vLLM calls `register` in each of its processes."""

import warnings

ARCHITECTURE = "SpatialTokensForConditionalGeneration"
MOE_ARCHITECTURE = "SpatialTokensMoEForConditionalGeneration"
TESTED = "0.32"  # of vLLM


def register() -> None:
    """Tells vLLM of the architectures, by the names of their classes: they are imported where a model needs one."""
    from vllm import ModelRegistry, __version__

    if not f"{__version__}.".startswith(f"{TESTED}."):
        warnings.warn(f"spatial tokens are tested with vLLM {TESTED}, this is {__version__}; compare its answers", stacklevel=2)
    known = ModelRegistry.get_supported_archs()
    for name in (ARCHITECTURE, MOE_ARCHITECTURE):
        if name not in known:
            ModelRegistry.register_model(name, f"spatial_tokens.serving.vllm.model:{name}")
