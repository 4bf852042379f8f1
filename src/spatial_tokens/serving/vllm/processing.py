"""An image's placeholder in vLLM: its own tokens, and the places of its spatial tokens.

The places are more of the image token's id: all that vLLM needs to know is that they hold embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.models.transformers import MultiModalProcessingInfo, MultiModalProcessor
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from spatial_tokens.adapters.huggingface.layouts import tiles_of
from spatial_tokens.adapters.huggingface.model_parts import image_token_id_of, opening_ids_of, tile_length_of
from spatial_tokens.adapters.huggingface.placeholders import find_runs
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.serving.adapter import ServedAdapter, adapter_of


class SpatialInfo(MultiModalProcessingInfo):  # type: ignore[misc]
    """What vLLM asks of a model before it is there."""

    @cached_property
    def adapter(self) -> ServedAdapter:
        """The adapter that the model's config names."""
        return adapter_of(self.get_hf_config(), self.ctx.model_config.model)

    def get_max_image_tokens(self) -> int:
        own: int = super().get_max_image_tokens()
        return own + self.adapter.count * (self._most_tiles() if self.adapter.per_tile else 1)

    def _most_tiles(self) -> int:
        size = self.get_image_size_with_most_features()
        if self.adapter.family.tiles == "anyres":
            return tiles_of({"image_sizes": [[size.height, size.width]]}, self.get_hf_config())[0]
        return int(self._get_num_mm_tokens(image_sizes=([size.height, size.width],))["num_image_patches"][0])


class SpatialProcessor(MultiModalProcessor):  # type: ignore[misc]
    """Makes room for spatial tokens where `attach`'s processor does: before an image and the token that opens it."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        items = list(out_mm_kwargs.get("image", []))  # before they are emptied
        updates: list[Any] = []
        for update in super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
            if update.modality != "image":
                updates.append(update)
                continue
            openings = [[each] for each in opening_ids_of(self.info.get_hf_config()) if [each] != list(update.target)]
            updates += [self._with_places(update, items, opening) for opening in (*openings, [])]
        return updates

    def _with_places(self, update: Any, items: Sequence[Any], opening: list[int]) -> Any:
        """The same, of an image that this token opens in the prompt."""

        def replacement(index: int) -> Any:
            own = update.replacement(index)
            holds = own.is_embed(own.full).tolist()
            ids, holds = [*opening, *own.full], [False] * len(opening) + holds
            for start, count in reversed(self._runs(ids, items[index])):
                ids[start:start] = [self._image_token_id] * count
                holds[start:start] = [True] * count
            mask = torch.tensor(holds)
            return PromptUpdateDetails(full=ids, is_embed=lambda _: mask)

        return PromptReplacement(modality="image", target=[*opening, *update.target], replacement=replacement)

    @property
    def _image_token_id(self) -> int:
        return image_token_id_of(self.info.get_hf_config())

    def _runs(self, ids: list[int], item: Any) -> list[tuple[int, int]]:
        """Before which of an image's tokens how many places go."""
        adapter, config = self.info.adapter, self.info.get_hf_config()
        if not adapter.per_tile:
            return [(0, adapter.count)]
        if adapter.family.tiles == "anyres":
            return [(0, adapter.count * tiles_of({"image_sizes": item["image_sizes"].data.reshape(1, 2)}, config)[0])]
        length = tile_length_of(self.info.get_hf_processor())
        if length is None:
            raise SpatialTokensError("the model's processor does not say how many tokens a tile has")
        return find_runs([ids], adapter.count, self._image_token_id, opening_ids_of(config), length)[0]
