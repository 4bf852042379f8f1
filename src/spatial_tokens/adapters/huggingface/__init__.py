"""Spatial tokens in any Hugging Face vision-language model: `attach` them, use and train the model as ever, save them beside it."""

from spatial_tokens.adapters.huggingface.api import attach, detach, insert_placeholders, insert_slots
from spatial_tokens.adapters.huggingface.assembly import llava_from_parts
from spatial_tokens.adapters.huggingface.collator import MaskPlaceholders
from spatial_tokens.adapters.huggingface.released import from_released
from spatial_tokens.adapters.huggingface.replace_projector import replace_projector
from spatial_tokens.adapters.huggingface.saving import load_adapter, push_to_hub, save_adapter
from spatial_tokens.adapters.huggingface.trainer import trainer_callback
from spatial_tokens.adapters.huggingface.training_warnings import PEFT_EXCLUDE_MODULES

__all__ = [
    "PEFT_EXCLUDE_MODULES",
    "MaskPlaceholders",
    "attach",
    "detach",
    "from_released",
    "insert_placeholders",
    "insert_slots",
    "llava_from_parts",
    "load_adapter",
    "push_to_hub",
    "replace_projector",
    "save_adapter",
    "trainer_callback",
]
