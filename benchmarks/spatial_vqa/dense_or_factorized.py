"""The tables and the picture of docs/dense-or-factorized.md, from the committed results; runs that are missing are left out."""

from collections import Counter
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.spatial_vqa.designs import (
    BINS,
    CROPPING,
    DESIGNS,
    DETAIL,
    FACTORIZED,
    FACTORIZED_DETAIL,
    FACTORIZED_POOLING,
    FACTORS,
    MLP,
    PLACES,
    POOLING,
    SIZES,
    WIDER,
    count_kernel_parameters,
)
from benchmarks.spatial_vqa.estimates import ALL, Estimate, accuracy, estimate
from benchmarks.spatial_vqa.plans import LONGER, MORE_SCENES, PLANS, Job
from benchmarks.spatial_vqa.results import COMMITTED, Results, committed, features_name, identity
from benchmarks.spatial_vqa.tables import format_gain, table
from benchmarks.spatial_vqa.training import COMMON, STAGES, KernelRate

NAME = "factorized"
RETRAINED = "factorized_retrained"  # runs of the same plan whose encoder and language model were trained again on another CPU
ORDER = (
    MLP, PLACES, CROPPING, POOLING, FACTORIZED, FACTORIZED_POOLING, BINS, WIDER, *SIZES, DETAIL[0], FACTORIZED_DETAIL,
)  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {"rolled": True, "tuning": 2400},
    {"rolled": True, "tuning": 2400, "scenes": MORE_SCENES.scenes},
    {"rolled": True, "tuning": 800},
    {"rolled": False, "tuning": 400},
)
FEWEST_SUMMARIZED = 4  # fewer seeds are told one by one
FEWEST_IN_AN_INTERVAL = 3
GROUP_NAMES = {"position": "position", ALL: "mean"}


def page() -> str:
    """All of the page's figures."""
    if not (COMMITTED / f"{NAME}.json").exists():
        return "Not run yet.\n"
    own, full, again = committed(NAME), committed("full"), retrained()
    results = own.with_runs_of(full)
    parts = [counted(own, full, again), "![Accuracy against the parameters of the kernels](images/dense-or-factorized.png)\n"]
    for setting in SETTINGS:
        parts += [f"### {_title(setting)}\n", designs(results, setting)]
        if again is not None and any(again.designs(**setting)):
            parts += [f"### {_title(setting)}, retrained encoder and language model\n", designs(again, setting)]
    parts += [
        "### Dense kernels that were compressed\n",
        compressed(again if again is not None and again.values["compressions"] else results),
        "### Rates of the kernels\n",
        rates(results),
    ]
    return "\n".join(parts)


def retrained() -> Results | None:
    """The runs of the other CPU: their encoder and language model are others, so they are not in one table with the first ones."""
    return committed(RETRAINED) if (COMMITTED / f"{RETRAINED}.json").exists() else None


def summary(results: Results) -> str:
    """In short: the designs in each setting."""
    return "\n".join(f"{_title(setting)}\n\n{designs(results, setting)}" for setting in SETTINGS)


def counted(own: Results, full: Results, again: Results | None = None) -> str:
    """How many of the plan's runs are in, of what kind, and what is taken from the other plan."""
    found = [own.values, *([] if again is None else [again.values])]
    runs = [run for values in found for run in values["runs"]]
    distinct = {identity(run): run for run in runs}.values()  # some with both encoders
    done, planned = Counter(map(_kind, distinct)), Counter(map(_kind_of, PLANS[NAME].runs))
    of_each = [f"{done[kind]} of {count} with {kind}" for kind, count in planned.items()]
    compressions = sum(len(values["compressions"]) for values in found)
    of_each.append(f"{compressions} of {len(PLANS[NAME].jobs) - len(PLANS[NAME].runs)} compressions")
    hours = sum(run["seconds"] for run in runs) / 3600
    joined = len(own.with_runs_of(full).values["runs"]) > len(own.values["runs"])
    repeated, same = own.count_repeated(full)
    more = "Rows with a setting of the plan `full` have its runs too: the encoder, the language model and the scenes are the same. "
    more += f"Of that plan's runs {repeated} were run again, and {same} of these gave the same answers. " if repeated else ""
    machines = " and ".join(f"{values['machine']['device']}, torch {values['machine']['versions']['torch']}" for values in found)
    return (
        f"{len(distinct) + compressions} of {len(PLANS[NAME].jobs)} runs of the plan `{NAME}` are in: {', '.join(of_each)}"
        f"{'; with one encoder or the other' if again is not None else ''}. "
        f"{more * joined}{machines}; {hours:.1f} hours of one core for training.\n"
    )


def designs(results: Results, setting: dict[str, Any]) -> str:
    """Each design in a setting, at the rate that validation prefers, and what it has over dense cropping."""
    rows: list[list[Any]] = []
    for name in (each.name for each in ORDER):
        runs = results.runs(name, **setting)
        if not runs:
            continue
        row = [name, size(results, name), len(runs), _rate(results, name, setting)]
        for split, group in (("test", "position"), ("test", ALL), ("hard", ALL)):
            gain = results.gain(name, split, group, over=CROPPING.name, **setting)
            row += [_format_accuracies([accuracy(run[split], group) for run in runs.values()])]
            row += ["" if name == CROPPING.name else _format_gain(gain)]
        rows.append(row)
    over = "over dense cropping"
    return table(
        ["design", "kernels", "seeds", "their rate", "position, %", over, "mean, %", over, "hard, mean, %", over],
        rows,
    )


def _format_gain(gain: Estimate | None) -> str:
    """With its interval where there are three seeds or more: that of two spans more than all accuracies."""
    return f"{gain.mean:+.1f}" if gain is not None and gain.count < FEWEST_IN_AN_INTERVAL else format_gain(gain)


def _format_accuracies(found: list[float]) -> str:
    """Each seed's where there are few, as an interval of three that differ says nothing; else their mean and its interval."""
    return ", ".join(f"{each:.1f}" for each in found) if len(found) < FEWEST_SUMMARIZED else str(estimate(found))


def size(results: Results, name: str) -> str:
    """The parameters of a design's kernels, or of its embedding of places."""
    found = parameters(results, name)
    return "" if not found else f"{found / 1e6:.2f} M" if found >= 1e6 else f"{found / 1e3:.0f} k"


def parameters(results: Results, name: str) -> int:
    """The same as a number, from a run or (of a plan whose runs do not tell) from the design; 0 where there are none."""
    for run in results.values["runs"]:
        if run["design"] == name and "kernel_parameters" in run:
            return int(run["kernel_parameters"])
    return count_kernel_parameters(DESIGNS[name])


def compressed(results: Results) -> str:
    """Each seed's dense run, and what is left of it: at once, after a brief tuning, and of the dense one after as much tuning."""
    rows = []
    for each in results.values.get("compressions", []):
        of = each["of"]
        run = results.runs_by_rate(of["design"], **_setting_of(of)).get(KernelRate(**of["kernel_rate"]), {}).get(of["seed"])
        if run is None:
            continue
        size = f"1/{each['dense_kernel_parameters'] / each['kernel_parameters']:.0f}"
        kind = f"{each['frequencies']} x {each['frequencies']}, rank {each['rank']}"
        row = [of["design"], f"{of['schedule']['scenes']:,}", of["seed"], kind, size, f"{100 * each['unexplained']:.1f}"]
        for group in GROUP_NAMES:
            dense = accuracy(run["test"], group)
            row.append(f"{dense:.1f}")
            row += [f"{accuracy(each[what]['test'], group) - dense:+.1f}" for what in ("compressed", "tuned", "dense_tuned")]
        rows.append(row)
    what = ("compressed", "and tuned", "dense, tuned as long")
    columns = [f"{GROUP_NAMES[group]}, dense, %" if i == 0 else what[i - 1] for group, i in product(GROUP_NAMES, range(4))]
    return table(["design", "scenes", "seed", "kernels", "size", "variance missed, %", *columns], rows)


def _setting_of(run: dict[str, Any]) -> dict[str, Any]:
    return {"rolled": run["rolled"], "tuning": run["schedule"]["steps"][1], "scenes": run["schedule"]["scenes"]}


def rates(results: Results) -> str:
    """Validation at the end of training by the rate of the kernels, in the mean over seeds that all have; bold: chosen."""
    parts = []
    for setting in SETTINGS:
        tried = {each.name: results.validation_by_rate(each.name, **setting) for each in ORDER}
        tried = {name: found for name, found in tried.items() if len(found) > 1}
        columns = sorted({rate for found in tried.values() for rate in found}, key=lambda rate: (rate.by_fan_in, -rate.scale))
        rows = []
        for name, found in tried.items():
            chosen, seeds = results.kernel_rate(name, **setting), len(next(iter(found.values())))
            rows.append([name, seeds, *(_validated(found.get(rate, []), rate == chosen) for rate in columns)])
        if rows:
            parts.append(table([f"{_title(setting)}: validation, %", "seeds", *map(format_rate, columns)], rows))
    common = ", then ".join(f"{stage.projector_learning_rate:g}" for stage in STAGES)
    return "\n".join([f"Over the rate of the projector's other layers ({common}).\n", *(parts or [table([], [])])])


def format_rate(rate: KernelRate) -> str:
    """As the tables name it."""
    return f"x {rate.scale:g}{', by fan-in' * rate.by_fan_in}"


def draw(images: Path) -> None:
    """Accuracy against the parameters of the kernels, on rolled features after the long tuning; the dense interval; compressed."""
    if not (COMMITTED / f"{NAME}.json").exists():
        return
    from matplotlib import pyplot

    again, results = retrained(), committed(NAME).with_runs_of(committed("full"))
    usual, more = SETTINGS[:2]
    rows = [(results, usual, "")]
    if any(results.designs(**more)):
        rows.append((results, more, ""))
    if again is not None:
        rows.append((again, usual, "; encoder and language model retrained"))
    figure, grid = pyplot.subplots(
        len(rows), len(GROUP_NAMES), figsize=(12, 0.8 + 4 * len(rows)), layout="constrained", squeeze=False, sharex=True
    )
    for (found, setting, note), axes in zip(rows, grid, strict=True):
        title = f"{setting.get('scenes', LONGER.scenes):,} training scenes{note}"
        for axis, (group, said) in zip(axes, GROUP_NAMES.items(), strict=True):
            _draw_designs(axis, found, setting, group)
            _draw_compressed(axis, found, setting, group)
            axis.set(xscale="log", ylabel=f"{said}, test, %", ylim=(30, 100), title=title)
    for axis in grid[-1]:
        axis.set_xlabel("parameters of the kernels")
    labels = {label: handle for axis in grid.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(images / "dense-or-factorized.png", dpi=110, metadata={"Software": None})


def _draw_designs(axis: Any, results: Results, setting: dict[str, Any], group: str) -> None:
    for name in (each.name for each in ORDER):
        if not results.runs(name, **setting):
            continue
        found, kernels = results.estimate(name, "test", group, **setting), parameters(results, name)
        if name == MLP.name:
            axis.axhline(found.mean, color="grey", linestyle=":", label=MLP.name)
        elif kernels:
            seeds = [accuracy(run["test"], group) for run in results.runs(name, **setting).values()]
            color, marker = f"C{ORDER.index(DESIGNS[name]) % 10}", "o" if DESIGNS[name] in FACTORS else "s"
            axis.plot([kernels] * len(seeds), seeds, marker, color=color, alpha=0.7, label=name)
        if name == CROPPING.name and found.count > 1:
            band = f"{CROPPING.name}, dense: interval of {found.count} seeds"
            axis.axhspan(found.mean - found.half, found.mean + found.half, color="C1", alpha=0.12, label=band)


def _draw_compressed(axis: Any, results: Results, setting: dict[str, Any], group: str) -> None:
    usual = {"scenes": LONGER.scenes, **setting}
    found = [each for each in results.values.get("compressions", []) if _setting_of(each["of"]) == usual]
    if found:
        sizes, accuracies = zip(
            *((each["kernel_parameters"], accuracy(each["compressed"]["test"], group)) for each in found), strict=True
        )
        axis.plot(sizes, accuracies, "k^", fillstyle="none", label=f"{CROPPING.name}, compressed without tuning")


def _validated(found: list[float], chosen: bool) -> str:
    return f"{'**' * chosen}{mean(found):.1f}{'**' * chosen}" if found else ""


def _rate(results: Results, name: str, setting: dict[str, Any]) -> str:
    if name == MLP.name:
        return ""
    chosen, among = results.kernel_rate(name, **setting) or COMMON, len(results.validation_by_rate(name, **setting))
    return f"{format_rate(chosen)} (of {among})" if among > 1 else format_rate(chosen)


def _title(setting: dict[str, Any]) -> str:
    scenes = f", {setting['scenes']:,} training scenes" if "scenes" in setting else ""
    return f"{features_name(setting['rolled']).capitalize()} features, {setting['tuning']:,} steps{scenes}"


def _kind(run: dict[str, Any]) -> str:
    return _kind_name(run["rolled"], run["schedule"]["steps"][1], run["schedule"]["scenes"])


def _kind_of(job: Job) -> str:
    return _kind_name(job.rolled, job.schedule.steps[1], job.schedule.scenes)


def _kind_name(rolled: bool, steps: int, scenes: int) -> str:
    more = f" on {scenes:,} scenes" if scenes == MORE_SCENES.scenes else ""
    return f"{features_name(rolled)} features and {steps:,} steps{more}"
