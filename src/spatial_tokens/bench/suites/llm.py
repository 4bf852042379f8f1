"""Table 2: tokens a second of a LLaVA-1.5-shaped model, prefill and decode, without and with spatial tokens.

The language model is transformers' Llama with random weights; image tokens and prompt go in as embeddings, as in LLaVA. Where the
7B model is too much for the device, a smaller one of the same shape takes its place, and the subject says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from spatial_tokens.bench.contest import Contest, Entry
from spatial_tokens.bench.machine import free_memory
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.bench.suites.kernels import TOLERANCE, activations, verified
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import MissingExtraError
from spatial_tokens.modules import MLPHead, SPProjector

WITHOUT = "LLaVA-1.5"


@dataclass(frozen=True)
class Model:
    """A Llama's sizes, and the prompt and answer that it is timed on."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    prompt: int = 64
    answer: int = 128
    vocabulary: int = 32000

    @property
    def num_parameters(self) -> int:
        """About: attention and feed-forward of each layer, and the embeddings."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + 2 * self.vocabulary * self.hidden_size


MODELS = (
    Model("7B", 4096, 11008, 32, 32),
    Model("1.3B (7B does not fit)", 2048, 5504, 24, 16),
    Model("0.1B (7B scaled down)", 768, 2048, 12, 12, answer=32),
)


def contests(options: Options) -> Iterator[Contest]:
    """One contest: without, with cropping, with pooling."""
    dtype = options.dtypes[-1]
    model = fitting(options, dtype)
    for batch in options.batches_or(cpu=(1,), cuda=(1,)):
        yield contest(options, model, dtype, batch)


def contest(options: Options, model: Model, dtype: str, batch: int) -> Contest:
    """The model without, with cropping, with pooling: the same encoder features, prompt and length of answer."""
    config = replace(options.config, text_hidden_size=model.hidden_size)
    place: dict[str, Any] = {"device": options.device, "dtype": DTYPES[dtype]}
    llama = cache(partial(_llama, model, **place))  # made when the first entry is, gone with the contest
    projectors: dict[str, Callable[[], nn.Module]] = {
        WITHOUT: partial(_mlp, config, place),
        "SP cropping + DFI": partial(_sp, replace(config, variant="cropping"), place),
        "SP pooling + DFI": partial(_sp, replace(config, variant="pooling"), place),
    }
    entries = {name: partial(_entry, options, model, dtype, batch, llama, build) for name, build in projectors.items()}
    return Contest(
        "llm", f"Llama {model.name}", {"dtype": dtype, "batch": batch, "prompt": model.prompt, "answer": model.answer},
        entries, baseline=WITHOUT, memory=_memory(options, model, dtype) + activations(config, batch, DTYPES[dtype]),
    )  # fmt: skip


def fitting(options: Options, dtype: str) -> Model:
    """The largest model that the device holds; on a CPU the smallest, which a benchmark can wait for."""
    free = free_memory(options.device)
    if options.device.type == "cpu" or free is None:
        return MODELS[-1]
    return next((model for model in MODELS if _memory(options, model, dtype) < free), MODELS[-1])


def _memory(options: Options, model: Model, dtype: str) -> int:
    projectors = 2 * replace(options.config, text_hidden_size=model.hidden_size).num_parameters
    return int(1.15 * (model.num_parameters + projectors) * DTYPES[dtype].itemsize) + 2**29


def _mlp(config: SPProjectorConfig, place: Any) -> nn.Module:
    return MLPHead(config.vision_hidden_size, config.text_hidden_size, **place)


def _sp(config: SPProjectorConfig, place: Any) -> nn.Module:
    return SPProjector.from_config(config, **place)


def _llama(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    config = LlamaConfig(
        hidden_size=model.hidden_size, intermediate_size=model.intermediate_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_heads, vocab_size=model.vocabulary,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            llama: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return llama.eval()


def _entry(
    options: Options, model: Model, dtype: str, batch: int, shared: Callable[[], Any], build: Callable[[], nn.Module]
) -> Entry:
    llama = shared()
    projector = build().eval()
    features = options.features(batch, DTYPES[dtype])
    prompt = torch.randint(model.vocabulary, (batch, model.prompt), device=options.device)

    with torch.inference_mode():
        verified(lambda: projector(features), projector, TOLERANCE[dtype])

    @torch.inference_mode()
    def run() -> torch.Tensor:
        embedded = torch.cat([projector(features), llama.get_input_embeddings()(prompt)], dim=1)
        answer: torch.Tensor = llama.generate(
            inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=options.device),
            max_new_tokens=model.answer, min_new_tokens=model.answer, do_sample=False,
        )  # fmt: skip
        if answer.shape != (batch, model.answer):
            raise RuntimeError(f"the model gave {tuple(answer.shape)} tokens for ({batch}, {model.answer})")
        return answer

    positions = features.shape[1] if isinstance(projector, MLPHead) else features.shape[1] + options.config.num_spatial_tokens
    return Entry(
        run,
        values={"image_tokens": positions},
        finish=lambda seconds: {"tokens_per_s": batch * model.answer / seconds},
    )
