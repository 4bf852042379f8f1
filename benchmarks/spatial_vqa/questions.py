"""Questions about a scene, by the paper's kinds of spatial understanding (table 8), and captions.

Answers are drawn first, each as likely, and scenes are drawn until one has a question to each. So the words of a question do not
tell its answer: who does not look is right as often as by chance.
"""

from dataclasses import dataclass
from itertools import permutations
from random import Random

from benchmarks.spatial_vqa.scenes import COLORS, PAIRS, SHAPES, SIDE, UNSEEN, Difficulty, Scene, Thing, distance, sample_scene

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
    """A question of a category, its answer, and the answers that its kind of question has."""

    category: str
    text: str
    answer: str
    choices: tuple[str, ...]


def sample(random: Random, difficulty: Difficulty) -> tuple[Scene, list[Question]]:
    """A scene, and one question of each kind about it."""
    wanted = {kind: random.choice(choices) for kind, (_, choices, _) in KINDS.items()}
    while True:
        scene = sample_scene(random, difficulty, int(wanted[_how_many]))
        questions = [kind(scene.things, random, answer) for kind, answer in wanted.items()]
        if all(questions):
            return scene, questions


def _side(things: Things, random: Random, answer: str) -> Question | None:
    """Is one left of, right of, above or below another?"""
    word, axis, sign = random.choice([("left of", "x", 1), ("right of", "x", -1), ("above", "y", 1), ("below", "y", -1)])
    sign = sign if answer == "yes" else -sign
    pairs = [(a, b) for a, b in permutations(things, 2) if sign * (getattr(b, axis) - getattr(a, axis)) >= MARGIN]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    return Question("relation", f"is the {a.name} {word} the {b.name} ?", answer, YES_NO)


def _nearer(things: Things, random: Random, answer: str) -> Question | None:
    triples = [(a, b, c) for a, b, c in permutations(things, 3) if distance(a, c) - distance(a, b) >= MARGIN]
    if not triples:
        return None
    a, near, far = random.choice(triples)
    b, c = (near, far) if answer == "yes" else (far, near)
    return Question("relation", f"is the {a.name} nearer to the {b.name} than to the {c.name} ?", answer, YES_NO)


def _quadrant(things: Things, random: Random, answer: str) -> Question | None:
    there = [each for each in things if quadrant(each) == answer]
    return Question("position", f"which quadrant is the {random.choice(there).name} in ?", answer, QUADRANTS) if there else None


def _third(things: Things, random: Random, answer: str) -> Question | None:
    there = [each for each in things if third(each) == answer]
    return Question("position", f"which third is the {random.choice(there).name} in ?", answer, THIRDS) if there else None


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


def _size(things: Things, random: Random, answer: str) -> Question | None:
    pairs = [(a, b) for a, b in permutations(things, 2) if a.size != b.size and (a.radius > b.radius) == (answer == "yes")]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    return Question("size", f"is the {a.name} larger than the {b.name} ?", answer, YES_NO)


def _exists(things: Things, random: Random, answer: str) -> Question | None:
    """A pair that is not there is made of a color and a shape that both are: to count colors and shapes is not enough."""
    there = {(each.color, each.shape) for each in things}
    colors, shapes = ({pair[i] for pair in there} for i in (0, 1))
    candidates = [p for p in PAIRS if (p in there) == (answer == "yes") and p[0] in colors and p[1] in shapes]
    if not there & set(UNSEEN):  # else "no" would be told by the words
        candidates = [pair for pair in candidates if pair not in UNSEEN]
    return Question("attribute", f"is there a {'-'.join(random.choice(candidates))} ?", answer, YES_NO) if candidates else None


def _color(things: Things, random: Random, _: str) -> Question | None:
    """Of a shape that is there once; all colors are as likely as they are in scenes."""
    shapes = [each.shape for each in things]
    once = [each for each in things if shapes.count(each.shape) == 1]
    if not once:
        return None
    thing = random.choice(once)
    return Question("attribute", f"what color is the {thing.shape} ?", thing.color, tuple(COLORS))


def _how_many(things: Things, random: Random, answer: str) -> Question | None:
    return random.choice([each for each in counts(things) if each.answer == answer])


def counts(things: Things) -> list[Question]:
    """How often each color and each shape is there, of those that are."""
    found = []
    for kind, plural in [(color, f"{color} things") for color in COLORS] + list(zip(SHAPES, plurals(), strict=True)):
        if count := sum(kind in (each.color, each.shape) for each in things):
            found.append(Question("counting", f"how many {plural} are there ?", str(count), COUNTS))
    return found


KINDS = {  # category, answers, and how often who does not look can be right: no thing has the one color that its shape never has
    _side: ("relation", YES_NO, 1 / 2),
    _nearer: ("relation", YES_NO, 1 / 2),
    _quadrant: ("position", QUADRANTS, 1 / 4),
    _third: ("position", THIRDS, 1 / 3),
    _how_many: ("counting", COUNTS, 1 / 4),
    _size: ("size", YES_NO, 1 / 2),
    _exists: ("attribute", YES_NO, 1 / 2),
    _color: ("attribute", tuple(COLORS), 1 / (len(COLORS) - 1)),
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
