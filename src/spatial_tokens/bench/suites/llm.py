"""Table 2: tokens a second of LLaVA-1.5, encoder, prefill and decode, without and with spatial tokens.

transformers' LlavaForConditionalGeneration with random weights, spatial tokens attached as anyone would attach them. Where the 7B
model is too much for the device, a smaller one of the same shape takes its place, and the subject says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch

from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.machine import free_memory
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.bench.suites.kernels import TOLERANCE, activations, verified
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import MissingExtraError

WITHOUT = "LLaVA-1.5"
PATCH_SIZE = 14


@dataclass(frozen=True)
class Model:
    """Sizes of LLaVA's language model (Llama) and of its encoder (CLIP), and the prompt and answer that it is timed on."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    prompt: int = 60  # not 64: oneDNN's bfloat16 product takes 1.5 times as long on 646 rows as on any number near it
    answer: int = 128
    vocabulary: int = 32064
    num_vision_layers: int = 24

    @property
    def num_parameters(self) -> int:
        """About, of the language model: attention and feed-forward of each layer, and the embeddings."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + 2 * self.vocabulary * self.hidden_size


MODELS = (
    Model("7B", 4096, 11008, 32, 32),
    Model("1.3B (7B does not fit)", 2048, 5504, 24, 16),
    Model("0.1B (7B does not fit)", 768, 2048, 12, 12, num_vision_layers=12),
)
CPU_ANSWER = 32  # tokens: enough to see, and what one waits for


def comparisons(options: Options) -> Iterator[Comparison]:
    """One comparison: without, with cropping, with pooling."""
    dtype = options.dtypes[-1]
    model = fitting(options, dtype)
    if options.device.type == "cpu":
        model = replace(model, answer=min(model.answer, CPU_ANSWER))
    for batch in options.batches_or(cpu=(1,), cuda=(1,)):
        yield comparison(options, model, dtype, batch)


def comparison(options: Options, model: Model, dtype: str, batch: int) -> Comparison:
    """The model without, with cropping, with pooling: the same weights, pictures, prompt and length of answer."""
    config = replace(options.config, text_hidden_size=model.hidden_size)
    llava = cache(partial(_llava, model, config, options.device, DTYPES[dtype]))  # built for the first candidate
    attached: dict[str, SPProjectorConfig | None] = {
        WITHOUT: None,
        "SP cropping + DFI": replace(config, variant="cropping"),
        "SP pooling + DFI": replace(config, variant="pooling"),
    }
    candidates = {name: partial(_candidate, options, model, dtype, batch, llava, each) for name, each in attached.items()}
    return Comparison(
        "llm", f"LLaVA-1.5 {model.name}", {"dtype": dtype, "batch": batch, "prompt": model.prompt, "answer": model.answer},
        candidates, baseline=WITHOUT, memory=_memory(options, model, dtype) + activations(config, batch, DTYPES[dtype]),
    )  # fmt: skip


def fitting(options: Options, dtype: str) -> Model:
    """The largest model that the device holds."""
    free = free_memory(options.device)
    if free is None:
        return MODELS[-1]
    return next((model for model in MODELS if _memory(options, model, dtype) < free), MODELS[-1])


def _memory(options: Options, model: Model, dtype: str) -> int:
    config = replace(options.config, text_hidden_size=model.hidden_size)
    encoder = 12 * model.num_vision_layers * config.vision_hidden_size**2
    return int(1.1 * (model.num_parameters + encoder + 2 * config.num_parameters) * DTYPES[dtype].itemsize) + 2**29


def _llava(model: Model, config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from transformers import LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    width = config.vision_hidden_size
    vision = {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width, "patch_size": PATCH_SIZE,
        "num_hidden_layers": model.num_vision_layers, "num_attention_heads": max(1, width // 64), "image_size": _side(config),
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_heads,
        "vocab_size": model.vocabulary, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": model.vocabulary - 2}
            llava: Any = LlavaForConditionalGeneration(LlavaConfig(**parts))
    finally:
        torch.set_default_dtype(before)
    return llava.eval()


def _side(config: SPProjectorConfig) -> int:
    """Pixels of the square picture that gives the config's grid."""
    return PATCH_SIZE * config.grid_size[0]


def _candidate(
    options: Options, model: Model, dtype: str, batch: int, shared: Callable[[], Any], config: SPProjectorConfig | None
) -> Candidate:
    llava = shared()
    num_patches, side = options.config.num_patches, _side(options.config)
    image = torch.full((batch, num_patches), llava.config.image_token_id)
    prompt = torch.randint(1, model.vocabulary - 2, (batch, model.prompt))
    inputs = {"input_ids": torch.cat([image, prompt], dim=1)}
    if config is not None:
        from spatial_tokens.adapters.huggingface import attach, insert_placeholders

        llava, _ = attach(_same_weights(llava), projector=config)
        inputs = insert_placeholders(llava, inputs)
        with torch.inference_mode():
            features = options.features(batch, DTYPES[dtype])
            verified(lambda: llava.spatial_tokens(features), llava.spatial_tokens, TOLERANCE[dtype])
    inputs = {name: each.to(options.device) for name, each in inputs.items()}
    pixels = torch.randn(batch, 3, side, side, device=options.device).to(DTYPES[dtype])
    inputs.update(pixel_values=pixels, attention_mask=torch.ones_like(inputs["input_ids"]))
    length = inputs["input_ids"].shape[1]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        answer: torch.Tensor = llava.generate(
            **inputs, max_new_tokens=model.answer, min_new_tokens=model.answer, do_sample=False
        )[:, length:]  # fmt: skip
        if answer.shape != (batch, model.answer):
            raise RuntimeError(f"the model gave {tuple(answer.shape)} tokens for ({batch}, {model.answer})")
        return answer

    return Candidate(
        run,
        values={"image_tokens": length - model.prompt},
        finish=lambda seconds: {"tokens_per_s": batch * model.answer / seconds},
    )


def _same_weights(model: Any) -> Any:
    """A model of its own with the same parameters, so that what is attached to it leaves the other as it was."""
    return copy.deepcopy(model, {id(each): each for each in chain(model.parameters(), model.buffers())})
