"""The state of one call of a model. Each thread has its own, so concurrent calls do not interfere."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from spatial_tokens.adapters.huggingface.layouts import Maps


@dataclass(frozen=True)
class Features:
    """What `get_image_features` was seen to encode.

    Args:
        maps: Each image's or tile's patches, `(H, W, C)`.
        tile_length: The image tokens that one of them became.
    """

    maps: Maps
    tile_length: int


class Recording:
    """The inputs of the model's projector during one call of `get_image_features`, and the number of tokens that it returned."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.num_tokens = 0


class Call:
    """One call of the base model, or of `generate`.

    Args:
        generate: The call of `generate` that it is a step of.
        generating: Whether it is a call of `generate` itself.
    """

    def __init__(self, generate: Call | None = None, *, generating: bool = False) -> None:
        self.generating, self.generate = generating, self if generating else generate
        self.input_ids: torch.Tensor | None = None
        self.placeholders: torch.Tensor | None = None  # (B, L); of generate: those of the prompt, on the CPU
        self.start = 0  # of generate: how many tokens a cache held before those of the prompt
        self.features: Features | None = None
        self.filled = False  # whether spatial tokens have been made; of generate: or there is nothing left of the prompt to fill

    def part_of_prompt(self, batch: int, seen: int, length: int) -> torch.Tensor:
        """Where the prompt of `generate` has placeholders, among the `(batch, length)` tokens after those that a cache has seen.

        What comes after the prompt has none; rows are repeated for beams and samples.
        """
        prompt: Any = self.placeholders
        first = seen - self.start
        part = functional.pad(prompt, (0, max(0, first + length - prompt.shape[1])))[:, first : first + length]
        return part.repeat_interleave(batch // prompt.shape[0], dim=0)


class Current:
    """What one thread is doing."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.recording: Recording | None = None
        self.in_video = False
        self.saving_base = False
        self.marked: torch.Tensor | None = None  # placeholders among ids that the caller embeds


class PerThread(threading.local):
    """A `Current` for each thread. torch.compile traces changes of such an object, but not those of a thread-local's own fields."""

    def __init__(self) -> None:
        self.current = Current()

    def __reduce__(self) -> Any:
        return PerThread, ()


def length_of(cache: Any) -> int:
    """The tokens that a cache has seen."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_ids(value: Any, dimensions: int | None = 2) -> bool:
    """Whether a value is a tensor of token ids."""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and value.dtype != torch.bool
        and dimensions in (None, value.ndim)
    )
