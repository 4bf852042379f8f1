"""What a probe reads: an encoder of any kind as a function from pictures to maps of features, by layer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens.adapters.huggingface.api import unwrapped
from spatial_tokens.adapters.huggingface.encoder_maps import PROJECTOR, patch_maps
from spatial_tokens.adapters.huggingface.layouts import thumbnails, tiles_of
from spatial_tokens.adapters.huggingface.model_parts import find_parts
from spatial_tokens.adapters.huggingface.ready import from_hub
from spatial_tokens.adapters.timm import TimmPatchEncoder
from spatial_tokens.adapters.transformers import TransformersPatchEncoder
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown
from spatial_tokens.grid import KernelSize, Size, as_size
from spatial_tokens.storage.hub import name_or_cached_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    Encode = Callable[[Sequence[Image]], dict[str, list[torch.Tensor]]]

LAYER = -2  # the paper's


@dataclass(frozen=True)
class PictureEncoder:
    """Pictures to maps of features.

    Args:
        name: What a report calls it.
        size: Height and width in pixels to which pictures are brought; None: it takes any.
        encode: Pictures to maps `(H, W, C)` of each, by layer, the first layer first.
        layer: The layer whose features a projector reads; "" for the last.
        at_once: Pictures of a batch.
    """

    name: str
    size: Size | None
    encode: Encode
    layer: str = ""
    at_once: int = 8


def picture_encoder(
    encoder: Any,
    *,
    processor: Any = None,
    image_size: KernelSize | None = None,
    layer: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
    device: Any = None,
) -> PictureEncoder:
    """An encoder, as `probe` takes it; see there.

    Raises:
        MissingExtraError: If the library that it needs is not installed.
        SpatialTokensError: If it cannot be loaded, or an argument does not go with it.
    """
    if isinstance(encoder, (str, os.PathLike)):
        name = os.fspath(encoder)
        known_to_timm = re.sub("^(hf-hub:)?timm/", "", name)  # the Hub's names of timm's own models
        if not (os.path.isdir(name) or "/" in known_to_timm):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                timm = TimmPatchEncoder(known_to_timm, -1, pretrained=not random_weights, image_size=image_size)
            return _of_timm(timm, layer, device)
        if random_weights or image_size is not None:
            raise SpatialTokensError("random_weights and image_size go with a timm model")
        if not _is_vision_language(name):
            return _of_transformers(TransformersPatchEncoder(name, -1), layer, device)
        encoder, processor = from_hub(name)
    if hasattr(unwrapped(encoder), "get_input_embeddings") and hasattr(encoder, "config"):
        return _of_model(encoder, processor, layer, device)
    if layer is not None:
        raise SpatialTokensError("layer goes with the name of an encoder; a callable gives the features that are to be read")
    if not callable(encoder):
        raise SpatialTokensError(
            f"encoder must be a name, a vision-language model with its processor, or a callable, got {shown(encoder)}"
        )
    if image_size is None:
        raise SpatialTokensError("a callable needs image_size, the height and width of the pixels that it is given")
    return _of_callable(encoder, as_size(image_size, "image_size"), device)


def _of_timm(encoder: TimmPatchEncoder, layer: int | None, device: Any) -> PictureEncoder:
    from timm.data import create_transform, resolve_model_data_config

    options = {**resolve_model_data_config(encoder.model), "input_size": (3, *encoder.image_size), "crop_pct": 1.0}
    transform = create_transform(**options)  # pictures come in the encoder's size: nothing is cut off
    return _of_layers(encoder, encoder.name, encoder.image_size, transform, layer, device)


def _of_transformers(encoder: TransformersPatchEncoder, layer: int | None, device: Any) -> PictureEncoder:
    return _of_layers(encoder, encoder.name, encoder.image_size, encoder.transform(), layer, device)


def _of_layers(
    encoder: Any, name: str, size: Size, transform: Callable[[Image], torch.Tensor], layer: int | None, device: Any
) -> PictureEncoder:
    encoder = encoder.to(device).eval()

    def encode(pictures: Sequence[Image]) -> dict[str, list[torch.Tensor]]:
        pixels = torch.stack([transform(each) for each in pictures]).to(device)
        return {str(number): list(maps) for number, maps in enumerate(encoder.all_layers(pixels), 1)}

    with torch.inference_mode():
        count = len(encoder.all_layers(torch.zeros(1, 3, *size, device=device)))
    layer = LAYER if layer is None else layer
    if isinstance(layer, bool) or not isinstance(layer, int) or layer == 0 or not -count <= layer <= count:
        raise SpatialTokensError(f"layer must be one of {name}: 1 to {count}, or -{count} to -1 from the end; got {shown(layer)}")
    return PictureEncoder(name, size, encode, str(layer if layer > 0 else count + 1 + layer))


def _is_vision_language(name: str) -> bool:
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    try:
        kind = AutoConfig.from_pretrained(str(name_or_cached_folder(name))).model_type
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"transformers cannot load {name!r}: {reason(error)}") from error
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _of_model(model: Any, processor: Any, layer: int | None, device: Any) -> PictureEncoder:
    """A vision-language model of transformers; features are what its projector is given."""
    if layer is not None:
        raise SpatialTokensError("layer goes with a vision encoder; of a vision-language model it is what its projector is given")
    reads = getattr(processor, "image_processor", None)
    if reads is None:
        raise SpatialTokensError(f"a vision-language model needs its processor, got {shown(processor)}")
    model = model if device is None else model.to(device)
    model.eval()
    parts = find_parts(unwrapped(model))
    weight = next(parts.projector.parameters(), next(parts.model.parameters()))

    def encode(pictures: Sequence[Image]) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        for picture in pictures:  # of one picture it is known which tiles are its own
            inputs = reads(images=[picture], return_tensors="pt").to(weight.device)
            inputs = {name: each.to(weight.dtype) if each.is_floating_point() else each for name, each in inputs.items()}
            for name, maps in patch_maps(parts, inputs).items():
                tiles = tiles_of(inputs, parts.model.config) if parts.family.tiles == "anyres" else [len(maps)]
                found.setdefault(name, []).extend(thumbnails(maps, tiles, last=parts.family.tiles == "last"))
        return found

    vision = parts.vision_config
    size = None if parts.any_size else getattr(vision, "image_size", None)
    name = getattr(model, "name_or_path", "") or type(unwrapped(model)).__name__
    return PictureEncoder(name, None if size is None else as_size(_listed(size), "image_size"), encode, PROJECTOR)


def _listed(size: Any) -> Any:
    return tuple(size) if isinstance(size, list) else size


def _of_callable(encoder: Callable[[torch.Tensor], Any], size: Size, device: Any) -> PictureEncoder:
    """A function of pixels `(B, 3, h, w)` from 0 to 1 to maps `(B, H, W, C)`, or a dict of such by layer."""

    def encode(pictures: Sequence[Image]) -> dict[str, list[torch.Tensor]]:
        given = encoder(torch.stack([_pixels(each) for each in pictures]).to(device))
        named = given if isinstance(given, Mapping) else {"features": given}
        for name, maps in named.items():
            if not isinstance(maps, torch.Tensor) or maps.ndim != 4 or len(maps) != len(pictures):
                found = tuple(maps.shape) if isinstance(maps, torch.Tensor) else shown(maps)
                raise SpatialTokensError(
                    f"the encoder must give maps of patches ({len(pictures)}, H, W, C) for {len(pictures)} pictures, "
                    f"{name} is {found}; without a grid of patches there are no places to read"
                )
        return {str(name): list(maps) for name, maps in named.items()}

    return PictureEncoder(getattr(encoder, "__name__", type(encoder).__name__), size, encode)


def _pixels(picture: Image) -> torch.Tensor:
    values = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255
