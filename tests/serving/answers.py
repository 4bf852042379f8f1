"""Answers to the same prompts: of transformers' `generate`, the reference, and of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from spatial_tokens.adapters.huggingface import load_adapter

LENGTH = 24


@dataclass
class Answer:
    """An answer.

    Args:
        prompt: The prompt's tokens, places and all.
        tokens: The answer's.
        logprobs: Their log-probabilities, `(tokens,)`.
    """

    prompt: int
    tokens: list[int]
    logprobs: torch.Tensor


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Colored squares."""
    squares = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(squares.numpy()).resize((width, height), Image.Resampling.NEAREST)


Prompt = tuple[str, list[Image.Image]]


def prompts(image: str) -> list[Prompt]:
    """Prompts of none, one and two pictures, of several sizes; one twice."""
    one, wide, tall = picture(0), picture(1, 96, 32), picture(2, 40, 80)
    return [
        (f"{image} What is this?", [one]),
        ("No picture at all.", []),
        (f"Here: {image}and there: {image}. Compare!", [wide, one]),
        (f"Look at {image}", [tall]),
        (f"{image}{image} Which?", [picture(3), picture(4, 48, 48)]),
        (f"{image} What is this?", [one]),
        (f"So {image} it is", [picture(5, 200, 70)]),
    ]


def by_transformers(base: Path, adapter: Path | None, asked: list[Prompt], lora: Path | None = None) -> list[Answer]:
    """`generate`, one prompt after another."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    if lora is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, lora).eval()
    processor = transformers.AutoProcessor.from_pretrained(base)
    if adapter is not None:
        model, processor = load_adapter(model, adapter, processor)
    model.generation_config.eos_token_id = None
    answers = []
    for text, pictures in asked:
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, output_scores=True, return_dict_in_generate=True)
        length = inputs["input_ids"].shape[1]
        tokens = made.sequences[0, length:].tolist()
        scores = torch.stack([each[0].log_softmax(-1) for each in made.scores])
        answers.append(Answer(length, tokens, scores[range(LENGTH), tokens]))
    return answers


def by_vllm(llm: Any, asked: list[Prompt], lora: Any = None) -> list[Answer]:
    """The same, all prompts at once."""
    from vllm import SamplingParams

    given = [{"prompt": text, **({"multi_modal_data": {"image": pictures}} if pictures else {})} for text, pictures in asked]
    how = SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=0, ignore_eos=True)
    made = llm.generate(given, how, use_tqdm=False, lora_request=lora)
    return [
        Answer(
            len(each.prompt_token_ids),
            list(each.outputs[0].token_ids),
            torch.tensor(
                [row[token].logprob for row, token in zip(each.outputs[0].logprobs, each.outputs[0].token_ids, strict=True)]
            ),
        )
        for each in made
    ]
