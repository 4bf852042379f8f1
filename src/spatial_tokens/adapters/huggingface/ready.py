"""Models that are ready to attach to: one of the hub, or a tiny one to try things on."""

from __future__ import annotations

from typing import Any

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.storage.hub import in_reach


def from_hub(name: str) -> tuple[Any, Any]:
    """A vision-language model of the hub, or of a folder, and its processor.

    Raises:
        SpatialTokensError: If it cannot be loaded.
    """
    transformers = _transformers()
    try:
        place = str(in_reach(name))
        model = transformers.AutoModelForImageTextToText.from_pretrained(place, dtype="auto")
        model.name_or_path = model.config._name_or_path = name  # not the cache's folder
        return model, transformers.AutoProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot load the model {name!r}: {reason(error)}") from error


def tiny_llava() -> tuple[Any, Any]:
    """A LLaVA-1.5 of random weights, narrow, with its 24 x 24 patches and a vocabulary of letters; and its processor."""
    transformers = _transformers()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    letters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
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


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers
