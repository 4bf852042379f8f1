"""Patch features from a vision model of transformers: CLIP, SigLIP, DINOv2 and others of one grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.grid import Size, as_size
from spatial_tokens.storage.hub import name_or_cached_folder

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
        SpatialTokensError: If transformers cannot load it, it has no such layer, or its image processor and
            hidden states are not of one grid of patches.

    Attributes:
        image_size: `(height, width)` of the pixels that its image processor gives.
        grid_size: Patches `(H, W)` of such pixels.
        hidden_size: `C`.
    """

    def __init__(self, name: str, layer: int = -2) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self._processor, self.model = _load(name)
        config = self.model.config
        patch = getattr(config, "patch_size", None)
        if patch is None:
            raise SpatialTokensError(f"{name} has no patch_size; use a vision model as CLIP's, SigLIP's or DINOv2's")
        self.hidden_size: int = config.hidden_size
        layers = config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
            raise SpatialTokensError(f"layer must be one of {name}: 1 to {layers}, or -{layers} to -1 from the end; got {layer}")
        pixels = self._pixels(_blank())
        (height, width), (down, right) = pixels.shape[1:], as_size(patch, "patch_size")
        self.image_size: Size = (height, width)
        self.grid_size: Size = (height // down, width // right)
        try:
            with torch.inference_mode():
                self(pixels[None])
        except SpatialTokensError:
            raise
        except Exception as error:  # each model says in its own way what it cannot read
            raise SpatialTokensError(
                f"{name} cannot read the {height} x {width} pixels of its own image processor: {reason(error)}; "
                "correct the processor"
            ) from error

    def transform(self) -> Any:
        """The model's own image processor: a PIL picture to pixels `(3, height, width)`."""

        def prepare(picture: Image) -> torch.Tensor:
            pixels = self._pixels(picture)
            if tuple(pixels.shape[1:]) != self.image_size:
                raise SpatialTokensError(
                    f"the image processor of {self.name} gives {self.image_size} pixels of one picture and "
                    f"{tuple(pixels.shape[1:])} of another; make it resize or crop to one size"
                )
            return pixels

        return prepare

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)` to patch features `(B, N, C)`."""
        return self._patches(self._hidden_states(pixels)[self.layer], self.layer)

    def all_layers(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Pixels `(B, 3, height, width)` to maps `(B, H, W, C)` of all layers, the first block's output first."""
        states = self._hidden_states(pixels)
        return [torch.unflatten(self._patches(each, layer), 1, self.grid_size) for layer, each in enumerate(states) if layer > 0]

    def _hidden_states(self, pixels: torch.Tensor) -> Any:
        if tuple(pixels.shape[2:]) != self.image_size:
            raise SpatialTokensError(
                f"{self.name} reads images of {self.image_size} pixels, got {tuple(pixels.shape[2:])}; correct its image processor"
            )
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states

    def _patches(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """A hidden state without class and register tokens."""
        others = states.shape[1] - self.grid_size[0] * self.grid_size[1]  # class and register tokens, which come first
        registers = getattr(self.model.config, "num_register_tokens", 0)
        if states.ndim != 3 or others not in (0, 1, 1 + registers):
            raise SpatialTokensError(
                f"hidden state {layer} of {self.name} has shape {tuple(states.shape)}: no grid of {self.grid_size} patches, "
                "alone or with a class token and registers; use a vision model as CLIP's, SigLIP's or DINOv2's"
            )
        return states[:, others:].contiguous()

    def _pixels(self, picture: Image) -> torch.Tensor:
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"][0]
        if pixels.ndim != 3:
            raise SpatialTokensError(
                f"the image processor of {self.name} gives {tuple(pixels.shape)} of a picture, not pixels (3, height, width); "
                "use a vision model as CLIP's, SigLIP's or DINOv2's"
            )
        return cast("torch.Tensor", pixels)


def _blank() -> Image:
    """A picture that is wider than high, to see what an image processor makes of one."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "viz") from error
    return Image.new("RGB", (64, 48))


def _load(name: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    try:
        auto_processor: Any = AutoImageProcessor
        place = str(name_or_cached_folder(name))
        processor, model = auto_processor.from_pretrained(place), AutoModel.from_pretrained(place, dtype=torch.float32)
    except Exception as error:  # transformers and its hub raise what they like
        raise SpatialTokensError(f"transformers cannot load {name!r}: {reason(error)}") from error
    return processor, getattr(model, "vision_model", model).eval()
