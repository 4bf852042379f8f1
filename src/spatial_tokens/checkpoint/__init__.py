"""Checkpoints of other code: the released LLaVA-SP weights, in and out."""

from spatial_tokens.checkpoint.llava_sp import from_llava_sp, to_llava_sp

__all__ = ["from_llava_sp", "to_llava_sp"]
