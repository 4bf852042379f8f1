"""Spatial tokens in nanoVLM: an SPProjector beside its `ModalityProjector`, which merges the patches itself."""

from __future__ import annotations

from typing import Any

from spatial_tokens.adapters.fit_config import fitted, require
from spatial_tokens.adapters.prepend import PrependSpatialTokens


def add_spatial_tokens(model: Any, preset: str, **fields: Any) -> PrependSpatialTokens:
    """Gives a nanoVLM VisionLanguageModel K spatial tokens a picture (or tile of one), before its own tokens.

    `model.MP` becomes a `PrependSpatialTokens`, `model.cfg.mp_image_token_length` counts the K tokens too, and
    `model.cfg.mp_spatial_tokens` remembers what was added, so that a patched model is rebuilt from its `config.json`.

    Args:
        model: A VisionLanguageModel whose `MP` is still its own, and whose VLMConfig has the field `mp_spatial_tokens`.
        preset: A preset's name; the widths and the grid are those of the model.
        **fields: Fields of an SPProjectorConfig in place of the preset's.

    Returns:
        What is now the model's `MP`.

    Raises:
        SpatialTokensError: If it is not such a model, it has spatial tokens already, or the preset or a field does not fit it.
    """
    require(
        model,
        "nanoVLM's VisionLanguageModel, with mp_spatial_tokens added to its VLMConfig",
        "MP",
        "cfg.vit_img_size",
        "cfg.vit_patch_size",
        "cfg.vit_hidden_dim",
        "cfg.lm_hidden_dim",
        "cfg.mp_pixel_shuffle_factor",
        "cfg.mp_image_token_length",
        "cfg.mp_spatial_tokens",
    )
    cfg = model.cfg
    side = cfg.vit_img_size // cfg.vit_patch_size
    config = fitted(
        preset,
        fields,
        vision_hidden_size=cfg.vit_hidden_dim,
        text_hidden_size=cfg.lm_hidden_dim,
        grid_size=(side, side),
        patch_head=None,
    )
    model.MP = projector = PrependSpatialTokens.from_config(model.MP, config, grid_size=(side, side))
    cfg.mp_image_token_length = (side // cfg.mp_pixel_shuffle_factor) ** 2 + projector.num_spatial_tokens
    cfg.mp_spatial_tokens = {"preset": preset, **fields}
    return projector
