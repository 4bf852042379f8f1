"""Spatial tokens in Hugging Face vision-language models: attach them, use and train the model as usual, save them separately."""

from importlib import import_module
from typing import Any
from warnings import warn

from spatial_tokens.adapters.huggingface.api import attach, detach, insert_placeholders, insert_slots
from spatial_tokens.adapters.huggingface.collator import MaskPlaceholders
from spatial_tokens.adapters.huggingface.families import list_families
from spatial_tokens.adapters.huggingface.projector_replacement import replace_projector
from spatial_tokens.adapters.huggingface.saving import load_adapter, push_to_hub, save_adapter
from spatial_tokens.adapters.huggingface.summary import print_trainable_parameters
from spatial_tokens.adapters.huggingface.trainer import trainer_callback
from spatial_tokens.adapters.huggingface.training_warnings import PEFT_EXCLUDE_MODULES

__all__ = [
    "PEFT_EXCLUDE_MODULES",
    "MaskPlaceholders",
    "attach",
    "detach",
    "insert_placeholders",
    "insert_slots",
    "list_families",
    "load_adapter",
    "print_trainable_parameters",
    "push_to_hub",
    "replace_projector",
    "save_adapter",
    "trainer_callback",
]


def __getattr__(name: str) -> Any:
    if name in ("from_released", "llava_from_parts"):
        warn(f"{name} is in spatial_tokens.checkpoint now", FutureWarning, stacklevel=2)
        return getattr(import_module("spatial_tokens.checkpoint"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
