"""Models that are ready to attach to: one of the hub, a small trained one, or tiny ones of random weights to try things on."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spatial_tokens.adapters.huggingface.quiet import quiet_transformers
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.storage.hub import name_or_cached_folder

TRAINED = Path(__file__).with_name("trained")  # base, adapter, and what is known of them
TRAINED_ADAPTER = TRAINED / "adapter"


def from_hub(name: str, **options: Any) -> tuple[Any, Any]:
    """A vision-language model of the hub, or of a folder, and its processor.

    Args:
        name: "owner/name", or a folder.
        **options: For the model's `from_pretrained`; its dtype is the file's unless given.

    Raises:
        SpatialTokensError: If it cannot be loaded.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    import_module("spatial_tokens.adapters.huggingface.rolled_vit")  # registers the vision tower of the trained model
    try:
        place = str(name_or_cached_folder(name))
        model = transformers.AutoModelForImageTextToText.from_pretrained(place, **{"dtype": "auto", **options})
        model.name_or_path = model.config._name_or_path = name  # not the cache's folder
        return model, transformers.AutoProcessor.from_pretrained(place)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot load the model {name!r}: {reason(error)}") from error


def trained_llava(folder: Path = TRAINED, **options: Any) -> tuple[Any, Any]:
    """A small trained LLaVA that answers questions about scenes of colored shapes, without its spatial tokens; and its processor.

    It is the model of `spatial-tokens demo`. `load_adapter(model, TRAINED_ADAPTER, processor)` adds the six spatial tokens it was
    trained with. Its encoder's features give wrong places, so it needs them to say where things are. It reads images of 96 x 96
    pixels and the words of `benchmarks/spatial_vqa`, whose `demo_model.py` trains it.

    Args:
        folder: Where its files are.
        **options: For `from_pretrained`.

    Returns:
        The model, in float32 unless `dtype` is given, and its processor.

    Raises:
        MissingExtraError: If transformers is not installed.
        SpatialTokensError: If it cannot be loaded.
    """
    with quiet_transformers():
        model, processor = from_hub(str(folder / "base"), **{"dtype": torch.float32, **options})
    return model.eval(), processor


def tiny_llava() -> tuple[Any, Any]:
    """A LLaVA-1.5 of random weights, narrow, with its 24 x 24 patches and a vocabulary of letters; and its processor."""
    with quiet_transformers() as transformers:
        tokenizer = _letters(transformers, {"image_token": "<image>"})
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
            tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **small},
            text_config={"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 2048, **small},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
        return transformers.LlavaForConditionalGeneration(config), processor


def tiny_qwen_vl() -> tuple[Any, Any]:
    """A Qwen2.5-VL of random weights, narrow, for images of any size and with a vocabulary of letters; and its processor."""
    named = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
    }  # fmt: skip
    with quiet_transformers() as transformers:
        tokenizer = _letters(transformers, named, "\n")
        processor = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096),
            tokenizer, transformers.Qwen2VLVideoProcessor(patch_size=4), chat_template=_QWEN_CHAT,
        )  # fmt: skip
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
        text = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        }  # fmt: skip
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
            "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=ids["image_token"], video_token_id=ids["video_token"],
            vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        )  # fmt: skip
        return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


# Qwen2.5-VL's own template, for one image and text.
_QWEN_CHAT = (
    "{% for message in messages %}{{ message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


def _letters(transformers: Any, named: dict[str, str], more: str = "") -> Any:
    """A tokenizer of single letters (ASCII, and more of them), with a model's own special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127)), *more]
    letters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(f".|[{more}]" if more else "."), "isolated")
    letters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=named,
    )  # fmt: skip
