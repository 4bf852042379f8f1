"""Conversations as the text that a processor reads: by its chat template, or, where it has none, its placeholders and the words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def as_prompt(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The text of messages whose contents are lists of images and texts, up to where the model answers."""
    if getattr(processor, "chat_template", None):
        text: str = processor.apply_chat_template(list(messages), add_generation_prompt=True)
        return text
    placeholder = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>"))
    parts = [part for message in messages for part in message["content"]]
    return " ".join(placeholder if part["type"] == "image" else str(part["text"]) for part in parts)
