"""Spatial tokens in a model of vLLM's Transformers backend: made when an image is encoded, put before the image's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    TransformersMultiModalForCausalLM,
    TransformersMultiModalMoEForCausalLM,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from spatial_tokens.adapters.huggingface.around import Around
from spatial_tokens.adapters.huggingface.hooks import NAME, patches_in
from spatial_tokens.adapters.huggingface.layouts import Maps, maps_of, thumbnails, tiles_of
from spatial_tokens.adapters.huggingface.maps_to_tokens import MapsToTokens
from spatial_tokens.adapters.huggingface.model_parts import ModelParts, find_parts
from spatial_tokens.adapters.huggingface.saving import MODULE, ROW, WEIGHTS_NAME
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.modules import SPProjector
from spatial_tokens.serving.adapter import adapter_of
from spatial_tokens.serving.vllm.processing import SpatialInfo, SpatialProcessor
from spatial_tokens.storage.sharded import write
from spatial_tokens.training.tensor_parallel import parallelize_projector

Weights = Iterable[tuple[str, torch.Tensor]]


class SpatialTokensMixin:
    """Mixed into a class of the backend, whose `model` is transformers' own, without its head."""

    model: Any
    config: Any
    hf_to_vllm_mapper: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.compilation_config.compile_mm_encoder:
            raise SpatialTokensError(
                "compiled encoders do not show the patches that spatial tokens are made of: leave compile_mm_encoder out"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.adapter = adapter = adapter_of(self.config, vllm_config.model_config.model)
        self.parts = find_parts(self.model)
        device = vllm_config.device_config.device
        # on "meta": a tensor-parallel process never holds more than its part
        projector = SPProjector.from_config(adapter.config, device="meta", dtype=vllm_config.model_config.dtype)
        self.to_tokens = MapsToTokens.of(projector, adapter.resize)
        if get_tensor_model_parallel_world_size() > 1:
            parallelize_projector(projector, DeviceMesh.from_group(get_tp_group().device_group, torch.device(device).type))
        self.spatial_tokens = projector.to_empty(device=device).requires_grad_(False)
        self.secondary_weights = [
            DefaultModelLoader.Source(
                str(adapter.folder),
                revision=None,
                prefix=f"{NAME}.",
                fall_back_to_pt=False,
                allow_patterns_overrides=[WEIGHTS_NAME],
            )
        ]

    def load_weights(self, weights: Weights) -> set[str]:
        """The base's weights, the projector's, and then those of the base's modules that trained with it."""
        loaded: set[str] = set()
        trained: list[tuple[str, torch.Tensor]] = []
        found: set[str] = super().load_weights(self._of_base(weights, loaded, trained))  # type: ignore[misc]
        missing = [name for name, _ in self.spatial_tokens.named_parameters() if f"{NAME}.{name}" not in loaded]
        if loaded and missing:
            raise SpatialTokensError(f"the weights of {self.adapter.folder} lack {', '.join(missing)}")
        fused = WeightsMapper(orig_to_new_stacked=self.hf_to_vllm_mapper.orig_to_new_stacked)  # they have modules' names already
        found |= AutoWeightsLoader(self).load_weights(trained, mapper=fused)
        return found | loaded

    def _of_base(self, weights: Weights, loaded: set[str], trained: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Any]]:
        """The base's weights; the projector's are written, those of trained modules kept."""
        own = dict(self.spatial_tokens.named_parameters())
        for name, tensor in weights:
            rest = name.removeprefix(f"{NAME}.")
            if rest == name:
                yield name, tensor
            elif rest.startswith(MODULE):
                trained.append((rest.removeprefix(MODULE), tensor))
            elif not rest.startswith(ROW):  # which files of 0.1 have
                if rest not in own or own[rest].shape != tensor.shape:
                    raise SpatialTokensError(f"the projector of {self.adapter.folder} has no {rest} of {tuple(tensor.shape)}")
                write(own[rest], tensor)
                loaded.add(name)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Each image's tokens, its spatial tokens before them."""
        if kwargs.get("image_embeds") is not None:
            raise SpatialTokensError("image_embeds have no patches to make spatial tokens of; send the images")
        with recorded(self.parts) as maps:
            own = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return [*self._joined(maps, own, self._tiles(kwargs, len(maps)))] if maps else own

    def _tiles(self, kwargs: dict[str, Any], maps: int) -> list[int]:
        """How many tiles each image was cut into."""
        where = self.parts.family.tiles
        if where is None:
            return [1] * maps
        if where == "anyres":  # of which vLLM says one
            return tiles_of(kwargs, self.config)
        return [int(each) for each in kwargs["num_image_patches"].flatten()]

    def _joined(self, maps: Maps, own: Sequence[torch.Tensor], counts: list[int]) -> Iterator[torch.Tensor]:
        if len(counts) != len(own) or sum(counts) != len(maps):
            raise SpatialTokensError(f"{len(maps)} maps of patches were encoded, for {len(own)} images of {counts} tiles")
        where, per_tile = self.parts.family.tiles, self.adapter.per_tile
        if not per_tile:
            maps, counts = thumbnails(maps, counts, last=where == "last"), [1] * len(own)
        tokens = self.to_tokens(self.spatial_tokens, maps)
        for ours, theirs in zip(torch.split(tokens, counts), own, strict=True):
            if per_tile and where != "anyres":  # before each tile's tokens
                yield torch.cat([ours.to(theirs), torch.unflatten(theirs, 0, (len(ours), -1))], dim=1).flatten(0, 1)
            else:
                yield torch.cat([ours.to(theirs).flatten(0, 1), theirs])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The reserved token is never generated."""
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        if logits is not None and self.adapter.mode == "own" and self.adapter.token_id < logits.shape[-1]:
            logits[..., self.adapter.token_id] = -torch.inf
        return logits

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
        """The places are text to rotary positions of three axes."""
        tokens, count, features = list(input_tokens), self.adapter.count, []
        for feature in mm_features:
            if feature.modality == "image":
                place = feature.mm_position
                tokens[place.offset : place.offset + count] = [0] * count
                rest = place.is_embed[count:]
                skipped = count + int(rest.int().argmax())  # what opens the image is not its own
                inner = replace(
                    place, offset=place.offset + skipped, length=place.length - skipped, is_embed=place.is_embed[skipped:]
                )
                feature = replace(feature, mm_position=inner)
            features.append(feature)
        return super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]


@contextmanager
def recorded(parts: ModelParts) -> Iterator[Maps]:
    """The maps of patches that `get_image_features` makes meanwhile, in order."""
    maps: Maps = []

    def encode(original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        inputs: list[torch.Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(patches_in(args, kwargs))

        hook = parts.projector.register_forward_pre_hook(record, with_kwargs=True)
        try:
            outputs = original(**arguments)
        finally:
            hook.remove()
        if not inputs:
            raise SpatialTokensError(f"images were encoded without a call of {parts.projector_path}, whose input the patches are")
        maps.extend(maps_of(parts.family.layout, inputs, arguments, parts.vision_config))
        return outputs

    base: Any = parts.base
    base.get_image_features = Around(base, "get_image_features", encode)
    try:
        yield maps
    finally:
        del base.get_image_features


registered = MULTIMODAL_REGISTRY.register_processor(SpatialProcessor, info=SpatialInfo, dummy_inputs=MultiModalDummyInputsBuilder)


@registered
class SpatialTokensForConditionalGeneration(SpatialTokensMixin, TransformersMultiModalForCausalLM):  # type: ignore[misc]
    """A dense model."""


@registered
class SpatialTokensMoEForConditionalGeneration(SpatialTokensMixin, TransformersMultiModalMoEForCausalLM):  # type: ignore[misc]
    """A model with experts."""
