"""The language model: a small Llama, trained on the benchmark's text without a picture, so that it exists before it sees.

It reads descriptions, and answers the questions from them: what "left of" and "how many" mean it knows before the first picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.spatial_vqa.optimization import Optimization, Pretraining
from benchmarks.spatial_vqa.questions import CATEGORIES, describe
from benchmarks.spatial_vqa.scenes import PAIRS
from benchmarks.spatial_vqa.splits import Example
from benchmarks.spatial_vqa.words import IDS, IGNORED, START, WORDS, Rows, Segment, encode, pack, questions_of, records_of

HIDDEN_SIZE = 128
WORDS_SHARE = 0.3  # of the loss: a description's words, beside what is asked

NAMES = set(map("-".join, PAIRS))

Read = tuple[list[int], list[Segment]]


def llama_config() -> LlamaConfig:
    """Three layers, 0.65 M parameters."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN_SIZE, intermediate_size=3 * HIDDEN_SIZE, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    config._attn_implementation = "eager"  # on a CPU, in bfloat16, plain products train twice as fast as torch's attention
    return config


def text_of(example: Example) -> Read:
    """A description, the questions about it, and each thing's record once more."""
    return [IDS[START], *encode(example.description)], [*questions_of(example), *records_of(example)]


def short_text_of(example: Example, random: Random) -> Read:
    """The same of one to three of the things, and the questions that are about no other: to look up is learned from these first."""
    kept = random.sample(example.scene.things, random.randint(1, 3))
    names = {each.name for each in kept}
    about = ("relation", "position", "size")
    questions = [q for q in example.questions if q.category in about and not (set(q.text.split()) & NAMES) - names]
    scene = replace(example.scene, things=tuple(kept))
    return text_of(replace(example, scene=scene, questions=tuple(questions), description=describe(scene)))


def inputs_of(rows: Rows) -> dict[str, torch.Tensor]:
    """As a transformers model takes them."""
    blocked = torch.zeros(rows.mask.shape).masked_fill(~rows.mask, torch.finfo(torch.float32).min)
    return {"input_ids": rows.ids, "position_ids": rows.positions, "attention_mask": blocked}


def train_language_model(
    examples: Sequence[Example], plan: Pretraining, seed: int, progress: Callable[[float], None]
) -> LlamaForCausalLM:
    """The language model, trained on descriptions and on questions with their answers."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    random = Random(seed)
    texts = [short_text_of(each, random) if random.random() < 0.5 else text_of(each) for each in examples]
    optimization = Optimization(model.model.layers, model, plan)
    for _ in range(plan.steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (plan.batch_size,))]
        prefixes, segments = zip(*chosen, strict=True)
        rows = pack(prefixes, segments, learn_prefix=True)
        answers = pack(prefixes, segments).labels
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs_of(rows)).logits.float()
        others = rows.labels.masked_fill(answers != IGNORED, IGNORED)
        loss = foretold(logits, answers) + WORDS_SHARE * foretold(logits, others)
        optimization.step(loss)
        progress((logits.argmax(-1) == answers)[answers != IGNORED].float().mean().item())
    return model.eval().requires_grad_(False)


def foretold(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss where there is a label: it stands where its word is foretold."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def load(tensors: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    """The language model with the weights that training left."""
    model = LlamaForCausalLM(llama_config())
    model.load_state_dict(dict(tensors))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def ask(model: LlamaForCausalLM, examples: Sequence[Example]) -> dict[str, list[int]]:
    """How many questions of each category it answers rightly from the descriptions, of how many."""
    rows = pack([text_of(each)[0] for each in examples], [questions_of(each) for each in examples])
    return tally(model(**inputs_of(rows)).logits, rows.labels, [questions_of(each) for each in examples])


def tally(logits: torch.Tensor, labels: torch.Tensor, asked: Sequence[Sequence[Segment]]) -> dict[str, list[int]]:
    """Right answers of each category, of how many: the likeliest of all words must be the answer."""
    where = labels != IGNORED
    right = (logits.argmax(-1) == labels)[where].tolist()
    counts = {category: [0, 0] for category in CATEGORIES}
    for segment, is_right in zip((each for row in asked for each in row), right, strict=True):
        counts[CATEGORIES[segment.category]][0] += is_right
        counts[CATEGORIES[segment.category]][1] += 1
    return counts
