"""The page's pictures, from the committed results. benchmarks/figures.py draws them."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot

from benchmarks.spatial_vqa import dense_or_factorized
from benchmarks.spatial_vqa.attention import PICTURES, noise_pixels
from benchmarks.spatial_vqa.designs import BLIND, DETAIL, MAIN, MLP, WITHOUT_A_PYRAMID
from benchmarks.spatial_vqa.estimates import ALL, accuracy, chance
from benchmarks.spatial_vqa.results import Results, committed, features_name
from benchmarks.spatial_vqa.splits import example, pictures

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def draw() -> None:
    """All of the pages' pictures."""
    results = committed("full")
    curves(results)
    gains(results)
    attention_maps(results)
    dense_or_factorized.draw(IMAGES)


def curves(results: Results) -> None:
    """Validation over the steps of instruction tuning, with rolled features in position too: each seed, and the mean."""
    settings = [(rolled, tuning) for tuning in results.tunings for rolled in (False, True)]
    settings = [(rolled, tuning) for rolled, tuning in settings if results.designs(rolled=rolled, tuning=tuning)]
    panels = [(*each, group) for each in settings for group in ((ALL, "position") if each[0] else (ALL,))]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(0.4 + 4 * len(panels), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (rolled, tuning, group) in zip(axes.flat, panels, strict=True):
        for number, name in enumerate(each.name for each in (*MAIN, BLIND, *WITHOUT_A_PYRAMID)):
            runs = list(results.runs(name, rolled=rolled, tuning=tuning).values())
            if runs:
                steps = [each["step"] for each in runs[0]["curve"]]
                seeds = [[accuracy(each["validation"], group) for each in run["curve"]] for run in runs]
                axis.plot(steps, list(zip(*seeds, strict=True)), color=f"C{number}", linewidth=0.6, alpha=0.6)
                heights = [mean(each) for each in zip(*seeds, strict=True)]
                axis.plot(steps, heights, marker="o", markersize=3, label=name, color=f"C{number}")
        axis.axhline(chance("validation", group), color="grey", linewidth=1, linestyle=":")
        what = "" if group == ALL else f": {group}"
        axis.set(title=f"{features_name(rolled)} features, {tuning:,} steps{what}", xlabel="steps of instruction tuning")
    axes[0][0].set(ylim=(20, 100), ylabel="validation, % (dotted: chance)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=9)
    _save(figure, "spatial-vqa-curves.png")


def gains(results: Results) -> None:
    """What each design gains over the MLP in questions of position, with its 95 % interval over seeds, in each setting."""
    settings = [(rolled, tuning) for rolled in (False, True) for tuning in results.tunings]
    settings = [(rolled, tuning) for rolled, tuning in settings if results.designs(rolled=rolled, tuning=tuning)]
    names = [each.name for each in (*MAIN, *WITHOUT_A_PYRAMID) if each.name != MLP.name][::-1]
    figure, axes = pyplot.subplots(1, len(settings), figsize=(0.4 + 3.6 * len(settings), 2.9), sharey=True, layout="constrained")
    for axis, (rolled, tuning) in zip(axes, settings, strict=True):
        for height, name in enumerate(names):
            gain = results.gain(name, "test", "position", rolled=rolled, tuning=tuning)
            if gain is not None:
                half = gain.half if gain.count > 1 else 0  # of one seed there is no interval
                axis.errorbar(gain.mean, height, xerr=half, fmt="o" if half else "x", color=f"C{int(gain.is_sure)}", capsize=3)
        axis.axvline(0, color="gray", linewidth=1, linestyle=":")
        axis.set(title=f"{features_name(rolled)} features, {tuning:,} steps", xlabel="points over the MLP", xlim=(-55, 105))
    axes[0].set_yticks(range(len(names)), names)
    _save(figure, "spatial-vqa-gains.png")


def attention_maps(results: Results) -> None:
    """What each spatial token looks up in one scene and in noise, from one run of the smallest detail map of each variant.

    Each row has a scale of its own, from zero to its largest weight.
    """
    chosen = [
        (each.name, run) for each in DETAIL for run in list(results.runs(each.name).values())[:1] if each.name.endswith("5 x 5")
    ]
    if not chosen:
        return
    pictures_of = {"scenes": pictures([example("test", 0)])[0], "noise": noise_pixels(PICTURES)[0].permute(1, 2, 0) / 2 + 0.5}
    figure, axes = pyplot.subplots(2 * len(chosen), 7, figsize=(10.5, 3.2 * len(chosen)), squeeze=False, layout="constrained")
    for row, (name, kind, run) in enumerate((name, kind, run) for name, run in chosen for kind in ("scenes", "noise")):
        maps = run["attention"][kind]["map"]
        side = round(len(maps[0]) ** 0.5)
        axes[row][0].imshow(pictures_of[kind])
        axes[row][0].set(xticks=[], yticks=[])
        for number, (axis, flat) in enumerate(zip(axes[row][1:], maps, strict=True), 1):
            drawn = axis.imshow([flat[at : at + side] for at in range(0, len(flat), side)], vmin=0, vmax=max(map(max, maps)))
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"token {number}", fontsize=8)
        figure.colorbar(drawn, ax=list(axes[row]), fraction=0.02, pad=0.01, label="weight")
        axes[row][0].set_ylabel(f"{name.split(' + ')[0]}\n{kind}", fontsize=8)
    _save(figure, "spatial-vqa-attention.png")


def _save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})
