"""The page's tables, from the committed results: none is typed by hand. benchmarks/figures.py writes them."""

from collections.abc import Iterable, Sequence
from itertools import product
from statistics import mean, median
from typing import Any

from benchmarks.spatial_vqa.designs import DESIGNS, DETAIL, LEARNED, MAIN, MLP, WITHOUT_A_PYRAMID
from benchmarks.spatial_vqa.estimates import ALL, ONE, Estimate, accuracy, chance, estimate, sampling_error
from benchmarks.spatial_vqa.results import Results, committed, features_name
from spatial_tokens.demo.questions import CATEGORIES, KINDS

SPLITS = ("test", "hard")
OVER = "over the MLP"

PAPER = {  # LLaVA-SP with CLIP-ViT-L and Vicuna-7B: points over LLaVA-1.5; table 5's cropping row is table 8's, with DFI
    "SFE cropping": ("+1.2", "", "3"),
    "SFE pooling": ("+1.5", "", "3"),
    "transformer blocks, cropping": ("+1.1", "", "3"),
    "transformer blocks, pooling": ("+1.0", "", "3"),
    "1 token": ("0.0", "", "4"),
    "3 tokens, cropping": ("+0.7", "", "4"),
    "sliding window, 6 tokens": ("", "+0.6", "5"),
    "SFE cropping + DFI 11 x 11": ("+1.3", "", "6"),
    "SFE cropping + DFI 9 x 9": ("+0.8", "", "6"),
    "SFE cropping + DFI 7 x 7": ("+1.3", "", "6"),
    "SFE cropping + DFI 5 x 5": ("+1.4", "+2.4", "5, 6, 8"),
    "SFE pooling + DFI 11 x 11": ("+1.3", "", "6"),
    "SFE pooling + DFI 9 x 9": ("+1.0", "", "6"),
    "SFE pooling + DFI 7 x 7": ("+0.9", "", "6"),
    "SFE pooling + DFI 5 x 5": ("+1.7", "+2.3", "6, 8"),
}


def designs_page() -> str:
    """The designs with plain features and the usual tuning."""
    results = committed("full")
    parts = [
        setting(results),
        "### Each design\n", comparison(results),
        "### By category\n", categories(results, "test"), categories(results, "hard"),
        gains(results, "test"), gains(results, "hard"),
        "### By kind of question\n", kinds(results, "test"), kinds(results, "hard"),
        "### Beside the paper\n", paper_comparison(results),
    ]  # fmt: skip
    return "\n".join(parts)


def settings_page() -> str:
    """Other settings, and what the models use."""
    results = committed("full")
    parts = [
        "### With longer tuning\n", longer_tuning(results, rolled=False),
        "### Where features tell wrong places\n", patches(results), longer_tuning(results, rolled=True),
        "### With another picture's tokens\n", exchanged_tokens(results),
        "### On fewer scenes\n", fewer_scenes(results),
        "### Learning rates\n", trials(results),
        "### Detail, and its attention\n", details(results),
        "### The quick run\n", quick_run(committed("quick")),
    ]  # fmt: skip
    return "\n".join(parts)


def front_page() -> str:
    """What stands beside the verdict: how much was run, and each setting."""
    results = committed("full")
    return "\n".join([setting(results), overview(results)])


def setting(results: Results) -> str:
    """On what, and how much."""
    values, machine, plan = results.values, results.values["machine"], results.values["plan"]
    run = next(iter(results.runs(MLP.name).values()))
    schedule, batch_size = run["schedule"], run.get("batch_size", 32)  # files before 0.2 do not say
    vision, words = values["pretrained"]["encoder"], values["pretrained"]["language_model"]
    hours = sum(run["seconds"] for run in values["runs"]) / 3600
    days = sorted({run["date"] for run in values["runs"]})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return (
        f"{len(values['runs'])} of {values['planned']} runs of the plan `{plan['name']}`: {schedule['scenes']} training scenes in "
        f"batches of {batch_size}, {schedule['steps'][0]} steps of alignment and {schedule['steps'][1]} of instruction tuning, "
        f"{plan['held_out']['test']} test scenes and {plan['held_out']['hard']} hard ones, of eight questions each. "
        f"{machine['device']}, torch {machine['versions']['torch']}, {when}; {hours:.1f} hours of one core for training "
        f"and {(vision['seconds'] + words['seconds']) / 3600:.1f} for the encoder and the language model.\n"
    )


def summary(results: Results) -> str:
    """In short: each design, and what it has over the MLP."""
    rows = []
    for name in results.designs():
        row = [name, len(results.runs(name))]
        for split in SPLITS:
            row += [str(results.estimate(name, split)).removesuffix(ONE), format_gain(results.gain(name, split)).removesuffix(ONE)]
        rows.append(row if name != MLP.name else [*row[:3], "", row[4], ""])
    return table(["design", "seeds", "test, %", OVER, "hard, %", OVER], rows)


def caution(results: Results) -> str:
    """What the summary does not tell by itself."""
    drawn = sampling_error(results.values["runs"][0]["test"])
    return (
        f"± is half of the 95 % interval over seeds. The draw of the questions alone moves a design by ± {drawn:.1f} points; "
        "one seed says nothing of how far seeds lie apart: docs/evidence.md."
    )


def overview(results: Results) -> str:
    """What was tried on rolled features, in each setting: the mean accuracy, and that of position, which only places can tell."""
    rows, names = [], [each.name for each in (*MAIN, *WITHOUT_A_PYRAMID)]
    for rolled, tuning, name in product((False, True), results.tunings, names):
        setting: dict[str, Any] = {"rolled": rolled, "tuning": tuning}
        if runs := results.runs(name, **setting):
            row: list[Any] = [features_name(rolled), tuning, name, len(runs)]
            for split, category in ((SPLITS[0], "position"), *((split, ALL) for split in SPLITS)):
                gain = "" if name == MLP.name else format_gain(results.gain(name, split, category, **setting))
                row += [results.estimate(name, split, category, **setting), gain]
            rows.append(row)
    columns = ["features", "steps", "design", "seeds", "position", OVER, "mean", OVER, "hard, mean", OVER]
    return table(columns, rows)


def comparison(results: Results) -> str:
    """Each design, and what it has over the MLP."""
    rows = []
    for name in results.designs():
        runs = results.runs(name).values()
        size = f"{next(iter(runs))['projector_parameters'] / 1e6:.2f} M"
        each = ", ".join(f"{accuracy(run['test']):.0f}" for run in runs)
        row = [name, DESIGNS[name].compares, size, f"{min(run['seconds'] for run in runs):.0f}", each]
        for split in SPLITS:
            row += [str(results.estimate(name, split)), "" if name == MLP.name else format_gain(results.gain(name, split))]
        rows.append(row)
    columns = ["design", "what for", "projector", "seconds", "test of each seed", "test, %", OVER, "hard, %", OVER]
    return table(columns, rows)


def categories(results: Results, split: str, *, exchanged: bool = False, **setting: Any) -> str:
    """Accuracies by category.

    Args:
        results: All of them.
        split: Whose questions.
        exchanged: Whether what is left with another picture's spatial tokens stands below a design's own.
        setting: Of the runs.
    """
    return _accuracies(results, split, results.designs(**setting), (*CATEGORIES, ALL), exchanged, setting)


def kinds(results: Results, split: str) -> str:
    """The main designs' accuracies by kind of question."""
    return _accuracies(results, split, [each.name for each in MAIN], tuple(KINDS), False, {})


def _accuracies(
    results: Results, split: str, designs: Sequence[str], columns: Sequence[str], exchanged: bool, setting: dict[str, Any]
) -> str:
    """Accuracies beside chance and what the language model answers from words."""
    words = results.values["pretrained"]["from_words"][split]
    rows = [["chance", *(f"{chance(split, each):.1f}" for each in columns)]]
    for name in designs:
        runs = list(results.runs(name, **setting).values())
        rows.append([name, *(str(results.estimate(name, split, each, **setting)) for each in columns)])
        if exchanged and exchangeable(name, runs):
            left = (estimate([accuracy(run["strangers"]["spatial"], each) for run in runs]) for each in columns)
            rows.append(["… with another picture's spatial tokens", *map(str, left)])
    rows.append(["the language model, told in words", *(f"{accuracy(words, each):.1f}" for each in columns)])
    return table([f"{split}, %", *("mean" if each == ALL else each for each in columns)], rows)


def gains(results: Results, split: str, **setting: Any) -> str:
    """What each design has over the MLP, by category."""
    columns = (*CATEGORIES, ALL)
    rows = [
        [name, *(format_gain(results.gain(name, split, each, **setting)) for each in columns)]
        for name in results.designs(**setting) if name != MLP.name
    ]  # fmt: skip
    return table([f"over the MLP, {split}", *CATEGORIES, "mean"], rows)


def longer_tuning(results: Results, *, rolled: bool) -> str:
    """The longest tuning, by category: rolled features are learned from in that alone."""
    setting = {"rolled": rolled, "tuning": results.tunings[-1]}
    if not results.designs(**setting):
        return table([], [])
    parts = [
        f"After {results.tunings[-1]:,} steps of instruction tuning:\n", categories(results, "test", exchanged=True, **setting),
        gains(results, "test", **setting), gains(results, "hard", **setting),
    ]  # fmt: skip
    return "\n".join(parts)


def quick_run(results: Results) -> str:
    """What `--quick` gives, and in how long."""
    machine, schedule, values = results.values["machine"], results.usual, results.values
    spent = f" in {values['minutes']:.0f} minutes on {values['workers']} cores" if "minutes" in values else ""
    return (
        f"`--quick`: {schedule['scenes']} training scenes, {schedule['steps'][0]} steps of alignment and {schedule['steps'][1]} of "
        f"instruction tuning{spent} ({machine['device']}, "
        f"torch {machine['versions']['torch']}, {machine['date']}). {caution(results)}\n\n{summary(results)}"
    )


def paper_comparison(results: Results) -> str:
    """Gains over the MLP, here and in the paper."""
    rows = [
        (name, *PAPER[name], *(format_gain(results.gain(name, split)) for split in SPLITS))
        for name in results.designs() if name in PAPER
    ]  # fmt: skip
    columns = ["over the MLP, in points", "paper: mean of 11", "paper: spatial tasks", "its table", "here, test", "here, hard"]
    return table(columns, rows)


def format_gain(gain: Estimate | None) -> str:
    """A difference, in bold where its interval excludes zero."""
    if gain is None:
        return "not run"
    text = f"{gain.mean:+.1f} ± {gain.half:.1f}" if gain.count > 1 else f"{gain.mean:+.1f}{ONE}"
    return f"**{text}**" if gain.is_sure else text


def details(results: Results) -> str:
    """Table 6 and figure 5: what the integrator adds, and how unequal its attention is."""
    rows = []
    for design in DETAIL:
        runs = results.runs(design.name).values()
        if runs:
            gains = (format_gain(results.gain(design.name, split, over=design.name.split(" + ")[0])) for split in SPLITS)
            rows.append(
                [design.name, *gains, *(attention_ratios(run["attention"][kind] for run in runs) for kind in ("scenes", "noise"))]
            )
    return table(["", "over the same without, test", "hard", "attention in scenes, each seed", "in noise"], rows)


def attention_ratios(found: Iterable[dict[str, Any]]) -> str:
    """Largest over smallest weight, each seed; in parentheses largest over mean, the median seed."""
    found = list(found)
    ratios = ", ".join(f"{each['max_over_min']:.3g}" for each in found)
    return f"{ratios} ({median(each['max'] * each['positions'] for each in found):.2f})"


def patches(results: Results) -> str:
    """What linear readers find in a patch."""
    found = results.values["pretrained"]["from_patches"]
    rows = [["the commonest", *(f"{100 * share:.1f}" for _, share in found["features"].values())]]
    names = {"features": "features", "rolled": "rolled features"}
    rows += [[names[kind], *(f"{100 * right:.1f}" for right, _ in each.values())] for kind, each in found.items()]
    return table(
        [
            "a linear reader of one patch, %",
            *(f"its {name}" for name in ("column", "row")),
            "the thing's color",
            "its shape",
            "its size",
        ],
        rows,
    )


def exchanged_tokens(results: Results) -> str:
    """What is left when the spatial tokens, or the patch tokens, are those of another picture."""
    rows = []
    for tuning, rolled in ((tuning, rolled) for tuning in results.tunings for rolled in (False, True)):
        setting = {"rolled": rolled, "tuning": tuning}
        for name in results.designs(**setting):
            runs = list(results.runs(name, **setting).values())
            if exchangeable(name, runs):
                spatial, patch = ([accuracy(run["strangers"][kind]) for run in runs] for kind in ("spatial", "patch"))
                moved = estimate([after - accuracy(run["test"]) for after, run in zip(spatial, runs, strict=True)])
                own = results.estimate(name, "test", **setting)
                where = features_name(rolled), tuning
                rows.append([name, *where, own, estimate(spatial), format_gain(moved), estimate(patch)])
    columns = ["features", "steps", "its own tokens", "another's spatial tokens", "less its own", "another's patch tokens"]
    return table(["test, %", *columns], rows)


def exchangeable(name: str, runs: Sequence[dict[str, Any]]) -> bool:
    """Whether a design has spatial tokens that are a picture's own: learned ones are the same for all."""
    return "spatial" in runs[0]["strangers"] and name != LEARNED.name


def fewer_scenes(results: Results) -> str:
    """The same steps on fewer scenes."""
    counts = sorted({run["schedule"]["scenes"] for run in results.values["runs"]})
    if len(counts) < 2:
        return table([], [])
    rows = []
    for count, name in product(counts, results.designs(scenes=counts[0])):
        if runs := results.runs(name, scenes=count):
            row = [name, f"{count:,}", len(runs)]
            for split in SPLITS:
                gain = "" if name == MLP.name else format_gain(results.gain(name, split, scenes=count))
                row += [str(results.estimate(name, split, scenes=count)), gain]
            rows.append(row)
    return table(["design", "training scenes", "seeds", "test, %", OVER, "hard, %", OVER], rows)


def trials(results: Results) -> str:
    """Accuracy on validation at the end, each seed's and their mean, by the scale of the projector's learning rates."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in sorted(results.values["runs"], key=lambda run: run["seed"]):
        if not run["rolled"] and run["schedule"] == results.usual:
            share = accuracy(run["curve"][-1]["validation"])
            found.setdefault(run["design"], {}).setdefault(run["scale"], []).append(share)
    scales = sorted({scale for each in found.values() for scale in each}, reverse=True)
    rows = [
        [name, *(f"{', '.join(f'{one:.0f}' for one in each[scale])}: {mean(each[scale]):.1f}" for scale in scales)]
        for name, each in found.items() if len(each) == len(scales) > 1
    ]  # fmt: skip
    return table(["validation, %, each seed: mean", *(f"x {scale:g}" for scale in scales)], rows)


def table(columns: list[str], rows: list[Any]) -> str:
    """A Markdown table."""
    if not rows:
        return "Not run yet.\n"
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines) + "\n"
