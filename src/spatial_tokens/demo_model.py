"""The same prompt to a vision-language model without and with spatial tokens: what the sequence gains, and what it costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens import visualize
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.anatomy import dissect
from spatial_tokens.adapters.huggingface.attach import ATTRIBUTE, attachment_of
from spatial_tokens.adapters.huggingface.attachment import Resize
from spatial_tokens.demo import read_picture
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

TINY = "tiny"
ANSWER = 32  # tokens


@dataclass(frozen=True)
class Run:
    """One of the two models: the sequence's length, the image's share of it, and the speed of an answer."""

    model: str
    sequence: int
    image_tokens: int
    spatial_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class ModelReport:
    """What a model demo found.

    Args:
        name: The model.
        runs: Without and with spatial tokens.
        positions: Where the spatial tokens lie in the sequence.
        logits_change: How far the next token's logits moved, relative to their norm.
        parameters: Those that the spatial tokens added.
    """

    name: str
    runs: list[Run]
    positions: list[int]
    logits_change: float
    parameters: int


def run_model_demo(name: str, image: str | None, *, prompt: str, preset: str, seed: int) -> ModelReport:
    """Asks a model the same about a picture without and with (random) spatial tokens.

    Args:
        name: A model of the hub, or "tiny": a LLaVA-1.5 of random weights, narrow but with its 24 x 24 patches.
        image: A picture's path; None for one that the demo draws.
        prompt: The question.
        preset: The projector's preset; its widths and grid are fitted to the model.
        seed: Of the random weights.

    Raises:
        SpatialTokensError: If picture, model or preset cannot be had, or spatial tokens cannot be attached to the model.
    """
    picture = visualize.sample_picture() if image is None else read_picture(image)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        model, processor = tiny_llava() if name == TINY else _from_hub(name)
        model.eval()
        before, logits, _ = _ask(model, processor, picture, prompt, "without")
        narrow: dict[str, Any] = {"spatial_hidden_size": 64} if name == TINY else {}
        resize: Resize | None = "pool" if dissect(model).grid_size is None else None
        model, processor = attach(model, processor, preset, resize=resize, **narrow)
        after, changed, ids = _ask(model, processor, picture, prompt, "with")
        added = sum(parameter.numel() for parameter in model.spatial_tokens.parameters())
    attachment = attachment_of(model)
    change = (changed[: len(logits)] - logits).norm() / logits.norm()
    positions = (ids == attachment.token_id).nonzero().flatten().tolist()
    return ModelReport(name, [before, after], positions, float(change), added)


def _ask(model: Any, processor: Any, picture: Image, prompt: str, label: str) -> tuple[Run, torch.Tensor, torch.Tensor]:
    """How one model fares; the next token's logits, and the sequence."""
    inputs: Mapping[str, Any] = processor(images=picture, text=_text(processor, prompt), return_tensors="pt").to(model.device)
    logits = model(**inputs).logits[0, -1].float()
    start = time.perf_counter()
    made = model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    ids = inputs["input_ids"][0]
    image_tokens = int((ids == dissect(model).image_token_id).sum())
    attachment = getattr(model, ATTRIBUTE, None)
    spatial = 0 if attachment is None else int((ids == attachment.token_id).sum())
    num_made = made.shape[1] - len(ids) if made.shape[1] > len(ids) else made.shape[1]
    return Run(label, len(ids), image_tokens, spatial, num_made / seconds), logits, ids


def _text(processor: Any, prompt: str) -> str:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    placeholder = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>")
    return f"{placeholder} {prompt}"


def _from_hub(name: str) -> tuple[Any, Any]:
    transformers = _transformers()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        return model, transformers.AutoProcessor.from_pretrained(name)
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
