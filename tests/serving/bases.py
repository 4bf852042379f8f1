"""Tiny bases of several families on disk, each with its processor and adapters.

Heads are of 32, the smallest that vLLM's attention takes on a CPU. Weights are larger than usual, so that answers depend on the
pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from spatial_tokens.adapters.huggingface import attach, save_adapter
from spatial_tokens.adapters.huggingface.api import attachment_of

TEXT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Base:
    """A family's tiny base.

    Args:
        build: Its config, and its processor.
        model: The name of its class.
        image: What stands for an image in a prompt.
        attach: What `attach` is told.
    """

    build: Callable[[], tuple[Any, Any]]
    model: str
    image: str
    attach: dict[str, Any] = field(default_factory=dict)


BASES: dict[str, Base] = {}


def register(model: str, image: str, **options: Any) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
    """Puts a family into `BASES`, under its function's name."""

    def put(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        BASES[build.__name__] = Base(build, model, image, options)
        return build

    return put


def write(name: str, folder: Path) -> None:
    """Writes a base into `folder/base`."""
    base = BASES[name]
    config, processor = base.build()
    torch.manual_seed(0)
    model = getattr(transformers, base.model)(config).eval()
    with torch.no_grad():
        for path, each in model.named_parameters():
            if "language_model" in path or "lm_head" in path:
                continue
            if each.abs().max() < 1e-3 and "bias" not in path:
                each.normal_(std=0.05)
            elif each.ndim > 1:
                each.mul_(4)
        spare = len(processor.tokenizer)  # the reserved token has a row where the vocabulary is larger: it must not win
        model.lm_head.weight[spare : spare + 1].mul_(20)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")


def write_adapter(name: str, folder: Path, to: str, train: str | None = None, preset: str | None = None, **options: Any) -> None:
    """Writes an adapter of the base in `folder/base` into `folder/to`; with a module of the base that "trained" with it.

    A preset is taken as it is, without what `attach` is told of the family.
    """
    base = BASES[name]
    model = getattr(transformers, base.model).from_pretrained(folder / "base")
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    options = {"spatial_hidden_size": 16, **({} if preset else base.attach), **options}
    attach(model, processor, preset or "llava-sp-cropping", **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.spatial_tokens.parameters():
            if each.ndim > 1:
                each.normal_(std=0.4)
        if train is not None:
            for each in model.get_submodule(train).parameters():
                each.mul_(1.5)
            attachment_of(model).modules_to_save.append(train)
    save_adapter(model, folder / to)


def quantize(base: Path) -> None:
    """Makes the language model's layers int8, as compressed-tensors writes them: a scale for each row, activations by token."""
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "language_model" in name and name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))


def letters(named: dict[str, str], others: Sequence[str] = ()) -> Any:
    """A tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    found = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=named
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(others)}, replace_extra_special_tokens=False)
    return tokenizer


SMALL_KERNELS = {"kernel_sizes": [2, 4], "detail_kernel_size": 2}  # of 4 x 4 patches
ANY_SIZE = {"grid_size": (4, 4), "resize": "pool", **SMALL_KERNELS}


@register("LlavaForConditionalGeneration", "<image>")
def llava() -> tuple[Any, Any]:
    return llava_with({"model_type": "llama"})


@register("LlavaForConditionalGeneration", "<image>")
def llava_mixtral() -> tuple[Any, Any]:
    return llava_with({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})


def llava_with(text: dict[str, Any]) -> tuple[Any, Any]:
    """A LLaVA of this language model."""
    tokenizer = letters({"image_token": "<image>"})
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **VISION, "num_hidden_layers": 3
        },
        text_config={**text, "vocab_size": len(tokenizer), **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("LlavaNextForConditionalGeneration", "<image>", **SMALL_KERNELS)
def llava_next() -> tuple[Any, Any]:
    tokenizer, pinpoints = letters({"image_token": "<image>"}), [[32, 64], [64, 32], [64, 64]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **VISION, "num_hidden_layers": 3},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints, tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("InternVLForConditionalGeneration", "<IMG_CONTEXT>", **SMALL_KERNELS)
def internvl() -> tuple[Any, Any]:
    tokenizer = letters(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.InternVLProcessor(images, tokenizer, transformers.InternVLVideoProcessor(), image_seq_length=16)
    config = transformers.InternVLConfig(
        vision_config={"image_size": [64, 64], "patch_size": [8, 8], **VISION},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def qwen(name: str, images: Any, videos: Any, **tower: Any) -> tuple[Any, Any]:
    tokenizer = letters(
        {"image_token": QWEN[1], "video_token": "<|video_pad|>", "vision_bos_token": QWEN[0], "vision_eos_token": QWEN[2]}
    )
    start, image, end, video = map(tokenizer.convert_tokens_to_ids, (*QWEN, "<|video_pad|>"))
    sizes = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 96}, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2
    }  # fmt: skip
    processor = getattr(transformers, f"{name}Processor")(images(**sizes), tokenizer, videos(**sizes))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    shared = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "vocab_size": len(tokenizer) + 5, "rope_parameters": rope}, vision_config={**shared, **tower},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("Qwen2VLForConditionalGeneration", "".join(QWEN), **ANY_SIZE)
def qwen2_vl() -> tuple[Any, Any]:
    tower = {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    return qwen("Qwen2VL", transformers.Qwen2VLImageProcessor, transformers.Qwen2VLVideoProcessor, **tower)


@register("Qwen2_5_VLForConditionalGeneration", "".join(QWEN), **ANY_SIZE)
def qwen2_5_vl() -> tuple[Any, Any]:
    tower = {
        "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]
    }  # fmt: skip
    return qwen("Qwen2_5_VL", transformers.Qwen2VLImageProcessor, transformers.Qwen2VLVideoProcessor, **tower)


@register("Mistral3ForConditionalGeneration", "[IMG]", **ANY_SIZE)
def mistral3() -> tuple[Any, Any]:
    tokenizer = letters({"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"})
    images = transformers.PixtralImageProcessor(size={"longest_edge": 96}, patch_size={"height": 8, "width": 8})
    processor = transformers.PixtralProcessor(
        images, tokenizer, patch_size=8, spatial_merge_size=2, image_token="[IMG]", image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )  # fmt: skip
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **TEXT},
        vision_config={"model_type": "pixtral", "image_size": 96, "patch_size": 8, "head_dim": 32, **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


@register("Idefics3ForConditionalGeneration", "<image>", **SMALL_KERNELS)
def idefics3() -> tuple[Any, Any]:
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer = letters(
        {"image_token": "<image>", "fake": "<fake_token_around_image>", "glob": "<global-img>", "end": "<end_of_utterance>"}, rows
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={"image_size": 32, "patch_size": 8, **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor
