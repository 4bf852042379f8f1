"""What a plan has found, by design, seed and setting."""

import json
from pathlib import Path
from typing import Any

from benchmarks.spatial_vqa.designs import DESIGNS, MLP
from benchmarks.spatial_vqa.estimates import ALL, Estimate, accuracy, difference, estimate

COMMITTED = Path(__file__).parents[1] / "results" / "spatial_vqa"


def committed(name: str) -> "Results":
    """Those of a plan that lie in this repository."""
    return Results(json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8")))


class Results:
    """A plan's results.

    Args:
        told: What `run.py` writes: all that was found.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.usual = told["runs"][0]["schedule"]
        self.tunings = sorted({run["schedule"]["steps"][1] for run in told["runs"]})

    def runs(
        self, design: str, *, rolled: bool = False, scenes: int | None = None, tuning: int | None = None
    ) -> dict[int, dict[str, Any]]:
        """A design's runs by seed; those that tried other learning rates are left out.

        Args:
            design: Its name.
            rolled: With features that tell wrong places: rolled ones.
            scenes: To learn from; the plan's usual number unless given.
            tuning: Steps of instruction tuning, likewise.
        """
        wanted = (design, rolled, scenes or self.usual["scenes"], tuning or self.usual["steps"][1], DESIGNS[design].scale)
        return {run["seed"]: run for run in self.told["runs"] if _setting(run) == wanted}

    def designs(self, **setting: Any) -> list[str]:
        """Those that have runs, in the order of the comparison."""
        return [name for name in DESIGNS if self.runs(name, **setting)]

    def estimate(self, design: str, split: str, asked_for: str = ALL, **setting: Any) -> Estimate:
        """A design's accuracy, in a category or a kind of question."""
        return estimate([accuracy(run[split], asked_for) for run in self.runs(design, **setting).values()])

    def gain(self, design: str, split: str, category: str = ALL, over: str = MLP.name, **setting: Any) -> Estimate | None:
        """A design's accuracy less another's."""
        return difference(self.runs(design, **setting), self.runs(over, **setting), split, category)


def told_features(rolled: bool) -> str:
    """What a run's features are called."""
    return "rolled" if rolled else "plain"


def _setting(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["design"], run["rolled"], run["schedule"]["scenes"], run["schedule"]["steps"][1], run["scale"]
