"""A plan's committed results, by design and seed."""

import json
from pathlib import Path
from typing import Any

from benchmarks.spatial_vqa.designs import DESIGNS, MLP
from benchmarks.spatial_vqa.estimates import ALL, Estimate, accuracy, difference, estimate

COMMITTED = Path(__file__).parents[1] / "results" / "spatial_vqa"


class Results:
    """A plan's committed results.

    Args:
        name: The plan's.
    """

    def __init__(self, name: str) -> None:
        self.told: dict[str, Any] = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))
        self.most = max(run["schedule"]["scenes"] for run in self.told["runs"])

    def runs(self, design: str, *, rolled: bool = False, scenes: int | None = None) -> dict[int, dict[str, Any]]:
        """A design's runs by seed; those that tried other learning rates are left out."""
        wanted = (design, rolled, scenes or self.most, DESIGNS[design].scale)
        found = ((run["design"], run["rolled"], run["schedule"]["scenes"], run["scale"]) for run in self.told["runs"])
        return {run["seed"]: run for run, key in zip(self.told["runs"], found, strict=True) if key == wanted}

    def designs(self, **setting: Any) -> list[str]:
        """Those that have runs, in the order of the comparison."""
        return [name for name in DESIGNS if self.runs(name, **setting)]

    def estimate(self, design: str, split: str, category: str = ALL, **setting: Any) -> Estimate:
        """A design's accuracy."""
        return estimate([accuracy(run[split], category) for run in self.runs(design, **setting).values()])

    def gain(self, design: str, split: str, category: str = ALL, over: str = MLP.name, **setting: Any) -> Estimate | None:
        """A design's accuracy less another's."""
        return difference(self.runs(design, **setting), self.runs(over, **setting), split, category)
