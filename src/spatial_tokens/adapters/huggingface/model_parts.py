"""Finds the parts of a vision-language model that spatial tokens need: where patches pass, what embeds words and reads them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.families import FAMILIES, GENERAL, PROJECTORS, REFUSED, Family
from spatial_tokens.adapters.huggingface.layouts import OF_ANY_SIZE
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size


@dataclass
class ModelParts:
    """The parts of a model.

    Args:
        model: The model, as the user has it.
        base: What encodes images (`get_image_features`) and joins them with the text.
        language_model: What reads the joined sequence, as `inputs_embeds`.
        projector: The module whose input is the patch features.
        projector_path: Its name below `base`.
        family: What is known of its family.
        vision_config: The vision encoder's config.
        image_token_id: The placeholder that image features take the place of.
    """

    model: nn.Module
    base: nn.Module
    language_model: nn.Module
    projector: nn.Module
    projector_path: str
    family: Family
    vision_config: Any
    image_token_id: int

    @property
    def embeddings(self) -> Any:
        """The word embeddings: looked up each time, as resizing replaces them."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def text_hidden_size(self) -> int:
        """The language model's width."""
        return int(getattr(self.embeddings, "embedding_dim", None) or self.embeddings.weight.shape[1])

    @property
    def num_embeddings(self) -> int:
        """Tokens that have a word embedding."""
        return int(getattr(self.embeddings, "num_embeddings", None) or self.embeddings.weight.shape[0])

    @property
    def vision_hidden_size(self) -> int | None:
        """Channels of the patch features; None where neither the config nor the projector's first layer says."""
        channels, hidden_size = _in_features(self.projector), getattr(self.vision_config, "hidden_size", None)
        if self.family.layout == "class token":
            return int(self.vision_config.hidden_size)
        if channels and hidden_size and not self.family.joined and _merge(channels, hidden_size):
            return int(hidden_size)  # the projector joins patches, after they have passed
        return channels

    @property
    def grid_size(self) -> Size | None:
        """The patch grid, where all images have the same and the config tells it."""
        if self.any_size:
            return None
        image, patch = (_pair(getattr(self.vision_config, name, None)) for name in ("image_size", "patch_size"))
        if image is None or patch is None:
            return None
        height, width = image[0] // patch[0], image[1] // patch[1]
        channels, hidden_size = _in_features(self.projector) or 0, getattr(self.vision_config, "hidden_size", 0)
        merge = _merge(channels, hidden_size) if self.family.joined else 1
        smaller = self.family.reduced * max(1, merge)
        return height // smaller, width // smaller

    def zero(self, like: torch.Tensor) -> torch.Tensor:
        """Zero, of the projector's parameters: they get a gradient in a batch without images too."""
        tap: Any = self.projector
        if isinstance(getattr(tap, "linear_1", None), nn.Linear):  # LLaVA's
            blank = torch.zeros(1, 1, tap.linear_1.in_features).to(tap.linear_1.weight)
            return tap(blank)[..., :0].sum().to(like)  # type: ignore[no-any-return]
        trained = [each for each in tap.parameters() if each.requires_grad]
        return torch.stack([0 * each.sum() for each in trained]).sum() if trained else like.new_zeros(())

    @property
    def opening_ids(self) -> list[int]:
        """Tokens that may stand right before an image and belong to it."""
        return opening_ids_of(self.model.config)

    @property
    def any_size(self) -> bool:
        """Whether images have grids of different sizes."""
        return self.family.layout in OF_ANY_SIZE


def find_parts(model: nn.Module) -> ModelParts:
    """The parts of a model.

    Raises:
        SpatialTokensError: If one of them is not there; it says what was looked for.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind in REFUSED:
        raise SpatialTokensError(f"spatial tokens cannot be attached to {kind}: {REFUSED[kind]}")
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise SpatialTokensError(f"a transformers vision-language model is expected, got a {type(model).__name__}")
    base = model.base_model
    if not isinstance(base, nn.Module) or not hasattr(base, "get_image_features"):
        raise SpatialTokensError(
            f"spatial tokens cannot be attached to {kind}: {type(base).__name__} has no get_image_features() to take patches from"
        )
    vision_config, family = vision_config_of(config), family_of(config)
    path, projector = _find_projector(base, family, kind)
    return ModelParts(model, base, _language_model(model), projector, path, family, vision_config, image_token_id_of(config))


def opening_ids_of(config: Any) -> list[int]:
    """Tokens that may stand right before an image and belong to it, of a model of this config."""
    names = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    return [found for name in names if isinstance(found := getattr(config, name, None), int)]


def family_of(config: Any) -> Family:
    """What is known of the family of a model of this config, which has a vision encoder."""
    tower = str(getattr(vision_config_of(config), "model_type", ""))
    return FAMILIES.get(tower) or FAMILIES.get(str(config.model_type), GENERAL)


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them for its calls."""
    if not weight.is_meta:
        return weight.device
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    found = next((device for device in devices if device is not None), None)
    return weight.device if found is None else torch.device(found)


def vision_config_of(config: Any) -> Any:
    """The config of its vision encoder.

    Raises:
        SpatialTokensError: If it has none.
    """
    found = getattr(config, "vision_config", None)
    if found is None:
        raise SpatialTokensError(f"{config.model_type} has no vision_config: it has no vision tower to take patches from")
    return found


def _find_projector(base: nn.Module, family: Family, kind: str) -> tuple[str, nn.Module]:
    for path in (family.projector,) if family.projector else PROJECTORS:
        try:
            return path, base.get_submodule(path)
        except AttributeError:
            continue
    looked_for = family.projector or ", ".join(PROJECTORS)
    raise SpatialTokensError(f"found no projector in {kind}; looked in {type(base).__name__} for: {looked_for}")


def _language_model(model: nn.Module) -> nn.Module:
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    if getattr(model.config, "is_encoder_decoder", False):
        return decoder.get_encoder()  # type: ignore[no-any-return]
    return decoder  # type: ignore[no-any-return]


def image_token_id_of(config: Any) -> int:
    """The placeholder that image features take the place of.

    Raises:
        SpatialTokensError: If it has none.
    """
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise SpatialTokensError(f"{config.model_type} has no image_token_id in its config: images have no place in its sequence")


def _merge(channels: int, hidden_size: int) -> int:
    """The side of the square of patches whose channels are joined in `channels`; 0 if that is no square."""
    side = isqrt(channels // hidden_size) if hidden_size else 0
    return side if side**2 * hidden_size == channels else 0


def _in_features(module: nn.Module) -> int | None:
    """The width that a module's first layer takes."""
    for part in module.modules():
        for name in ("in_features", "in_channels"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
        weight = getattr(part, "weight", None)
        shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # the former where DeepSpeed has partitioned it
        if len(shape) == 1:  # a norm
            return int(shape[0])
    return None


def _pair(size: Any) -> Size | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def tile_length_of(processor: Any) -> int | None:
    """The image tokens of a tile; None if a processor does not say."""
    return getattr(processor, "image_seq_length", None) or getattr(processor, "image_seq_len", None)
