"""Patch features from a vision model of transformers: CLIP, SigLIP, DINOv2 and others of one grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.grid import Size, as_size

if TYPE_CHECKING:
    from PIL.Image import Image


class TransformersPatchEncoder(nn.Module):
    """The patch features that an `SPProjector` reads: one hidden state of a vision model, without class and register tokens.

    Args:
        name: A folder or a repository on the Hugging Face hub: of a vision model (CLIPVisionModel, SiglipVisionModel, Dinov2Model),
            or of one with a text model beside it (CLIPModel), which is dropped.
        layer: The hidden state, as `hidden_states` counts them; -2 is the paper's.

    Shape:
        - Input: pixels `(B, 3, height, width)`, as `transform()` prepares them.
        - Output: `(B, N, C)`, the grid's rows one after another.

    Raises:
        MissingExtraError: If transformers is not installed.
        SpatialTokensError: If transformers cannot load it, it has no images of one size, or no such layer.
    """

    def __init__(self, name: str, layer: int = -2) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self._processor, self.model = _load(name)
        config = self.model.config
        image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if image is None or patch is None:
            raise SpatialTokensError(f"{name} has no image_size and patch_size; use a vision model as CLIP's, SigLIP's or DINOv2's")
        (height, width), (down, right) = as_size(image, "image_size"), as_size(patch, "patch_size")
        self.grid_size: Size = (height // down, width // right)
        self.hidden_size: int = config.hidden_size
        layers = config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
            raise SpatialTokensError(f"layer must be one of {name}: 1 to {layers}, or -{layers} to -1 from the end; got {layer}")

    def transform(self) -> Any:
        """The model's own image processor: a PIL picture to pixels `(3, height, width)`."""
        processor = self._processor

        def prepare(picture: Image) -> torch.Tensor:
            return cast("torch.Tensor", processor(images=picture, return_tensors="pt")["pixel_values"][0])

        return prepare

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)` to patch features `(B, N, C)`."""
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        patches = self.grid_size[0] * self.grid_size[1]
        before = states.shape[1] - patches  # class and register tokens come first
        if before < 0:
            raise SpatialTokensError(
                f"{self.name} gave {states.shape[1]} tokens where {patches} patches were expected; its image processor makes "
                f"{tuple(pixels.shape[2:])} pixels"
            )
        return cast("torch.Tensor", states[:, before:].contiguous())


def _load(name: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    try:
        auto_processor: Any = AutoImageProcessor
        processor, model = auto_processor.from_pretrained(name), AutoModel.from_pretrained(name)
    except Exception as error:  # transformers and its hub raise what they like
        raise SpatialTokensError(f"transformers cannot load {name!r}: {reason(error)}") from error
    return processor, getattr(model, "vision_model", model).eval()
