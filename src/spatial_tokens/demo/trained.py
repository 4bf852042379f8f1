"""The trained model, asked about a scene without its spatial tokens and with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import hypot
from random import Random
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens import visualize
from spatial_tokens.adapters.huggingface import load_adapter
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.ready import TRAINED, TRAINED_ADAPTER, trained_llava
from spatial_tokens.checks import check_seed
from spatial_tokens.demo import pictures
from spatial_tokens.demo.questions import CELL, KINDS, Question, sample
from spatial_tokens.demo.scene_text import UNSEEN_NAMES, draw_scene, read_scene
from spatial_tokens.demo.scenes import STANDARD, Scene
from spatial_tokens.demo.stages import Report, Stage
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.storage.files import make_directory
from spatial_tokens.storage.text import read_text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Answer:
    """A question with its right answer, None where that is not known, and what the model says without and with spatial tokens."""

    question: str
    right: str | None
    without_spatial: str
    with_spatial: str


@dataclass(frozen=True)
class SceneReport:
    """What the trained model said about a scene, and the pictures that were drawn.

    Args:
        things: What is in the scene.
        answers: The questions.
        distances: How far the places that the model names are from the things, in the mean, in patches: without and with; None if
            it names none.
        accuracy: Of questions about position in the test scenes, in percent: without and with.
        chance: Of the same questions, in percent, what guessing reaches.
        stages: What ran, as in a `Report`.
        pictures: The files that were written.
        notes: What else to know.
    """

    things: list[str]
    answers: list[Answer]
    distances: tuple[float | None, float | None]
    accuracy: tuple[float, float]
    chance: float
    stages: list[Stage]
    pictures: list[str]
    notes: list[str]


def run_scene_demo(described: str | None, output: str, *, prompt: str | None, seed: int) -> SceneReport:
    """Draws a scene, and asks the trained model about it without and with spatial tokens.

    Args:
        described: The scene in words, as `read_scene` takes it; None for one that is drawn from the seed.
        output: The directory for the PNGs.
        prompt: An additional question.
        seed: Of the scene, and of which questions are asked.

    Raises:
        SpatialTokensError: If the scene, a word of the prompt or the seed is none that there is, or a PNG cannot be written.
    """
    check_seed(seed)
    random = Random(f"spatial-tokens demo {seed}")
    if described is None:
        scene, questions = sample(random, STANDARD)
    else:
        scene = read_scene(described, random.getrandbits(31))
        questions = questions_about(scene, random)
    picture, folder = draw_scene(scene), make_directory(output)
    base, plain = trained_llava(attn_implementation="eager")  # which gives attentions
    _check_words(plain, prompt)

    asked = [_in_words(each) for each in questions] + ([prompt] if prompt else [])
    right = [each.answer for each in questions] + ([None] if prompt else [])
    names = [thing.name for thing in scene.things]
    with torch.inference_mode():
        before = _generate(base, plain, picture, asked, names)
        model, processor = load_adapter(base, TRAINED_ADAPTER, plain)
        model.float()
        after = _generate(model, processor, picture, asked, names)
        stages, looks = _stages_and_attention(model, processor, picture, asked)
    counted = (each[: len(asked)] for each in (before, after))
    answers = [Answer(*each) for each in zip(asked, right, *counted, strict=True)]
    told = [[_place(words) for words in each[len(asked) :]] for each in (before, after)]

    config = model.spatial_tokens.config
    drawn = {
        "places.png": pictures.draw_places(picture, scene, *told),
        "windows.png": visualize.draw_windows(picture, config.grid_size, config.kernel_sizes, config.variant),
        "attention.png": pictures.draw_attention(picture, [(each.question, each.with_spatial) for each in answers], looks),
    }
    for name, figure in drawn.items():
        visualize.save(figure, folder / name)
    here = [name for name in UNSEEN_NAMES if name.replace(" ", "-") in names]
    new = f"the training pictures had no {', no '.join(UNSEEN_NAMES)} (in this scene: {', '.join(here)})"
    return SceneReport(
        [thing.name for thing in scene.things], answers, (_distance(scene, told[0]), _distance(scene, told[1])), _accuracy(),
        _chance(), stages, [str(folder / name) for name in drawn], [new] if here else [],
    )  # fmt: skip


def questions_about(scene: Scene, random: Random) -> list[Question]:
    """A question of each kind that a scene has one of."""
    found = []
    for name, kind in KINDS.items():
        choices = [(answer, topic) for answer in kind.answers for topic in kind.topics]
        asked = (kind.ask(scene.things, random, *choice) for choice in random.sample(choices, len(choices)))
        found += [Question(name, *each) for each in asked if each is not None][:1]
    return found


def _in_words(question: Question) -> str:
    """As people write it; the model's tokenizer joins "red circle" again."""
    return question.text.replace("-", " ").replace(" ?", "?")


def _check_words(processor: Any, prompt: str | None) -> None:
    """Raises SpatialTokensError if a prompt has a word that the model does not know, or a special token."""
    if prompt is None:
        return
    tokenizer = processor.tokenizer
    words = tokenizer.backend_tokenizer.normalizer.normalize_str(prompt).split()
    known = tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, processor.image_token}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise SpatialTokensError(
            f"the trained model does not know {shown(unknown[0]) if unknown else 'an empty prompt'}; it reads questions such as "
            "'is the red circle left of the blue ring?', 'which quadrant is the red circle in?', 'how many rings are there?'"
        )


def _generate(model: Any, processor: Any, picture: Image, questions: list[str], names: list[str]) -> list[str]:
    """What a model answers about a picture: a word to each question, and after each name a size, a column and a row."""
    said: list[str] = []
    for prompts, length in ((questions, 1), (names, 3)):
        texts = [f"<image> {each}" for each in prompts]
        inputs = processor(images=[picture] * len(prompts), text=texts, padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=length, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(made, skip_special_tokens=True)
    return said


def _stages_and_attention(
    model: Any, processor: Any, picture: Image, prompts: list[str]
) -> tuple[list[Stage], list[pictures.PatchAttention]]:
    """The stages, and what each question attends to as it is answered."""
    report, spatial = Report(), model.spatial_tokens
    inputs = [processor(images=picture, text=f"<image> {each}", return_tensors="pt") for each in prompts]
    pixels = inputs[0]["pixel_values"]
    tower, mlp = model.model.vision_tower, model.model.multi_modal_projector
    report.run("picture", None, lambda: picture, lambda each: (each.height, each.width, 3))
    report.run("pixels", None, lambda: processor.image_processor(picture, return_tensors="pt")["pixel_values"])
    patches = report.run("encoder layer -2", tower, lambda: tower(pixels).hidden_states[-2][:, 1:])
    tokens = report.run("extractor", spatial.extractor, lambda: spatial.extractor(patches, spatial.config.grid_size))
    report.run("spatial head", spatial.spatial_head, lambda: spatial.spatial_head(tokens))
    report.run("patch head", mlp, lambda: mlp(patches))
    report.run("whole model", model, lambda: model(**inputs[0]).logits)
    return report.stages, [_attention(model, each) for each in inputs]


def _attention(model: Any, inputs: Any) -> pictures.PatchAttention:
    """What the last word attends to, in the mean over all layers and heads."""
    paid = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0, :, -1].mean((0, 1))
    ids, spatial = inputs["input_ids"][0], attachment_of(model).token_id
    patches, tokens = paid[ids == model.config.image_token_id], paid[ids == spatial]
    return pictures.PatchAttention(
        patches.view(model.spatial_tokens.config.grid_size), float(tokens.sum() / (tokens.sum() + patches.sum()))
    )


def _place(words: str) -> tuple[int, int] | None:
    """The column and row that a record names; None if it does not."""
    told = dict(each.rsplit("-", 1) for each in words.split() if each.startswith(("column-", "row-")))
    return (int(told["column"]), int(told["row"])) if len(told) == 2 else None


def _distance(scene: Scene, told: list[tuple[int, int] | None]) -> float | None:
    apart = [
        hypot(place[0] + 0.5 - thing.x / CELL, place[1] + 0.5 - thing.y / CELL)
        for thing, place in zip(scene.things, told, strict=True)
        if place is not None
    ]
    return mean(apart) if apart else None


def _accuracy() -> tuple[float, float]:
    """Of questions about position, in percent, as it was measured when the model was trained."""
    told = json.loads(read_text(TRAINED / "trained.json"))["test"]
    kinds = [name for name, kind in KINDS.items() if kind.category == "position"]
    without, having = (
        100 * sum(told[name][kind][0] for kind in kinds) / sum(told[name][kind][1] for kind in kinds)
        for name in ("without", "with")
    )
    return without, having


def _chance() -> float:
    """Of questions about position, in percent; there are as many of each kind."""
    return 100 * mean(1 / len(kind.answers) for kind in KINDS.values() if kind.category == "position")
