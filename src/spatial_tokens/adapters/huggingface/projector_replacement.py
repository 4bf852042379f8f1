"""An SPProjector in the place of a LLaVA-like model's own projector: K + N image tokens, the patch tokens those that it had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spatial_tokens.adapters.huggingface.api import config_for
from spatial_tokens.adapters.huggingface.model_parts import find_parts
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.modules import SPProjector

NAME = "multi_modal_projector"


def replace_projector(model: Any, config: SPProjectorConfig | str = "llava-sp-cropping", **fields: Any) -> SPProjector:
    """Puts an SPProjector in the place of `multi_modal_projector`, its patch head with the weights that this had.

    The model's patch tokens stay what they were, bit for bit, behind K spatial tokens; text must hold K more image tokens for
    an image: with a `LlavaProcessor`, `processor.num_additional_image_tokens += K`. Unlike `attach` this makes a model of its
    own, whose files need this call before they are loaded.

    Args:
        model: A LLaVA-like model: its projector is Linear, GELU, Linear.
        config: A preset's name, whose widths and grid are those of the model; or a whole config.
        **fields: Fields of an SPProjectorConfig in place of the preset's.

    Returns:
        The projector that is now in the model.

    Raises:
        SpatialTokensError: If the model has no such projector, or the config does not fit it.
    """
    base = find_parts(model).base
    old = getattr(base, NAME, None)
    first, second = getattr(old, "linear_1", None), getattr(old, "linear_2", None)
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear) or len(list(old.parameters())) != 4:  # type: ignore[union-attr]
        raise SpatialTokensError(
            f"{type(model).__name__} has no {NAME} of Linear, GELU, Linear with biases, as LLaVA's; use attach(model, ...)"
        )
    ours = config if isinstance(config, SPProjectorConfig) else None
    fitted = config_for(find_parts(model), config, None, fields)
    values: Mapping[str, Any] = {**fitted.to_dict(), "patch_head": "mlp" if ours is None else ours.patch_head}
    projector = SPProjector.from_config(
        SPProjectorConfig.from_dict(dict(values)), device=first.weight.device, dtype=first.weight.dtype
    )
    if projector.patch_head is None:
        raise SpatialTokensError("the config has no patch head, and the model's own projector would be gone; give patch_head='mlp'")
    projector.patch_head.load_state_dict(
        {"fc1.weight": first.weight, "fc1.bias": first.bias, "fc2.weight": second.weight, "fc2.bias": second.bias}
    )
    setattr(base, NAME, projector.train(model.training))
    return projector
