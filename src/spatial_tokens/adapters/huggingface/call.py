"""What one call of a model knows. Each thread has its own, so that calls of several threads do not meet."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

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
        outer: The `generate` that it is part of.
        generating: Whether it is a call of `generate`.
    """

    def __init__(self, outer: Call | None = None, *, generating: bool = False) -> None:
        self.outer, self.generating = outer, generating
        self.input_ids: torch.Tensor | None = None
        self.placeholders: torch.Tensor | None = None  # (B, L); of generate: those of the prompt, on the CPU
        self.features: Features | None = None
        self.filled = False  # whether spatial tokens have been made; of generate: or there is nothing left of the prompt to fill


class Current:
    """What one thread is doing."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.recording: Recording | None = None
        self.in_video = False
        self.marked: torch.Tensor | None = None  # placeholders among ids that the caller embeds


class PerThread(threading.local):
    """A `Current` for each thread. torch.compile traces changes of such an object, but not those of a thread-local's own fields."""

    def __init__(self) -> None:
        self.current = Current()

    def __reduce__(self) -> Any:
        return PerThread, ()
