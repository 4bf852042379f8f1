"""The same prompt to a vision-language model without and with spatial tokens: what the sequence gains, and what it costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens import visualize
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.api import ATTRIBUTE, attachment_of
from spatial_tokens.adapters.huggingface.maps_to_tokens import Resize
from spatial_tokens.adapters.huggingface.model_parts import find_parts
from spatial_tokens.adapters.huggingface.processing import TOKEN
from spatial_tokens.adapters.huggingface.prompts import as_prompt
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_llava
from spatial_tokens.checks import check_seed
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.pictures import read_picture

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
        SpatialTokensError: If picture, model or preset cannot be read, the tokens cannot be attached to the model, or the prompt
            contains a special token such as an image's placeholder.
    """
    check_seed(seed)
    picture = visualize.sample_picture() if image is None else read_picture(image)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        model, processor = tiny_llava() if name == TINY else from_hub(name)
        model.eval()
        _check_prompt(processor, prompt)
        before, logits, _ = _ask(model, processor, picture, prompt, "without")
        narrow: dict[str, Any] = {"spatial_hidden_size": 64} if name == TINY else {}
        resize: Resize | None = "pool" if find_parts(model).grid_size is None else None
        model, processor = attach(model, processor, preset, resize=resize, **narrow)
        after, changed, ids = _ask(model, processor, picture, prompt, "with")
        added = sum(parameter.numel() for parameter in model.spatial_tokens.parameters())
    attachment = attachment_of(model)
    change = (changed[: len(logits)] - logits).norm() / logits.norm()
    positions = (ids == attachment.token_id).nonzero().flatten().tolist()
    return ModelReport(name, [before, after], positions, float(change), added)


def _ask(model: Any, processor: Any, picture: Image, prompt: str, label: str) -> tuple[Run, torch.Tensor, torch.Tensor]:
    """How one model fares; the next token's logits, and the sequence."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    inputs: Mapping[str, Any] = processor(images=picture, text=as_prompt(processor, [question]), return_tensors="pt").to(
        model.device
    )
    logits = model(**inputs).logits[0, -1].float()
    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)  # what is only slow the first time
    start = time.perf_counter()
    made = model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    ids = inputs["input_ids"][0]
    image_tokens = int((ids == find_parts(model).image_token_id).sum())
    attachment = getattr(model, ATTRIBUTE, None)
    spatial = 0 if attachment is None else int((ids == attachment.token_id).sum())
    num_made = made.shape[1] - len(ids) if made.shape[1] > len(ids) else made.shape[1]
    return Run(label, len(ids), image_tokens, spatial, num_made / seconds), logits, ids


def _check_prompt(processor: Any, prompt: str) -> None:
    """Raises SpatialTokensError if a prompt contains a special token, such as the placeholder of an image."""
    added = getattr(processor.tokenizer, "added_tokens_decoder", {}).values()
    placeholders = [getattr(processor, name, None) for name in ("image_token", "boi_token", "video_token", "audio_token")]
    for token in [TOKEN, *processor.tokenizer.all_special_tokens, *(each.content for each in added if each.special), *placeholders]:
        if token and token in prompt:
            raise SpatialTokensError(f"the prompt must not contain the special token {token!r}, got {shown(prompt)}; leave it out")
