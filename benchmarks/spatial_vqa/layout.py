"""Texts that are laid out: names, each with its size, its column and its row beside it, as LayoutLM's words carry their places.

So the language model learns from words alone what left, nearer and larger mean, and reads one token a place, as it will read
patches. It never learns the patches' order: a text's places stand in any order.
"""

from collections.abc import Sequence
from random import Random

from benchmarks.spatial_vqa.words import IDS, START
from spatial_tokens.demo.questions import CELL
from spatial_tokens.demo.scenes import SIDE, Thing

NOTHING = -1
GRID = SIDE // CELL  # 12 x 12: half the paper's 24 x 24, each way
MOST_EMPTY = 24  # empty places of a text, at most

Place = tuple[int, int, int, int]  # ids: a name, or a full stop where nothing is; size, column and row, or NOTHING


def lay_out(things: Sequence[Thing], random: Random, spread: bool) -> list[Place]:
    """A text of some things, each at its centre or, `spread`, at some of the places that it covers; and of empty places."""
    places, taken = [], set()
    for each in things:
        covered = cover(each) if spread else [(each.x // CELL, each.y // CELL)]
        kept = random.sample(covered, random.randint(1, len(covered)))
        places += [(IDS[each.name], IDS[each.size], *_where(place)) for place in kept]
        taken |= set(covered)
    free = [(column, row) for column in range(GRID) for row in range(GRID) if (column, row) not in taken]
    places += [(IDS["."], NOTHING, *_where(place)) for place in random.sample(free, random.randint(0, MOST_EMPTY))]
    random.shuffle(places)
    return [(IDS[START], NOTHING, NOTHING, NOTHING), *places]


def cover(thing: Thing) -> list[tuple[int, int]]:
    """The columns and rows that a thing is in."""
    columns, rows = (range((c - thing.radius) // CELL, (c + thing.radius) // CELL + 1) for c in (thing.x, thing.y))
    return [(column, row) for row in rows for column in columns]


def _where(place: tuple[int, int]) -> tuple[int, int]:
    return IDS[f"column-{place[0]}"], IDS[f"row-{place[1]}"]
