"""The benchmark's splits: scenes with their questions, the same from the same seed."""

import hashlib
from dataclasses import dataclass
from random import Random

import numpy as np

from spatial_tokens.demo.questions import Question, caption, reading, sample
from spatial_tokens.demo.scenes import HARD, STANDARD, TEXT_ONLY, VERSION, Scene, render

SPLITS = {"train": STANDARD, "validation": STANDARD, "test": STANDARD, "hard": HARD, "told": TEXT_ONLY}


@dataclass(frozen=True)
class Example:
    """A scene, one question of each kind, and captions: of what is there in reading order, and in any order with sizes."""

    scene: Scene
    questions: tuple[Question, ...]
    reading: str
    caption: str


def examples(split: str, count: int, seed: int = 0) -> list[Example]:
    """The first `count` examples of a split; more are these and others."""
    return [example(split, index, seed) for index in range(count)]


def example(split: str, index: int, seed: int = 0) -> Example:
    """One example, whatever the others are."""
    random = Random(f"spatial-vqa {VERSION} {split} {seed} {index}")
    scene, questions = sample(random, SPLITS[split])
    return Example(scene, tuple(questions), reading(scene), caption(scene, random))


def pictures(found: list[Example]) -> np.ndarray:
    """Their pictures, `(count, SIDE, SIDE, 3)` in uint8."""
    return np.stack([render(each.scene) for each in found])


def digest(found: list[Example]) -> str:
    """What tells two lists of examples apart: pictures, questions and answers."""
    hashed = hashlib.sha256(pictures(found).tobytes())
    hashed.update(repr([(each.questions, each.reading, each.caption) for each in found]).encode())
    return hashed.hexdigest()
