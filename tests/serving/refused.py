"""Tiny bases of families that the plugin refuses, each with its processor; they go into `BASES` beside the others."""

from __future__ import annotations

from typing import Any

import transformers

from tests.serving.bases import QWEN, TEXT, VISION, letters, qwen, register

# One for each reason. Of the others, tiny models of qwen3_vl_moe and cohere_compass (with a `logit_scale`, without which vLLM
# fails) differed in a trial; of qwen3_omni_moe_thinker vLLM wants a `_get_num_multimodal_tokens` that its processor lacks;
# paligemma's prompts lack in vLLM what its processor adds, so that answers cannot be compared; shieldgemma2's tiny model is not
# loaded as it was saved; cosmos3_omni was not run.
DIFFERENT = ("gemma3", "qwen3_vl")
# What the backend does not start, without spatial tokens too, and the error that it gives.
NOT_RUN = {"gemma4": "Unable to get max input length"}

GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False, **VISION}
DEEPSTACK = {"depth": 3, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}


@register("Gemma3ForConditionalGeneration", GEMMA["boi_token"])
def gemma3() -> tuple[Any, Any]:
    tokenizer = letters(GEMMA)
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    config = transformers.Gemma3Config(
        text_config={"vocab_size": len(tokenizer), "query_pre_attn_scalar": 32, **SLIDING, **TEXT},
        vision_config=SIGLIP, mm_tokens_per_image=4, initializer_range=0.15, tie_word_embeddings=False,
        **{f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA.items()},
    )  # fmt: skip
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


@register("Gemma4ForConditionalGeneration", "<|image|>")
def gemma4() -> tuple[Any, Any]:
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    sound = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer, sizes = letters(named | sound, ["<|video|>"]), {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(**sizes), tokenizer,
        transformers.Gemma4VideoProcessor(**sizes),
    )  # fmt: skip
    config = transformers.Gemma4Config(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), **SLIDING, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "global_head_dim": 32, "num_global_key_value_heads": 2, "vocab_size_per_layer_input": len(tokenizer),
        },
        vision_config={
            **VISION, "num_key_value_heads": 2, "head_dim": 32, "patch_size": 8, "pooling_kernel_size": 2,
            "position_embedding_size": 128, "default_output_length": 70,
        },
        audio_config=None, tie_word_embeddings=False,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()},
    )  # fmt: skip
    return config, processor


@register("Qwen3VLForConditionalGeneration", "".join(QWEN))
def qwen3_vl() -> tuple[Any, Any]:
    images, videos = transformers.Qwen2VLImageProcessor, transformers.Qwen3VLVideoProcessor
    config, processor = qwen("Qwen3VL", images, videos, **DEEPSTACK, num_position_embeddings=64)
    config.text_config.vocab_size = len(processor.tokenizer)  # no row to spare: here it would win
    return config, processor
