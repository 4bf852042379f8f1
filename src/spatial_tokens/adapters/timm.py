"""Patch features from any timm encoder that has `forward_intermediates`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from einops import rearrange
from torch import nn

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown
from spatial_tokens.grid import KernelSize, Size, as_size
from spatial_tokens.modules.inputs import check_placement
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.storage.hub import name_or_cached_folder

if TYPE_CHECKING:
    from PIL.Image import Image


class TimmPatchEncoder(nn.Module):
    """The patch features that an `SPProjector` reads: one hidden layer of a timm ViT, without class and register tokens.

    The blocks after the layer, the final norm and the head are dropped. A model of stages (Swin, ConvNeXt) works too: there a
    layer is a stage.

    Args:
        name: A timm model, for example "vit_large_patch14_clip_quickgelu_336.openai", the paper's encoder.
        layer: The hidden state, counted as Hugging Face's `hidden_states` are: -1 is the last block's output (before the final
            norm), -2 (the paper's) the one before; 1 is the first block's.
        pretrained: Whether to load timm's weights (from the Hugging Face hub).
        image_size: Height and width in pixels, or an integer for a square; the model's own when left out.
        **model_kwargs: Passed on to `timm.create_model`.

    Shape:
        - Input: pixels `(B, 3, height, width)`, as `transform()` prepares them.
        - Output: `(B, N, C)`, the grid's rows one after another.

    Raises:
        MissingExtraError: If timm is not installed.
        SpatialTokensError: If timm cannot make the model, it has no `forward_intermediates`, the layer does not exist, or the
            pixels are not of `image_size`, or not of the model's dtype and device.

    Examples:
        >>> encoder = TimmPatchEncoder("vit_tiny_patch16_224", image_size=(128, 96))
        >>> encoder.grid_size, encoder.hidden_size
        ((8, 6), 192)
        >>> encoder(torch.zeros(1, 3, 128, 96)).shape
        torch.Size([1, 48, 192])
    """

    def __init__(
        self,
        name: str,
        layer: int = -2,
        pretrained: bool = False,
        *,
        image_size: KernelSize | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise SpatialTokensError(f"name must be that of a timm model, such as 'vit_base_patch16_224', got {shown(name)}")
        if image_size is None:
            image_size = model_kwargs.pop("img_size", None)
        if image_size is not None:
            model_kwargs["img_size"] = as_size(image_size, "image_size")
        self.name, self.layer = name, layer
        self.model = _create(name, pretrained, model_kwargs)
        levels = list(self.model.feature_info)
        self._level = _level_of(layer, len(levels), name)
        self.image_size: Size = model_kwargs.get("img_size", self.model.pretrained_cfg["input_size"][1:])
        self.grid_size: Size = tuple(side // levels[self._level]["reduction"] for side in self.image_size)
        self.hidden_size: int = levels[self._level]["num_chs"]
        self.model.prune_intermediate_layers([self._level], prune_norm=True, prune_head=True)

    def transform(self) -> Any:
        """Timm's evaluation transform for this model: a PIL picture to pixels `(3, height, width)`."""
        from timm.data import create_transform, resolve_model_data_config

        return create_transform(**{**resolve_model_data_config(self.model), "input_size": (3, *self.image_size)})

    def picture(self, pixels: torch.Tensor) -> Image:
        """Undoes the normalization of `transform()`: pixels `(3, height, width)` to the picture that the encoder saw."""
        from torchvision.transforms.functional import to_pil_image

        check_dense(pixels, "pixels", "(3, height, width)", 3)
        mean, std = (torch.tensor(self.model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        levels = ((pixels.cpu() * std + mean).clamp(0, 1) * 255).round()
        return cast("Image", to_pil_image(levels.to(torch.uint8)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)` to patch features `(B, N, C)`."""
        (feature_map,) = self._maps(pixels, [self._level])
        if tuple(feature_map.shape[2:]) != self.grid_size:
            raise SpatialTokensError(
                f"{self.name!r} gave a grid of {tuple(feature_map.shape[2:])} where {self.grid_size} was expected; "
                "use an image_size that its patches divide"
            )
        return rearrange(feature_map, "b c h w -> b (h w) c").contiguous()

    def all_layers(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Pixels `(B, 3, height, width)` to maps `(B, H, W, C)` of layers 1 to `layer`; the stages of one model differ in size."""
        return [each.permute(0, 2, 3, 1) for each in self._maps(pixels, list(range(self._level + 1)))]

    def _maps(self, pixels: torch.Tensor, levels: list[int]) -> list[torch.Tensor]:
        """Maps `(B, C, H, W)`."""
        check_dense(pixels, "pixels", f"(B, 3, {self.image_size[0]}, {self.image_size[1]})")
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            raise SpatialTokensError(
                f"pixels must have shape (B, 3, {self.image_size[0]}, {self.image_size[1]}), got {tuple(pixels.shape)}; "
                "prepare the picture with transform(), or build the encoder with its image_size"
            )
        if (weight := next(self.model.parameters(), None)) is not None:
            check_placement(pixels, weight, "pixels")
        return cast(
            "list[torch.Tensor]",
            self.model.forward_intermediates(pixels, indices=levels, output_fmt="NCHW", stop_early=True, intermediates_only=True),
        )

    def extra_repr(self) -> str:
        return f"{self.name!r}, layer={self.layer}, grid_size={self.grid_size}, hidden_size={self.hidden_size}"


def _create(name: str, pretrained: bool, model_kwargs: dict[str, Any]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = timm.list_models(f"*{base}*")[:3]
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists the known ones"
        raise SpatialTokensError(f"timm does not know a model {name!r}{hint}")
    try:
        if pretrained and (weights := timm.get_pretrained_cfg(name)) is not None and weights.hf_hub_id:
            name_or_cached_folder(weights.hf_hub_id)
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **model_kwargs)
    except Exception as error:  # timm and its hub raise what they like
        raise SpatialTokensError(f"timm cannot make {name!r}: {reason(error)}") from error
    for needed in ("forward_intermediates", "prune_intermediate_layers"):
        if not hasattr(model, needed):
            raise SpatialTokensError(
                f"timm {timm.__version__}'s {name!r} has no {needed}; use a ViT, for example vit_base_patch16_224"
            )
    return model


def _level_of(layer: int, num_levels: int, name: str) -> int:
    """Timm's index of that layer of Hugging Face's `hidden_states`, which start with the embeddings."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer == 0 or not -num_levels <= layer <= num_levels:
        raise SpatialTokensError(
            f"layer must be one of {name!r}: 1 to {num_levels}, or -{num_levels} to -1 from the end; got {shown(layer)}"
        )
    return layer - 1 if layer > 0 else num_levels + layer
