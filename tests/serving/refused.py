"""Tiny bases of the families that the plugin refuses, each with its processor; they go into `BASES` beside the others."""

from __future__ import annotations

from typing import Any

import transformers

from tests.serving.bases import QWEN, TEXT, VISION, letters, qwen, register

DIFFERENT = ("cohere_compass", "gemma3", "paligemma", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe")
# What the backend itself does not start, without spatial tokens too, and the error that it gives.
NOT_RUN = {"gemma4": "Unable to get max input length"}

GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False, **VISION}
DEEPSTACK = {"depth": 3, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


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


@register("PaliGemmaForConditionalGeneration", "<image>")
def paligemma() -> tuple[Any, Any]:
    tokenizer = letters({"image_token": "<image>"})
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)  # which adds tokens of its own
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": len(tokenizer), **TEXT}, vision_config={**SIGLIP, "projection_dim": 64},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=64, hidden_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("Qwen3VLForConditionalGeneration", "".join(QWEN))
def qwen3_vl() -> tuple[Any, Any]:
    return deepstack("Qwen3VL")


@register("Qwen3VLMoeForConditionalGeneration", "".join(QWEN))
def qwen3_vl_moe() -> tuple[Any, Any]:
    config, processor = deepstack("Qwen3VLMoe")
    config.text_config.update(EXPERTS)
    return config, processor


@register("Qwen3OmniMoeThinkerForConditionalGeneration", "<|vision_start|><|image_pad|><|vision_end|>")
def qwen3_omni_moe_thinker() -> tuple[Any, Any]:
    named = {
        "image_token": QWEN[1], "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>", "vision_bos_token": QWEN[0],
        "vision_eos_token": QWEN[2], "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
    }  # fmt: skip
    tokenizer = letters(named)
    sizes = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 96}, "patch_size": 8, "merge_size": 2}
    processor = transformers.Qwen3OmniMoeProcessor(
        transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes),
        transformers.WhisperFeatureExtractor(feature_size=16), tokenizer,
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), **EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        audio_config={
            "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 16,
            "output_dim": 64, "downsample_hidden_size": 8,
        },
        vision_config={
            **DEEPSTACK, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2,
            "num_position_embeddings": 64,
        },
        image_token_id=ids["image_token"], video_token_id=ids["video_token"], audio_token_id=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("CohereCompassForConditionalGeneration", "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>")
def cohere_compass() -> tuple[Any, Any]:
    names = ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
    tokenizer = letters(dict(zip(("image_token", "video_token", "vision_bos_token", "vision_eos_token"), names, strict=True)))
    image, video, start, end = map(tokenizer.convert_tokens_to_ids, names)
    sizes = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 96}, "patch_size": 8, "merge_size": 2}
    processor = transformers.CohereCompassProcessor(
        transformers.CohereCompassImageProcessor(**sizes), tokenizer, transformers.CohereCompassVideoProcessor(**sizes)
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = transformers.CohereCompassConfig(
        text_config={
            **TEXT, **SLIDING, "vocab_size": len(tokenizer), "rope_parameters": dict.fromkeys(SLIDING["layer_types"], rope)
        },
        vision_config={
            **DEEPSTACK, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2,
            "num_position_embeddings": 64,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


def deepstack(name: str) -> tuple[Any, Any]:
    """A family of Qwen3-VL's vision encoder."""
    images, videos = transformers.Qwen2VLImageProcessor, transformers.Qwen3VLVideoProcessor
    config, processor = qwen(name, images, videos, **DEEPSTACK, num_position_embeddings=64)
    config.text_config.vocab_size = len(processor.tokenizer)  # no row to spare: here it would win
    return config, processor
