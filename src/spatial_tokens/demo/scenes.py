"""Scenes of colored shapes among clutter: what is in one, drawn from a seed, and the picture of it.

Python's `random.Random` decides what is in a scene and numpy's frozen `RandomState` the noise, so that a seed means the same scene
on every machine. Coordinates are pixels, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, hypot, pi, sin
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    import numpy as np
    from numpy.typing import NDArray

VERSION = 2  # of scenes and questions: another one gives other pictures, and results that cannot be compared

SIDE = 96  # pixels, each way
COLORS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 98, 214),
    "yellow": (240, 200, 40),
    "purple": (142, 68, 190),
    "orange": (240, 130, 36),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
UNSEEN = list(zip(COLORS, SHAPES, strict=True))  # in no picture but the hard split's; each color and each shape is in one of them
RADII = {"small": (6, 7), "medium": (9, 10), "large": (12, 13)}
GAP = 2  # pixels at least between two objects, and between one and the border
OVERSAMPLING = 3


@dataclass(frozen=True)
class Thing:
    """One object: `radius` is half its height and width."""

    color: str
    shape: str
    size: str
    radius: int
    x: int
    y: int

    @property
    def name(self) -> str:
        """One word, "red-circle"."""
        return f"{self.color}-{self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things of different names, and the seed of the background and its clutter."""

    things: tuple[Thing, ...]
    clutter: int
    noise: int


@dataclass(frozen=True)
class Difficulty:
    """How many things, pieces of clutter and unseen pairs a scene has, least and most."""

    things: tuple[int, int]
    clutter: tuple[int, int]
    unseen: tuple[int, int]


STANDARD = Difficulty(things=(4, 6), clutter=(4, 8), unseen=(0, 0))
HARD = Difficulty(things=(7, 9), clutter=(10, 16), unseen=(1, 2))
TEXT_ONLY = Difficulty(things=(4, 9), clutter=(0, 0), unseen=(0, 2))  # in words, to the language model


def sample_scene(random: Random, difficulty: Difficulty, topic: str, count: int) -> Scene:
    """A scene in which some color, or some shape, is there exactly `count` times: the topic is one of the two words.

    All colors and all shapes are exchangeable, and so are left and right, top and bottom: no question's words tell its answer.
    """
    while True:
        pairs = _sample_pairs(random, difficulty)
        kinds = [pair[("color", "shape").index(topic)] for pair in pairs]
        if count not in map(kinds.count, kinds):
            continue
        things = _place(random, pairs)
        if things is not None:
            return Scene(things, random.randint(*difficulty.clutter), random.getrandbits(31))


def _sample_pairs(random: Random, difficulty: Difficulty) -> list[tuple[str, str]]:
    """Different pairs of few colors and few shapes, so that things share one or the other."""
    colors = random.sample(list(COLORS), random.randint(2, 4))
    shapes = random.sample(SHAPES, random.randint(2, 4))
    seen = [(color, shape) for color in colors for shape in shapes if (color, shape) not in UNSEEN]
    unseen = [(color, shape) for color in colors for shape in shapes if (color, shape) in UNSEEN]
    wanted, of_them = random.randint(*difficulty.things), random.randint(*difficulty.unseen)
    if len(unseen) < of_them or len(seen) < wanted - of_them:
        return []
    pairs = random.sample(unseen, of_them) + random.sample(seen, wanted - of_them)
    random.shuffle(pairs)
    return pairs


def _place(random: Random, pairs: list[tuple[str, str]]) -> tuple[Thing, ...] | None:
    """The pairs with sizes and places where none touches another; None if no place was found."""
    things: list[Thing] = []
    for color, shape in pairs:
        size = random.choice(list(RADII))
        radius = random.randint(*RADII[size])
        for _ in range(40):
            x, y = (random.randint(radius + GAP, SIDE - 1 - radius - GAP) for _ in range(2))
            if all(max(abs(x - each.x), abs(y - each.y)) > radius + each.radius + GAP for each in things):
                things.append(Thing(color, shape, size, radius, x, y))
                break
        else:
            return None
    return tuple(things)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture, `(SIDE, SIDE, 3)` in uint8."""
    import numpy as np

    noise = np.random.RandomState(scene.noise)
    shade = noise.randint(150, 211)
    canvas = np.full((SIDE * OVERSAMPLING, SIDE * OVERSAMPLING, 3), shade, dtype=np.float64)
    for _ in range(scene.clutter):
        _draw_clutter(canvas, noise, shade)
    centers = (np.arange(SIDE * OVERSAMPLING) + 0.5) / OVERSAMPLING
    for each in scene.things:
        reach = each.radius + 1
        rows, columns = (slice((c - reach) * OVERSAMPLING, (c + reach + 1) * OVERSAMPLING) for c in (each.y, each.x))
        y, x = (centers[rows, None] - each.y - 0.5) / each.radius, (centers[columns] - each.x - 0.5) / each.radius
        canvas[rows, columns][covers(each.shape, x, y)] = np.array(COLORS[each.color]) * noise.uniform(0.85, 1.1)
    parts = [canvas[row::OVERSAMPLING, column::OVERSAMPLING] for row, column in np.ndindex(OVERSAMPLING, OVERSAMPLING)]
    small = sum(parts, np.zeros((SIDE, SIDE, 3))) / OVERSAMPLING**2
    return (small + noise.normal(0, 6, small.shape)).clip(0, 255).round().astype(np.uint8)


def covers(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a shape of radius 1 around the origin is."""
    import numpy as np

    squared = x * x + y * y
    if shape == "circle":
        return squared <= 1
    if shape == "ring":
        return (squared <= 1) & (squared >= 0.3)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1)
    return (y <= 0.85) & (2 * abs(x) <= y + 1)  # a triangle


def _draw_clutter(canvas: NDArray[np.float64], noise: np.random.RandomState, shade: int) -> None:
    """A gray stroke or dot, lighter or darker than the background."""
    import numpy as np

    gray = shade + noise.choice([-1, 1]) * noise.randint(20, 45)
    x, y = noise.randint(0, SIDE, 2)
    length, angle = (noise.randint(6, 22), noise.uniform(0, 2 * pi)) if noise.rand() < 0.7 else (1, 0.0)
    radius = noise.uniform(0.5, 1.5) * OVERSAMPLING
    for step in np.linspace(0, 1, length * OVERSAMPLING):
        row, column = ((c + step * length * t) * OVERSAMPLING for c, t in ((y, sin(angle)), (x, cos(angle))))
        top, left = (max(0, int(c - radius)) for c in (row, column))
        canvas[top : max(0, int(row + radius) + 1), left : max(0, int(column + radius) + 1)] = gray


def distance(one: Thing, other: Thing) -> float:
    """Pixels from center to center."""
    return hypot(one.x - other.x, one.y - other.y)
