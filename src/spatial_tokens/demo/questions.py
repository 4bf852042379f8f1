"""Questions about a scene, by the paper's kinds of spatial understanding (table 8), and captions.

Answers are drawn first, each as likely, and what is asked about where some answers would favor it; scenes are drawn until one has a
question to each. So the words of a question do not tell its answer: who does not look is right as often as by chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from random import Random

from spatial_tokens.demo.scenes import COLORS, PAIRS, SHAPES, SIDE, UNSEEN, Difficulty, Scene, Thing, distance, sample_scene

CATEGORIES = ("relation", "position", "counting", "size", "attribute")
COUNTS = ("1", "2", "3", "4")
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
THIRDS = ("left", "middle", "right")
YES_NO = ("yes", "no")
MARGIN = 8  # pixels that decide a comparison, at least
Things = tuple[Thing, ...]
CELL = 8  # pixels of the columns and rows that a thing's place is told by: the encoder's patch


@dataclass(frozen=True)
class Question:
    """A question of a kind, and its answer."""

    kind: str
    text: str
    answer: str


Asked = tuple[str, str] | None  # a question's words and its answer; None where a scene has no such question


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Args:
        category: What it asks for.
        ask: From things, a source of chance, an answer and a topic, a question that has this answer.
        answers: All that it has.
        topics: What it may be about, each as likely.
        ruled_out: How many of its answers a question's words rule out where no pair is unseen: in all scenes but hard ones.
    """

    category: str
    ask: Callable[[Things, Random, str, str], Asked]
    answers: tuple[str, ...]
    topics: tuple[str, ...] = ("",)
    ruled_out: int = 0

    def chance(self, split: str) -> float:
        """How often who does not look can be right."""
        return 1 / (len(self.answers) - self.ruled_out * (split != "hard"))


def sample(random: Random, difficulty: Difficulty) -> tuple[Scene, list[Question]]:
    """A scene, and one question of each kind about it."""
    wanted = {name: (random.choice(kind.answers), random.choice(kind.topics)) for name, kind in KINDS.items()}
    count, topic = wanted["how many"]
    while True:
        scene = sample_scene(random, difficulty, topic, int(count))
        questions = []
        for name, drawn in wanted.items():
            asked = KINDS[name].ask(scene.things, random, *drawn)
            if asked is None:
                break
            questions.append(Question(name, *asked))
        else:
            return scene, questions


SIDES = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}


def _side(things: Things, random: Random, answer: str, topic: str) -> Asked:
    axis, sign = SIDES[topic]
    sign = sign if answer == "yes" else -sign
    pairs = [(a, b) for a, b in permutations(things, 2) if sign * (getattr(b, axis) - getattr(a, axis)) >= MARGIN]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    return f"is the {a.name} {topic} the {b.name} ?", answer


def _nearer(things: Things, random: Random, answer: str, _: str) -> Asked:
    triples = [(a, b, c) for a, b, c in permutations(things, 3) if distance(a, c) - distance(a, b) >= MARGIN]
    if not triples:
        return None
    a, near, far = random.choice(triples)
    b, c = (near, far) if answer == "yes" else (far, near)
    return f"is the {a.name} nearer to the {b.name} than to the {c.name} ?", answer


def _quadrant(things: Things, random: Random, answer: str, _: str) -> Asked:
    there = [each for each in things if quadrant(each) == answer]
    return (f"which quadrant is the {random.choice(there).name} in ?", answer) if there else None


def _third(things: Things, random: Random, answer: str, _: str) -> Asked:
    there = [each for each in things if third(each) == answer]
    return (f"which third is the {random.choice(there).name} in ?", answer) if there else None


def quadrant(thing: Thing) -> str | None:
    """The quadrant that a thing's centre is in; None near a border between two."""
    if min(abs(2 * c - SIDE + 1) for c in (thing.x, thing.y)) < MARGIN:
        return None
    return f"{'top' if 2 * thing.y < SIDE else 'bottom'}-{'left' if 2 * thing.x < SIDE else 'right'}"


def third(thing: Thing) -> str | None:
    """Left, middle or right; None near a border."""
    place, rest = divmod(thing.x, SIDE // 3)
    near_left, near_right = place > 0 and rest < MARGIN // 2, place < 2 and rest >= SIDE // 3 - MARGIN // 2
    return None if near_left or near_right else THIRDS[place]


def _size(things: Things, random: Random, answer: str, _: str) -> Asked:
    pairs = [(a, b) for a, b in permutations(things, 2) if a.size != b.size and (a.radius > b.radius) == (answer == "yes")]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    return f"is the {a.name} larger than the {b.name} ?", answer


def _exists(things: Things, random: Random, answer: str, topic: str) -> Asked:
    """A pair that is not there is made of a color and a shape that both are: to count colors and shapes is not enough.

    Of an unseen pair, if that is the topic, where the scene has one.
    """
    there = {(each.color, each.shape) for each in things}
    colors, shapes = ({pair[i] for pair in there} for i in (0, 1))
    unseen = topic == "unseen" and not there.isdisjoint(UNSEEN)
    fitting = [p for p in PAIRS if p[0] in colors and p[1] in shapes and (p in UNSEEN) == unseen]
    pairs = [p for p in fitting if (p in there) == (answer == "yes")]
    return (f"is there a {'-'.join(random.choice(pairs))} ?", answer) if pairs else None


def _color(things: Things, random: Random, answer: str, _: str) -> Asked:
    """Of a shape that is there once."""
    shapes = [each.shape for each in things]
    once = [each.shape for each in things if shapes.count(each.shape) == 1 and each.color == answer]
    return (f"what color is the {random.choice(once)} ?", answer) if once else None


def _how_many(things: Things, random: Random, answer: str, topic: str) -> Asked:
    found = [(text, count) for text, count in counts(things, topic) if count == answer]
    return random.choice(found) if found else None


def counts(things: Things, topic: str) -> list[tuple[str, str]]:
    """How often each color, or each shape, is there, of those that are: questions with their answers."""
    names = zip(SHAPES, plurals(), strict=True) if topic == "shape" else ((color, f"{color} things") for color in COLORS)
    found = [(plural, sum(getattr(each, topic) == name for each in things)) for name, plural in names]
    return [(f"how many {plural} are there ?", str(count)) for plural, count in found if count]


KINDS = {
    "side": Kind("relation", _side, YES_NO, tuple(SIDES)),
    "nearer": Kind("relation", _nearer, YES_NO),
    "quadrant": Kind("position", _quadrant, QUADRANTS),
    "third": Kind("position", _third, THIRDS),
    "how many": Kind("counting", _how_many, COUNTS, ("color", "shape")),
    "size": Kind("size", _size, YES_NO),
    "exists": Kind("attribute", _exists, YES_NO, ("seen", "unseen")),
    "color": Kind("attribute", _color, tuple(COLORS), ruled_out=1),  # the color that its shape has in hard scenes alone
}


def record(thing: Thing) -> str:
    """What is to be known of a thing beside its name: "large column-3 row-7"."""
    return f"{thing.size} column-{thing.x // CELL} row-{thing.y // CELL}"


def reading(scene: Scene) -> str:
    """What is there, in reading order: "red-circle . blue-ring . ..."."""
    return " ".join(f"{each.name} ." for each in sorted(scene.things, key=lambda each: (each.y // CELL, each.x // CELL)))


def caption(scene: Scene, random: Random) -> str:
    """What is there, and not where, as captions on the web mostly are: in any order, "large red circle small ..."."""
    return " ".join(map(phrase, random.sample(scene.things, len(scene.things))))


def phrase(thing: Thing) -> str:
    """A thing in words, "large red circle"."""
    return f"{thing.size} {thing.color} {thing.shape}"


def plurals() -> list[str]:
    """The shapes' plurals, for a vocabulary."""
    return [f"{shape}s" if shape != "cross" else "crosses" for shape in SHAPES]
