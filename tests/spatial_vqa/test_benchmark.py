"""The generator: what it makes is always the same, right, and told by the picture alone."""

from collections import Counter, defaultdict
from itertools import pairwise
from math import hypot, log, sqrt
from random import Random

import numpy as np
import pytest

from benchmarks.spatial_vqa.questions import CATEGORIES, KINDS, counts
from benchmarks.spatial_vqa.scenes import COLORS, RADII, SHAPES, SIDE, UNSEEN, Scene, Thing, render
from benchmarks.spatial_vqa.splits import SPLITS, digest, example, examples, pictures

DIGESTS = {  # of version 1
    "train": "8b6850552037a921",
    "validation": "018ff820a0e18c68",
    "test": "a4cdf94ee8a030ef",
    "hard": "0d2781fd4390f2b9",
}


@pytest.fixture(scope="module")
def found():
    return {"test": examples("test", 1000), "hard": examples("hard", 300)}


@pytest.mark.parametrize("split", SPLITS)
def test_a_version_is_the_same_everywhere_and_always(split):
    assert digest(examples(split, 20))[:16] == DIGESTS[split]


def test_an_example_does_not_depend_on_the_others():
    assert example("test", 7) == examples("test", 9)[7]
    assert example("test", 7) != example("train", 7) != example("train", 7, seed=1)
    assert np.array_equal(pictures([example("test", 7)])[0], pictures(examples("test", 9))[7])


def by_rule(question, things):
    """The answer, worked out again from the question's words."""
    named = {f"{each.color}-{each.shape}": each for each in things}
    words = question.text.rstrip(" ?").split()
    asked = [named[word] for word in words if word in named]
    said = lambda fact: "yes" if fact else "no"  # noqa: E731
    if "left" in words or "right" in words:
        sign = 1 if "left" in words else -1
        return said(sign * asked[0].x < sign * asked[1].x)
    if "above" in words or "below" in words:
        sign = 1 if "above" in words else -1
        return said(sign * asked[0].y < sign * asked[1].y)
    if "nearer" in words:
        one, two = (hypot(asked[0].x - each.x, asked[0].y - each.y) for each in asked[1:])
        return said(one < two)
    if "quadrant" in words:
        return ("top" if asked[0].y < SIDE / 2 else "bottom") + "-" + ("left" if asked[0].x < SIDE / 2 else "right")
    if "third" in words:
        return "left" if asked[0].x < SIDE / 3 else "middle" if asked[0].x < 2 * SIDE / 3 else "right"
    if "larger" in words:
        return said(list(RADII).index(asked[0].size) > list(RADII).index(asked[1].size))
    if words[:3] == ["is", "there", "a"]:
        return said(words[3] in named)
    if words[:2] == ["what", "color"]:
        (thing,) = (each for each in things if each.shape == words[-1])
        return thing.color
    assert words[:2] == ["how", "many"]
    kind = words[2] if words[2] in COLORS else next(shape for shape in SHAPES if words[2].startswith(shape))
    return str(sum(kind in (each.color, each.shape) for each in things))


@pytest.mark.parametrize("split", ["test", "hard"])
def test_answers_are_right(found, split):
    for each in found[split]:
        assert len(each.questions) == len(KINDS)
        for question in each.questions:
            assert question.answer == by_rule(question, each.scene.things), question
            assert question.answer in question.choices


def test_scenes_are_of_their_split(found):
    for split, things in (("test", range(4, 7)), ("hard", range(7, 10))):
        for each in found[split]:
            scene = each.scene.things
            names = [(thing.color, thing.shape) for thing in scene]
            assert len(scene) in things
            assert len(set(names)) == len(names)
            assert bool(set(names) & set(UNSEEN)) == (split == "hard")
            assert all(thing.radius in range(RADII[thing.size][0], RADII[thing.size][1] + 1) for thing in scene)
            for i, one in enumerate(scene):
                assert one.radius < one.x < SIDE - one.radius
                assert one.radius < one.y < SIDE - one.radius
                for two in scene[:i]:
                    assert max(abs(one.x - two.x), abs(one.y - two.y)) > one.radius + two.radius


CHANCES = {(category, len(choices)): chance for category, choices, chance in KINDS.values()}


def kinds_of(examples):
    """Questions by kind: their place in an example."""
    return zip(*(each.questions for each in examples), strict=True)


@pytest.mark.parametrize("split", ["test", "hard"])
def test_answers_are_balanced(found, split):
    for questions in kinds_of(found[split]):
        count, choices = len(questions), questions[0].choices
        told = Counter(each.answer for each in questions)
        sigma = sqrt(count * (1 / len(choices)) * (1 - 1 / len(choices)))
        assert set(told) == set(choices)
        assert all(abs(told[answer] - count / len(choices)) < 4 * sigma for answer in choices), told


def test_a_model_that_reads_words_alone_is_at_chance(found):
    """A naive Bayes of words, pairs of words and their places, trained on as many questions of each kind as it is asked."""
    train = examples("train", 1000)
    for learned, asked in zip(kinds_of(train), kinds_of(found["test"]), strict=True):
        seen = defaultdict(Counter)
        for each in learned:
            for feature in features(each):
                seen[feature][each.answer] += 1
        right = 0
        for each in asked:
            score = {
                answer: sum(log((seen[f][answer] + 1) / (sum(seen[f].values()) + len(each.choices))) for f in features(each))
                for answer in each.choices
            }
            right += max(score, key=score.get) == each.answer
        chance = CHANCES[asked[0].category, len(asked[0].choices)]
        assert right / len(asked) < chance + 4 * sqrt(chance * (1 - chance) / len(asked)), asked[0].text


def features(question):
    words = question.text.split()
    return [*words, *pairwise(words), *((i, word) for i, word in enumerate(words))]


def test_counts_that_are_not_drawn_first_are_not_balanced(found):
    """So the tests above can fail."""
    told = Counter((question.text.split()[2], question.answer) for each in found["test"] for question in counts(each.scene.things))
    ones, all_of_them = (sum(count for (_, answer), count in told.items() if answer in wanted) for wanted in ("1", "1234"))
    assert ones / all_of_them > 0.4


def test_captions(found):
    for each in found["test"][:50]:
        things = [f"{thing.size} {thing.color} {thing.shape}" for thing in each.scene.things]
        words = each.caption.split()
        assert sorted(" ".join(words[i : i + 3]) for i in range(0, len(words), 3)) == sorted(things)
        told = [named for named in each.reading.split() if named != "."]
        at = {f"{thing.color}-{thing.shape}": (thing.y // 8, thing.x // 8) for thing in each.scene.things}
        assert sorted(told) == sorted(at)
        assert [at[name] for name in told] == sorted(at.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_drawn_where_it_is_and_in_its_color(shape):
    thing = Thing("red", shape, "large", 12, 30, 60)
    picture = render(Scene((thing,), clutter=0, noise=0)).astype(float)
    red = picture[..., 0] - picture[..., 1] > 60
    rows, columns = red.nonzero()
    assert abs(rows.mean() - 60) < 3
    assert abs(columns.mean() - 30) < 1
    assert rows.min() >= 60 - 13
    assert rows.max() <= 60 + 13
    assert red.sum() > 0.3 * 24 * 24


def test_clutter_is_grey():
    picture = render(Scene((), clutter=12, noise=3)).astype(float)
    assert picture.std() > 7 > render(Scene((), clutter=0, noise=3)).astype(float).std()
    assert abs(picture - picture.mean(-1, keepdims=True)).max() < 40  # pixel noise, no color
    assert abs((picture - picture.mean(-1, keepdims=True)).mean((0, 1))).max() < 0.5


def test_categories():
    assert {category for category, *_ in KINDS.values()} == set(CATEGORIES)
    assert Random(0).random() == 0.8444218515250481  # Python's promise, on which the versions rest
