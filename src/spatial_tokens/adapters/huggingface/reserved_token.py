"""The reserved token, which marks the places of spatial tokens in `input_ids`. The base model never sees it.

Its id may lie beyond the base's vocabulary: before ids reach the base, an ordinary token stands in for it. So no embedding grows,
logits have the base's columns and values, and every loss over the vocabulary is the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from spatial_tokens.adapters.huggingface.model_parts import ModelParts
from spatial_tokens.errors import SpatialTokensError, shown

LARGEST_ID = 2**31 - 1


class ReservedToken:
    """A token's text, its id and what takes its place.

    Args:
        text: As the tokenizer has it.
        token_id: Its id; the first beyond the embeddings when None.
        parts: The model's parts.

    Raises:
        SpatialTokensError: If the id stands for something else.
    """

    def __init__(self, text: str, token_id: int | None, parts: ModelParts) -> None:
        rows = parts.num_embeddings
        token_id = rows if token_id is None else token_id
        if type(token_id) is not int or not 0 <= token_id <= LARGEST_ID:
            raise SpatialTokensError(f"token_id must be an integer from 0 to {LARGEST_ID}, got {shown(token_id)}")
        names: dict[int, set[str]] = {}
        for name, each in _named_ids(parts.model):
            names.setdefault(each, set()).add(name)
        if token_id in names:
            raise SpatialTokensError(f"token_id must stand for nothing else; {token_id} is the model's {min(names[token_id])}")
        starts = (each for each, of_it in names.items() if of_it == {"bos_token_id"} and each < rows)  # it is in no answer
        free = (each for each in range(rows - 1, -1, -1) if each not in names and each != token_id)
        self.text, self.id, self.stand_in = text, token_id, next(starts, next(free, 0))
        generator = torch.Generator().manual_seed(token_id)
        self.row = 0.02 * torch.randn(parts.text_hidden_size, generator=generator)  # unlike any token's, padding's zeros too

    @classmethod
    def of_images(cls, parts: ModelParts) -> ReservedToken:
        """The image's own token, in mode "image": nothing takes its place."""
        token = cls("", None, parts)
        token.id = parts.image_token_id
        return token

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids as the base sees them."""
        return ids.masked_fill(ids == self.id, self.stand_in)

    def never_generated(self, given: Any) -> Any:
        """The logits processors of a `generate` call, and one that rules this token out."""
        from transformers import LogitsProcessorList

        return LogitsProcessorList([*(given or []), _never()(self.id)])


@cache
def _never() -> Any:
    from transformers import LogitsProcessor

    class NeverGenerated(LogitsProcessor):
        """Rules one token out, where the logits have a column for it."""

        def __init__(self, token_id: int) -> None:
            self.token_id = token_id

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.token_id >= scores.shape[-1]:
                return scores
            return scores.index_fill(-1, torch.tensor([self.token_id], device=scores.device), -torch.inf)

    return NeverGenerated


def _named_ids(model: Any) -> Iterator[tuple[str, int]]:
    """The ids that a model's configs give a meaning, and its name."""
    configs = [model.config.to_dict()]
    if getattr(model, "generation_config", None) is not None:
        configs.append(model.generation_config.to_dict())
    while configs:
        for name, value in configs.pop().items():
            if isinstance(value, Mapping):
                configs.append(value)
            elif "token" in str(name) or str(name).endswith(("_id", "_ids")):
                yield from ((name, each) for each in (value if isinstance(value, (list, tuple)) else [value]) if type(each) is int)


class PromptStreamer:
    """A streamer that is given the prompt as the caller wrote it."""

    def __init__(self, streamer: Any, prompt: torch.Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: torch.Tensor) -> None:
        prompt, self.prompt = self.prompt, None  # type: ignore[assignment]
        self.streamer.put(prompt.to(value) if prompt is not None and prompt.shape == value.shape else value)

    def end(self) -> None:
        self.streamer.end()


def with_prompt(made: Any, hidden: torch.Tensor, prompt: torch.Tensor) -> Any:
    """What generate() returned, with the reserved token in the prompt again."""
    sequences = made if isinstance(made, torch.Tensor) else getattr(made, "sequences", None)
    if sequences is None or not len(prompt):
        return made
    rows, length = sequences.shape[0] // len(prompt), prompt.shape[1]
    if torch.equal(sequences[:, :length], hidden.repeat_interleave(rows, dim=0)):
        sequences[:, :length] = prompt.repeat_interleave(rows, dim=0)
    return made
