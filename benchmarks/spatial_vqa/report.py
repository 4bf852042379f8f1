"""The page's tables and pictures, from the committed results: none is typed by hand. benchmarks/figures.py writes them."""

import json
from pathlib import Path
from typing import Any

from benchmarks.spatial_vqa.designs import DESIGNS, DETAIL, MLP
from benchmarks.spatial_vqa.estimates import ALL, Estimate, accuracy, chance, difference, estimate, of_design
from benchmarks.spatial_vqa.questions import CATEGORIES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "spatial_vqa"
IMAGES = ROOT / "docs" / "images"

# LLaVA-SP with CLIP-ViT-L and Vicuna-7B: the average of 11 benchmarks, LLaVA-1.5's taken off (tables 3, 4 and 6), and of table 5's
# six spatial tasks.
PAPER = {
    "SFE cropping": "+1.2; spatial +2.4",
    "SFE pooling": "+1.5; spatial +2.3",
    "transformer blocks, cropping": "+1.1",
    "transformer blocks, pooling": "+1.0",
    "1 token": "0.0",
    "3 tokens, cropping": "+0.7",
    "sliding window, 6 tokens": "spatial +0.6",
}


class Results:
    """A plan's committed results.

    Args:
        name: The plan's.
    """

    def __init__(self, name: str) -> None:
        self.told: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        most = max(run["schedule"]["scenes"] for run in self.told["runs"])
        self.main = [run for run in self.told["runs"] if run["schedule"]["scenes"] == most]
        self.less = [run for run in self.told["runs"] if run["schedule"]["scenes"] != most]

    def estimate(self, design: str, split: str, category: str = ALL) -> Estimate | None:
        """A design's accuracy."""
        runs = of_design(self.main, design).values()
        return estimate([accuracy(run[split], category) for run in runs]) if runs else None

    def gain(self, design: str, split: str, category: str = ALL, over: str = MLP.name) -> Estimate | None:
        """A design's accuracy less another's."""
        return difference(of_design(self.main, design), of_design(self.main, over), split, category)

    @property
    def designs(self) -> list[str]:
        """Those that have runs, in the order of the comparison."""
        return [name for name in DESIGNS if of_design(self.main, name)]


def setting(results: Results) -> str:
    """On what, and how much."""
    told, machine = results.told, results.told["machine"]
    steps, seeds = results.main[0]["schedule"]["steps"], sorted({run["seed"] for run in results.main})
    vision, words = told["pretrained"]["encoder"], told["pretrained"]["language_model"]
    hours = sum(run["seconds"] for run in told["runs"]) / 3600
    return (
        f"{len(told['runs'])} of {told['planned']} runs of the plan `{told['plan']['name']}`, seeds {', '.join(map(str, seeds))}: "
        f"{results.main[0]['schedule']['scenes']} training scenes, {steps[0]} steps of alignment and {steps[1]} of instruction tuning, "
        f"{told['plan']['held_out']['test']} test and {told['plan']['held_out']['hard']} hard scenes of eight questions. The encoder finds a "
        f"picture's caption among {told['plan']['vision']['batch_size']} in {vision['right']:.0%} of cases. "
        f"{machine['device']}, torch {machine['versions']['torch']}, {machine['date']}; {hours:.1f} hours of one core, "
        f"and {(vision['seconds'] + words['seconds']) / 3600:.1f} for the encoder and the language model.\n"
    )


def comparison(results: Results) -> str:
    """Each design, and what it has over the MLP."""
    rows = []
    for name in results.designs:
        runs = list(of_design(results.main, name).values())
        row = [name, DESIGNS[name].compares, f"{runs[0]['projector_parameters'] / 1e6:.2f} M"]
        row.append(f"{sum(run['seconds'] for run in runs) / len(runs):.0f}")
        for split in ("test", "hard"):
            row += [str(results.estimate(name, split)), "" if name == MLP.name else told_gain(results.gain(name, split))]
        rows.append(row)
    columns = ["design", "what for", "projector", "seconds", "test, %", "over the MLP", "hard, %", "over the MLP"]
    return table(columns, rows)


def categories(results: Results, split: str) -> str:
    """Accuracies by category, beside chance and what the language model answers from words."""
    words = results.told["pretrained"]["from_words"][split]
    rows = [["chance", *(f"{chance(each):.1f}" for each in (*CATEGORIES, ALL))]]
    rows += [[name, *(str(results.estimate(name, split, each)) for each in (*CATEGORIES, ALL))] for name in results.designs]
    rows.append(["the language model, told in words", *(f"{accuracy(words, each):.1f}" for each in (*CATEGORIES, ALL))])
    return table([f"{split}, %", *CATEGORIES, "mean"], rows)


def beside_the_paper(results: Results) -> str:
    """Gains over the MLP, here and in the paper."""
    rows = [
        (name, PAPER[name], *(told_gain(results.gain(name, split)) for split in ("test", "hard")))
        for name in results.designs if name in PAPER
    ]  # fmt: skip
    return table(["over the MLP, in points", "the paper (Avg^N)", "here, test", "here, hard"], rows)


def told_gain(gain: Estimate | None) -> str:
    """A difference, in bold where its interval leaves zero out."""
    if gain is None:
        return "not run"
    text = f"{gain.mean:+.1f} ± {gain.half:.1f}" if gain.count > 1 else f"{gain.mean:+.1f} (one seed)"
    return f"**{text}**" if gain.is_sure else text


def details(results: Results) -> str:
    """Table 6 and figure 5: what the integrator adds, and how unequal its attention is."""
    rows = []
    for design in DETAIL:
        runs = list(of_design(results.main, design.name).values())
        if not runs:
            continue
        without = design.name.split(" + ")[0]
        looks = [[str(ratio(run["attention"][kind]["max_over_min"] for run in runs)) for kind in ("scenes", "noise")]]
        rows.append(
            [design.name, *(told_gain(results.gain(design.name, split, over=without)) for split in ("test", "hard")), *looks[0]]
        )
    return table(["", "over the same without, test", "hard", "max / min attention, scenes", "noise"], rows)


def ratio(values) -> str:
    """The seeds' values, least to most."""
    ordered = sorted(values)
    return f"{ordered[0]:.3g} to {ordered[-1]:.3g}"


def table(columns: list[str], rows: list) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines) + "\n"
