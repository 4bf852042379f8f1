"""The language model: a small Llama, trained on the benchmark's text without a picture, so that it exists before it sees.

It reads texts that are laid out, and answers the questions from them: what "left of" means it knows before the first picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.spatial_vqa.layout import NOTHING, Place, lay_out
from benchmarks.spatial_vqa.optimization import Optimization, Pretraining
from benchmarks.spatial_vqa.splits import Example
from benchmarks.spatial_vqa.words import (
    END,
    IDS,
    IGNORED,
    OWN,
    START,
    WORDS,
    Rows,
    Segment,
    Tokens,
    list_of,
    pack,
    questions_of,
    records_of,
)
from spatial_tokens.demo.questions import KINDS, Question, counts
from spatial_tokens.demo.scenes import PAIRS

HIDDEN_SIZE = 128
SPREAD = 0.4  # of the texts have things at many places, as patches have
FEW = 0.3  # of the texts are of one to three things: to look a thing up is learned from these first

NAMES = set(map("-".join, PAIRS))

Text = tuple[list[Place], list[Segment]]


@dataclass(frozen=True)
class LanguageModel:
    """What a vision-language model takes of a language model: its config, its weights by name, and how it reads text."""

    config: LlamaConfig
    weights: Mapping[str, torch.Tensor]
    tokens: Tokens


class Pretrained(Protocol):
    """A Llama that others have trained, in the place of the small one; a dataclass, whose fields tell it from others."""

    def load(self) -> LanguageModel:
        """The language model.

        Raises:
            SpatialTokensError: If it is not installed.
        """


def llama_config() -> LlamaConfig:
    """Three layers, 0.65 M parameters."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN_SIZE, intermediate_size=3 * HIDDEN_SIZE, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=IDS[START], eos_token_id=IDS[END],
    )  # fmt: skip
    config._attn_implementation = "eager"  # on a CPU, in bfloat16, plain products train twice as fast as torch's attention
    return config


def text_of(example: Example, random: Random) -> Text:
    """The scene laid out; what there is in reading order, the questions, and each thing's record."""
    things, spread = example.scene.things, random.random() < SPREAD
    questions = [each for each in example.questions if each.kind != "how many" or not spread]
    if not spread:  # to count is learned last, and from things that stand at one place each
        found = [*counts(things, "color"), *counts(things, "shape")]
        questions += [Question("how many", *each) for each in random.sample(found, 4)]
    return lay_out(things, random, spread), [list_of(example), *questions_of(questions), *records_of(things)]


def short_text_of(example: Example, random: Random) -> Text:
    """The same of one to three of the things, with the questions that are about no other."""
    kept = random.sample(example.scene.things, random.randint(1, 3))
    names = {each.name for each in kept}
    about = ("side", "nearer", "quadrant", "third", "size")
    questions = [q for q in example.questions if q.kind in about and not (set(q.text.split()) & NAMES) - names]
    return lay_out(kept, random, random.random() < SPREAD), [*questions_of(questions), *records_of(kept)]


def inputs_of(rows: Rows) -> dict[str, torch.Tensor]:
    """As a transformers model takes them."""
    blocked = torch.zeros_like(rows.mask, dtype=torch.float32).masked_fill(~rows.mask, torch.finfo(torch.float32).min)
    return {"input_ids": rows.ids, "position_ids": rows.positions, "attention_mask": blocked}


def train_language_model(
    examples: Sequence[Example], plan: Pretraining, seed: int, progress: Callable[[float], None], device: str = "cpu"
) -> LlamaForCausalLM:
    """The language model, trained on texts that are laid out and on questions with their answers."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config()).to(device)
    random = Random(seed)
    texts = [short_text_of(each, random) if random.random() < FEW else text_of(each, random) for each in examples]
    optimization = Optimization(model.model.layers, model, plan)
    for _ in range(plan.steps):
        with torch.autocast(model.device.type, torch.bfloat16):
            logits, labels = read(model, [texts[i] for i in torch.randint(len(texts), (plan.batch_size,))])
        optimization.step(next_word_loss(logits, labels))
        progress((logits.argmax(-1) == labels)[labels != IGNORED].float().mean().item())
    return model.eval().requires_grad_(False)


def read(model: LlamaForCausalLM, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(B, L, V)` and labels `(B, L)`. At a place of a text, its words' embeddings are added."""
    laid, segments = zip(*texts, strict=True)
    rows = pack([[place[0] for place in each] for each in laid], segments).to(model.device)
    beside = torch.full((*rows.ids.shape, 3), NOTHING)
    for row, places in enumerate(laid):
        beside[row, : len(places)] = torch.tensor(places)[:, 1:]
    beside = beside.to(model.device)
    embed = model.get_input_embeddings()
    inputs = inputs_of(rows)
    words = embed(inputs.pop("input_ids"))
    added = embed(beside.clamp(min=0)) * (beside != NOTHING)[..., None]
    return model(inputs_embeds=words + added.sum(2), **inputs).logits.float(), rows.labels


def next_word_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss where there is a label: each label is at the position that predicts its word."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def own(tensors: Mapping[str, torch.Tensor]) -> LanguageModel:
    """The language model that training left, for a vision-language model."""
    return LanguageModel(llama_config(), tensors, OWN)


def load(tensors: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    """The language model with the weights that training left."""
    model = LlamaForCausalLM(llama_config())
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def ask(model: LlamaForCausalLM, examples: Sequence[Example]) -> dict[str, list[int]]:
    """How many questions of each kind it answers rightly from laid-out texts, of how many."""
    random = Random(0)
    asked = [questions_of(each.questions) for each in examples]
    texts = [lay_out(each.scene.things, random, spread=False) for each in examples]
    return tally(*read(model, list(zip(texts, asked, strict=True))), asked)


def tally(logits: torch.Tensor, labels: torch.Tensor, asked: Sequence[Sequence[Segment]]) -> dict[str, list[int]]:
    """Right answers of each kind, of how many: of all tokens each of the answer's must be the likeliest."""
    where = labels != IGNORED
    segments = [each for row in asked for each in row]
    right = (logits.argmax(-1) == labels)[where].cpu().split([each.learned for each in segments])
    counted = {kind: [0, 0] for kind in KINDS}
    for segment, is_right in zip(segments, right, strict=True):
        if segment.kind is not None:
            counted[segment.kind][0] += int(is_right.all())
            counted[segment.kind][1] += 1
    return counted
