"""The generator: what it makes is always the same, right, and told by the picture alone."""

from collections import Counter, defaultdict
from itertools import pairwise
from math import hypot, log, sqrt
from random import Random

import numpy as np
import pytest

from benchmarks.spatial_vqa.splits import SPLITS, digest, example, examples, pictures
from spatial_tokens.demo.questions import CATEGORIES, KINDS, counts
from spatial_tokens.demo.scenes import COLORS, RADII, SHAPES, SIDE, UNSEEN, Scene, Thing, render

DIGESTS = {  # of version 2
    "train": "f12c1c3fe9ee2a06",
    "validation": "1345270a372ceec9",
    "test": "1a78a0ed008e5256",
    "hard": "2a1fdde64ec33416",
    "told": "cd3045da7849579d",
}


@pytest.fixture(scope="module")
def found():
    return {split: examples(split, 1000) for split in ("train", "test", "hard")}


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
            assert question.answer in KINDS[question.kind].answers


def test_scenes_are_of_their_split(found):
    for split, things in (("test", range(4, 7)), ("hard", range(7, 10))):
        for each in found[split]:
            scene = each.scene.things
            names = [(thing.color, thing.shape) for thing in scene]
            assert len(scene) in things
            assert len(set(names)) == len(names)
            assert len(set(names) & set(UNSEEN)) in ((1, 2) if split == "hard" else (0,))
            assert all(thing.radius in range(RADII[thing.size][0], RADII[thing.size][1] + 1) for thing in scene)
            for i, one in enumerate(scene):
                assert one.radius < one.x < SIDE - one.radius
                assert one.radius < one.y < SIDE - one.radius
                for two in scene[:i]:
                    assert max(abs(one.x - two.x), abs(one.y - two.y)) > one.radius + two.radius


def of_kind(examples, kind):
    """Each example's question of a kind."""
    return [question for each in examples for question in each.questions if question.kind == kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["test", "hard"])
def test_answers_are_balanced(found, split, kind):
    questions, answers = of_kind(found[split], kind), KINDS[kind].answers
    count, share = len(questions), 1 / len(answers)
    told = Counter(each.answer for each in questions)
    assert set(told) == set(answers)
    assert all(abs(told[answer] - count * share) < 4 * sqrt(count * share * (1 - share)) for answer in answers), told


def test_topics_do_not_favor_an_answer(found):
    """That a color is counted, or an unseen pair asked for, says nothing: half of the questions, and answers as in the others."""
    unseen = {"-".join(pair) for pair in UNSEEN}
    topics = {"how many": lambda words: words[2] in COLORS, "exists": lambda words: words[3] in unseen}
    for kind, topic in topics.items():
        questions = of_kind(found["hard"], kind)
        told = Counter((topic(each.text.split()), each.answer) for each in questions)
        share = 1 / (2 * len(KINDS[kind].answers))
        assert len(told) == 1 / share
        assert all(abs(count - len(questions) * share) < 4 * sqrt(len(questions) * share) for count in told.values()), told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("learned", "asked"), [("train", "test"), ("train", "hard"), ("other hard", "hard")])
def test_a_model_that_reads_words_alone_is_at_chance(found, learned, asked, kind):
    """A naive Bayes of words, pairs of words and their places, trained on as many questions of a kind as it is asked."""
    seen, right = defaultdict(Counter), 0
    answers, chance = KINDS[kind].answers, KINDS[kind].chance(asked)
    learned, asked = (found[learned], found[asked]) if learned in found else (found["hard"][:500], found["hard"][500:])
    for each in of_kind(learned, kind):
        for feature in features(each):
            seen[feature][each.answer] += 1
    for each in of_kind(asked, kind):
        score = {
            answer: sum(log((seen[f][answer] + 1) / (sum(seen[f].values()) + len(answers))) for f in features(each))
            for answer in answers
        }
        right += max(score, key=score.get) == each.answer
    assert right / len(asked) < chance + 3 * sqrt(chance * (1 - chance) / len(asked))


def features(question):
    words = question.text.split()
    return [*words, *pairwise(words), *((i, word) for i, word in enumerate(words))]


def test_what_rolled_places_tell(found):
    """Who compares places after a roll on the torus is often right about relations, and more often by the shorter way round."""
    random, told = Random(0), defaultdict(list)
    around = lambda length: (length + SIDE / 2) % SIDE - SIDE / 2  # noqa: E731
    for each in found["test"]:
        named = {f"{thing.color}-{thing.shape}": (thing.x, thing.y) for thing in each.scene.things}
        move = [8 * random.randrange(SIDE // 8) for _ in range(2)]
        for question in (question for question in each.questions if question.kind in ("side", "nearer")):
            at = [[(c + by) % SIDE for c, by in zip(named[w], move, strict=True)] for w in question.text.split() if w in named]
            for way in (float, around):
                apart = [[way(c - d) for c, d in zip(other, at[0], strict=True)] for other in at[1:]]
                words = question.text.split()
                if question.kind == "nearer":
                    said = hypot(*apart[0]) < hypot(*apart[1])
                else:
                    said = apart[0]["above" in words or "below" in words] * (-1 if {"right", "below"} & set(words) else 1) > 0
                told[question.kind, way].append(said == (question.answer == "yes"))
    shares = {key: 100 * sum(each) / len(each) for key, each in told.items()}
    assert shares == pytest.approx(
        {("side", float): 65, ("side", around): 79, ("nearer", float): 70, ("nearer", around): 86}, abs=4
    )


def test_counts_that_are_not_drawn_first_are_not_balanced(found):
    """So the tests above can fail."""
    told = Counter(count for each in found["test"] for _, count in counts(each.scene.things, "color"))
    assert told["1"] / told.total() > 0.4


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
    assert {kind.category for kind in KINDS.values()} == set(CATEGORIES)
    assert Random(0).random() == 0.8444218515250481  # Python's promise, on which the versions rest
