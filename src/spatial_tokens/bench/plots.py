"""Pictures of a report: times of the comparisons, log-log lines with their fitted exponents for the scaling suite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import log
from typing import TYPE_CHECKING

from spatial_tokens.bench.comparison import Row, label
from spatial_tokens.bench.report import Report
from spatial_tokens.errors import MissingExtraError
from spatial_tokens.ops.backends import BACKENDS
from spatial_tokens.storage.files import make_directory
from spatial_tokens.visualize import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {True: "C0", False: "C1"}


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """The slope of the straight line through `(log x, log y)`: 1 is linear, 2 quadratic; None for fewer than two points."""
    logs = [(log(x), log(y)) for x, y in points if x > 0 and y > 0]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True)) if logs else (0.0, 0.0)
    spread = sum((x - mean_x) ** 2 for x, _ in logs) if len({x for x, _ in logs}) > 1 else 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def is_own(implementation: str) -> bool:
    """Whether an implementation is this library's, by its name in the suites."""
    return implementation in BACKENDS or implementation.startswith(("SP ", "SP,", "dense", "factorized"))


def require_matplotlib() -> None:
    """Raises MissingExtraError unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error


def draw(report: Report, directory: str) -> list[str]:
    """Draws each suite of a report into PNGs of its name; gives their paths.

    Raises:
        SpatialTokensError: If they cannot be written.
    """
    require_matplotlib()
    folder, paths = make_directory(directory), []
    for suite in dict.fromkeys(row.suite for row in report.rows):
        rows = [row for row in report.rows if row.suite == suite]
        if all(row.failure for row in rows):
            continue
        figure = _scaling(rows) if suite == "scaling" else _times(rows)
        caption = f"{report.machine.get('device', '')}, {report.machine.get('date', '')}"
        figure.suptitle(f"{suite}: {caption}", fontsize=9)
        path = folder / f"{suite}.png"
        save(figure, path, dpi=80)
        paths.append(str(path))
    return paths


def _scaling(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    subjects = list(dict.fromkeys(row.subject for row in rows))
    figure = Figure(figsize=(4 * len(subjects), 6.5), layout="constrained")
    axes = figure.subplots(2, len(subjects), squeeze=False)
    for column, subject in enumerate(subjects):
        for line, (name, unit, least) in enumerate((("ms", "milliseconds", 0), ("peak_mib", "peak MiB above weights", 1))):
            axis = axes[line][column]
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in rows:
                if row.subject == subject and row.values.get(name, -1) >= least:
                    lines[f"{row.implementation}, {row.setting['dtype']}"].append((float(row.setting[subject]), row.values[name]))
            for what, points in lines.items():
                slope = exponent(points)
                legend = what if slope is None else f"{what}: {subject}^{slope:.2f}"
                axis.plot(*zip(*points, strict=True), marker="o", label=legend)
            axis.set(yscale="log", xlabel=subject, ylabel=unit)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.grid(which="both", alpha=0.3)
            if lines:
                axis.legend(fontsize=8)
    return figure


def _times(rows: Sequence[Row]) -> Figure:
    """One panel for each setting, one point for each implementation of each subject, its figure beside it.

    Where the subjects are the candidates, each beside the same baseline, the figure is its time over the baseline's of that
    moment, else milliseconds. This library's implementations have one color, all others another.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels: dict[str, dict[str, Row]] = defaultdict(dict)
    candidates = {row.implementation for row in rows}
    relative = candidates >= {row.subject for row in rows}
    for row in rows:
        name = row.implementation if relative else f"{row.subject}: {row.implementation}"
        panels[label(row.setting)].setdefault(name, row)
    unit = f"time / {rows[0].implementation}'s" if relative else "milliseconds"
    columns = 2 if len(panels) > 2 else 1
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(5.5 * columns, lines * (0.17 * most + 0.6)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (setting, panel) in zip(axes[: len(panels)], panels.items(), strict=True):
        for line, row in enumerate(panel.values()):
            if row.failure:
                axis.annotate(" failed", (0, line), xycoords=("axes fraction", "data"), fontsize=7, color="C3", va="center")
                continue
            value = 1 / row.values["ratio"] if relative and "ratio" in row.values else row.values["ms"]
            axis.plot(value, line, marker="o", markersize=4, color=COLORS[is_own(row.implementation)])
            axis.annotate(f"  {value:.3g}" if value < 999.5 else f"  {value:.0f}", (value, line), fontsize=7, va="center")
        axis.set_yticks(range(len(panel)), list(panel), fontsize=7)
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{setting} ({unit})", fontsize=8, loc="left")
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(kinds := {is_own(name) for name in candidates}) > 1:
        names = {True: "this library", False: "others"}
        marks = [Line2D([], [], marker="o", linestyle="", color=COLORS[kind], label=names[kind]) for kind in sorted(kinds)]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=8)
    return figure
