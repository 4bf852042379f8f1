"""Means over seeds with their 95 % intervals, and what chance gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from spatial_tokens.demo.questions import CATEGORIES, KINDS

ALL = "all"
ONE = " (one seed)"  # of which there is no interval
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the 97.5 % points of t for 1 to 9 degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}" if self.count > 1 else f"{self.mean:.1f}{ONE}"

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.count > 1 and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value a seed."""
    if len(values) < 2:
        return Estimate(values[0], float("inf"), 1)
    return Estimate(mean(values), STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5, len(values))


def accuracy(counts: dict[str, list[int]], group: str = ALL) -> float:
    """Right answers in percent: of a category or a kind of question, or the mean over categories.

    Args:
        counts: How many questions of each kind were answered rightly, of how many.
        group: The category, the kind, or ALL.
    """
    if group == ALL:
        return mean(accuracy(counts, each) for each in CATEGORIES)
    right, asked = zip(*(counts[kind] for kind in kinds_of(group)), strict=True)
    return 100 * sum(right) / sum(asked)


def kinds_of(group: str) -> list[str]:
    """A category's kinds of questions; of a kind, that one."""
    return [name for name, kind in KINDS.items() if group in (name, kind.category)]


def sampling_error(counts: dict[str, list[int]]) -> float:
    """Half of the 95 % interval that the mean over categories has by the draw of questions alone, were each drawn by itself."""
    variance = 0.0
    for category in CATEGORIES:
        found = [counts[kind] for kind in kinds_of(category)]
        variance += sum(right * (1 - right / asked) for right, asked in found) / sum(asked for _, asked in found) ** 2
    return 196 * sqrt(variance) / len(CATEGORIES)


def chance(split: str, group: str = ALL) -> float:
    """What guessing among a question's answers gives, in percent: of a category or a kind, or the mean over categories."""
    if group == ALL:
        return mean(chance(split, each) for each in CATEGORIES)
    return mean(100 * KINDS[kind].chance(split) for kind in kinds_of(group))


def difference(
    runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]], split: str, category: str = ALL
) -> Estimate | None:
    """Of accuracies, seed by seed: the same seed gave both the same scenes in the same order."""
    both = sorted(runs.keys() & others.keys())
    if not both:
        return None
    return estimate([accuracy(runs[seed][split], category) - accuracy(others[seed][split], category) for seed in both])
