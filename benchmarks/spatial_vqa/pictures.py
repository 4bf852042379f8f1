"""The page's pictures, from the committed results. benchmarks/figures.py draws them."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot

from benchmarks.spatial_vqa.designs import BLIND, DETAIL, MAIN
from benchmarks.spatial_vqa.estimates import accuracy, chance
from benchmarks.spatial_vqa.results import Results, committed

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def draw() -> None:
    """All of the page's pictures."""
    results = committed("full")
    curves(results)
    attention_maps(results)


def curves(results: Results) -> None:
    """Accuracy on validation over the steps of instruction tuning: each seed, and their mean."""
    settings = [(rolled, tuning) for tuning in results.tunings for rolled in (False, True)]
    settings = [(rolled, tuning) for rolled, tuning in settings if results.designs(rolled=rolled, tuning=tuning)]
    figure, axes = pyplot.subplots(1, len(settings), figsize=(0.4 + 4.5 * len(settings), 3.6), sharey=True, squeeze=False)
    for axis, (rolled, tuning) in zip(axes.flat, settings, strict=True):
        for number, name in enumerate(each.name for each in (*MAIN, BLIND)):
            runs = list(results.runs(name, rolled=rolled, tuning=tuning).values())
            if runs:
                steps = [each["step"] for each in runs[0]["curve"]]
                seeds = [[accuracy(each["validation"]) for each in run["curve"]] for run in runs]
                axis.plot(steps, list(zip(*seeds, strict=True)), color=f"C{number}", linewidth=0.6, alpha=0.6)
                heights = [mean(each) for each in zip(*seeds, strict=True)]
                axis.plot(steps, heights, marker="o", markersize=3, label=name, color=f"C{number}")
        axis.axhline(chance("validation"), color="grey", linewidth=1, linestyle=":")
        axis.set(title=f"{'rolled' if rolled else 'plain'} features, {tuning:,} steps", ylim=(30, 100))
        axis.set_xlabel("steps of instruction tuning")
    axes[0][0].set_ylabel("validation, % (dotted: chance)")
    axes[0][0].legend(fontsize=7, loc="center right")
    _save(figure, "spatial-vqa-curves.png")


def attention_maps(results: Results) -> None:
    """What each spatial token looks up in one scene and in noise, from one run of the smallest detail map of each variant."""
    chosen = [
        (each.name, run) for each in DETAIL for run in list(results.runs(each.name).values())[:1] if each.name.endswith("5 x 5")
    ]
    if not chosen:
        return
    figure, axes = pyplot.subplots(2 * len(chosen), 6, figsize=(9, 3.2 * len(chosen)), squeeze=False)
    for row, (name, kind, run) in enumerate((name, kind, run) for name, run in chosen for kind in ("scenes", "noise")):
        maps = run["attention"][kind]["map"]
        side = round(len(maps[0]) ** 0.5)
        for number, (axis, flat) in enumerate(zip(axes[row], maps, strict=True), 1):
            axis.imshow([flat[at : at + side] for at in range(0, len(flat), side)], vmin=0, vmax=max(map(max, maps)))
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"token {number}", fontsize=8)
        axes[row][0].set_ylabel(f"{name.split(' + ')[0]}\n{kind}", fontsize=8)
    _save(figure, "spatial-vqa-attention.png")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})
