"""Text as tokens, one a word; and a picture's questions as one sequence, in which none sees another.

A row is a prefix (a picture's tokens, or a text that is laid out) and, after it, segments: a question with its answer each. A
segment attends to the prefix and to itself and counts its positions from the prefix's end, so each question is read as if it stood
alone, at the price of one prefix for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.spatial_vqa.splits import Example
from spatial_tokens.demo.questions import CELL, COUNTS, QUADRANTS, THIRDS, YES_NO, Question, plurals, record
from spatial_tokens.demo.scenes import COLORS, PAIRS, RADII, SHAPES, SIDE, Thing

PAD, START, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPOKEN = "a is are there the which what how many color things in of left right above below nearer than to larger quadrant third"
WORDS = [
    PAD, START, END, IMAGE,
    *dict.fromkeys((
        *SPOKEN.split(), "?", ".", *map("-".join, PAIRS), *COLORS, *SHAPES, *plurals(), *RADII, *YES_NO, *QUADRANTS, *THIRDS,
        *COUNTS, *(f"{axis}-{each}" for axis in ("column", "row") for each in range(SIDE // CELL)),
    )),
]  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
IGNORED = -100


def encode(text: str) -> list[int]:
    """A text's ids; all of its words are known."""
    return [IDS[word] for word in text.split()]


@dataclass(frozen=True)
class Tokens:
    """How a language model reads text.

    Args:
        encode: A text's ids. A word and the space before it have the same ids after any text.
        end: The id that ends a caption.
        image: The id that stands for a patch, and in no text.
    """

    encode: Callable[[str], list[int]]
    end: int
    image: int


OWN = Tokens(encode, IDS[END], IDS[IMAGE])  # those of the language model that is trained here


@dataclass(frozen=True)
class Segment:
    """Ids that follow a prefix; the last `learned` of them are what is to be said, to a question of a kind if it is one."""

    ids: list[int]
    learned: int
    kind: str | None = None


def questions_of(questions: Sequence[Question], tokens: Tokens = OWN) -> list[Segment]:
    """Each question with its answer: one word, of one token or of more."""
    told = [(tokens.encode(each.text), tokens.encode(f" {each.answer}"), each.kind) for each in questions]
    return [Segment([*asked, *answer], len(answer), kind) for asked, answer, kind in told]


def records_of(things: Sequence[Thing]) -> list[Segment]:
    """Each thing's name, after which its size, column and row are to be said."""
    return [Segment(encode(f"{each.name} {record(each)}"), 3) for each in things]


def list_of(example: Example, tokens: Tokens = OWN) -> Segment:
    """What there is, in reading order: a caption."""
    ids = [*tokens.encode(example.reading), tokens.end]
    return Segment(ids, len(ids))


@dataclass(frozen=True)
class Rows:
    """A batch: `ids`, `positions` and `labels` `(B, L)`, and the mask `(B, 1, L, L)` of what sees what.

    A label stands where it is predicted: on the token before.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        return Rows(*(each.to(device) for each in (self.ids, self.positions, self.labels, self.mask)))


def pack(prefixes: Sequence[Sequence[int]], segments: Sequence[Sequence[Segment]]) -> Rows:
    """Rows of a prefix each and its segments, padded on the right."""
    length = max(len(p) + sum(len(each.ids) for each in s) for p, s in zip(prefixes, segments, strict=True))
    shape = (len(prefixes), length)
    ids, positions, part = (torch.full(shape, value) for value in (0, 0, -1))
    labels = torch.full(shape, IGNORED)
    for row, (prefix, following) in enumerate(zip(prefixes, segments, strict=True)):
        at = len(prefix)
        ids[row, :at], positions[row, :at], part[row, :at] = torch.tensor(prefix), torch.arange(at), 0
        for number, each in enumerate(following, 1):
            here = slice(at, at + len(each.ids))
            ids[row, here], part[row, here] = torch.tensor(each.ids), number
            positions[row, here] = torch.arange(len(prefix), len(prefix) + len(each.ids))
            first = len(each.ids) - each.learned
            for offset in range(max(first, 1), len(each.ids)):
                labels[row, at + offset - 1] = each.ids[offset]
            if first == 0:  # the prefix's last token foretells it
                labels[row, len(prefix) - 1] = each.ids[0]
            at += len(each.ids)
    sees = (part[:, None, :] == part[:, :, None]) | ((part[:, None, :] == 0) & (part[:, :, None] > 0))
    sees &= torch.ones(length, length, dtype=torch.bool).tril()
    return Rows(ids, positions, labels, sees[:, None])
