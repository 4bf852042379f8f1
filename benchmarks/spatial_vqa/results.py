"""What a plan has found, by design, seed and setting."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.spatial_vqa.designs import DESIGNS, MLP
from benchmarks.spatial_vqa.estimates import ALL, Estimate, accuracy, difference, estimate
from benchmarks.spatial_vqa.training import KernelRate

COMMITTED = Path(__file__).parents[1] / "results" / "spatial_vqa"


def committed(name: str) -> "Results":
    """Those of a plan that lie in this repository."""
    return Results(json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8")))


class Results:
    """A plan's results.

    Args:
        values: What `run.py` writes: all that was found.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.usual = values["runs"][0]["schedule"]
        self.tunings = sorted({run["schedule"]["steps"][1] for run in values["runs"]})

    def runs_by_rate(
        self, design: str, *, rolled: bool = False, scenes: int | None = None, tuning: int | None = None
    ) -> dict[KernelRate, dict[int, dict[str, Any]]]:
        """A design's runs by the rate of its kernels and by seed; those that tried other rates of all the projector are left out.

        Args:
            design: Its name.
            rolled: With features that tell wrong places: rolled ones.
            scenes: To learn from; the plan's usual number unless given.
            tuning: Steps of instruction tuning, likewise.
        """
        wanted = (design, rolled, scenes or self.usual["scenes"], tuning or self.usual["steps"][1], DESIGNS[design].scale)
        found: dict[KernelRate, dict[int, dict[str, Any]]] = {}
        for run in self.values["runs"]:
            if _setting(run) == wanted:
                found.setdefault(KernelRate(**run.get("kernel_rate", {})), {})[run["seed"]] = run
        return found

    def validation_by_rate(self, design: str, **setting: Any) -> dict[KernelRate, list[float]]:
        """Accuracy on validation at the end of training, of each seed, by the rate of the kernels.

        Rates are compared that were tried on three seeds, or on as many as any was, on the seeds that all of them have.
        """
        tried = self.runs_by_rate(design, **setting)
        enough = min(3, max(map(len, tried.values()), default=0))
        rates = [rate for rate, runs in tried.items() if len(runs) >= enough]
        seeds = sorted(set.intersection(*(set(tried[rate]) for rate in rates))) if rates else []
        if not seeds:  # single runs of different seeds
            rates, seeds = rates[:1], [seed for rate in rates[:1] for seed in tried[rate]]
        return {rate: [accuracy(tried[rate][seed]["curve"][-1]["validation"]) for seed in seeds] for rate in rates}

    def kernel_rate(self, design: str, **setting: Any) -> KernelRate | None:
        """The rate of the kernels that validation prefers: for every design and in each setting by the same rule.

        Of the rates that are compared it is that of the highest mean. Test and hard scenes have no say.
        """
        found = self.validation_by_rate(design, **setting)
        return max(found, key=lambda rate: mean(found[rate]), default=None)

    def runs(self, design: str, **setting: Any) -> dict[int, dict[str, Any]]:
        """A design's runs by seed, in a setting as `runs_by_rate` takes it, at the rate of its kernels that validation prefers."""
        rate = self.kernel_rate(design, **setting)
        return {} if rate is None else self.runs_by_rate(design, **setting)[rate]

    def designs(self, **setting: Any) -> list[str]:
        """Those that have runs, in the order of the comparison."""
        return [name for name in DESIGNS if self.runs(name, **setting)]

    def estimate(self, design: str, split: str, group: str = ALL, **setting: Any) -> Estimate:
        """A design's accuracy, in a category or a kind of question."""
        return estimate([accuracy(run[split], group) for run in self.runs(design, **setting).values()])

    def gain(self, design: str, split: str, category: str = ALL, over: str = MLP.name, **setting: Any) -> Estimate | None:
        """A design's accuracy less another's."""
        return difference(self.runs(design, **setting), self.runs(over, **setting), split, category)

    def with_runs_of(self, other: "Results") -> "Results":
        """These with the runs of another plan that are not among them; these alone if its encoder or language model is another."""
        if _made_from(self.values) != _made_from(other.values):
            return self
        own = {identity(run) for run in self.values["runs"]}
        return Results(
            {**self.values, "runs": [*self.values["runs"], *(run for run in other.values["runs"] if identity(run) not in own)]}
        )

    def count_repeated(self, other: "Results") -> tuple[int, int]:
        """How many runs another plan has too, and how many of them gave the same answers there."""
        theirs = {identity(run): run for run in other.values["runs"]}
        pairs = [(run, theirs[identity(run)]) for run in self.values["runs"] if identity(run) in theirs]
        return len(pairs), sum(all(one[split] == two[split] for split in ("test", "hard")) for one, two in pairs)


def features_name(rolled: bool) -> str:
    """What a run's features are called."""
    return "rolled" if rolled else "plain"


def _setting(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["design"], run["rolled"], run["schedule"]["scenes"], run["schedule"]["steps"][1], run["scale"]


def identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """Which of a plan's runs it is."""
    return *_setting(run), KernelRate(**run.get("kernel_rate", {})), run["seed"]


def _made_from(values: dict[str, Any]) -> Any:
    plan = {name: value for name, value in values["plan"].items() if name != "name"}
    trained = [values["pretrained"][name]["right"] for name in ("encoder", "language_model") if name in values["pretrained"]]
    return values["benchmark"], plan, trained
