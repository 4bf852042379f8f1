"""Other code's checkpoints: the released LLaVA-SP projectors, both ways, and whole released folders as Hugging Face models."""

from spatial_tokens.checkpoint.build_llava import llava_from_parts
from spatial_tokens.checkpoint.llava_sp import from_llava_sp, to_llava_sp
from spatial_tokens.checkpoint.released_folder import convert_released, from_released

__all__ = ["convert_released", "from_llava_sp", "from_released", "llava_from_parts", "to_llava_sp"]
