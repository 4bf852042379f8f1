"""Results in a terminal: a table for each subject, growing while it is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spatial_tokens.bench.comparison import Comparison, Row, label
from spatial_tokens.bench.plots import exponent
from spatial_tokens.bench.report import Report
from spatial_tokens.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

COLUMNS: dict[str, Callable[[Mapping[str, float]], str]] = {  # a heading, and its cell; values that are not there raise KeyError
    "ms": lambda values: _ms(values["ms"]),
    "p20-p80": lambda values: f"{_ms(values['p20_ms'])}-{_ms(values['p80_ms'])}",
    "faster": lambda values: f"{values['ratio']:.2f}x",
    "of limit": lambda values: f"{values['share_of_limit']:.0%}",
    "GB/s": lambda values: f"{values['gb_per_s']:.1f}",
    "TFLOP/s": lambda values: f"{values['tflop_per_s']:.3g}",
    "tokens": lambda values: f"{values['tokens']:.0f}",
    "image tokens": lambda values: f"{values['image_tokens']:.0f}",
    "tokens/s": lambda values: _short(values["tokens_per_s"]),
    "params": lambda values: _short(values["parameters"]),
    "FLOP": lambda values: _short(1e9 * values["gflop_per_image"]),
    "held MiB": lambda values: f"{values['held_mib']:,.0f}",
    "peak MiB": lambda values: f"{values['peak_mib']:,.0f}",
}


def _ms(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def _short(number: float) -> str:
    """Three digits and a magnitude: 923550208 is 924M."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.3g}"


def require_rich() -> None:
    """Raises MissingExtraError unless rich is there."""
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("rich", "bench") from error


class Screen:
    """The growing table of the subject that is measured, above a bar: what runs, and about how much time is left."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._rows: list[Row] = []
        self._console = Console()
        left = TextColumn("left, about"), TimeRemainingColumn()
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), *left, TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("", total=total)
        self._live = Live(console=self._console, transient=True, get_renderable=self._picture, refresh_per_second=4)

    def __enter__(self) -> Screen:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rows, rows = [], self._rows
        self._live.__exit__(*error)
        if rows:
            self._console.print(subject_table(rows))

    def run(self, comparison: Comparison, work: Callable[[], list[Row]]) -> list[Row]:
        """Shows a comparison while it runs, and its rows once they are there."""
        if self._rows and (self._rows[0].suite, self._rows[0].subject) != (comparison.suite, comparison.subject):
            self._rows, rows = [], self._rows
            self._console.print(subject_table(rows))
        self._progress.update(self._task, description=title(comparison.suite, comparison.subject, comparison.setting))
        found = work()
        self._rows = [*self._rows, *found]
        self._progress.advance(self._task)
        return found

    def _picture(self) -> RenderableType:
        from rich.console import Group

        latest = self._rows[-max(4, self._console.height - 12) :]
        return Group(*([subject_table(latest)] if latest else []), self._progress)


def title(suite: str, subject: str, setting: Any) -> str:
    """What a comparison is about, in a line."""
    return f"{suite}: {subject}, {label(setting)}"


def subject_table(rows: Sequence[Row]) -> Group:
    """All rows of one subject, setting by setting; those that failed say so, and why below."""
    from rich.console import Group
    from rich.markup import escape

    cells = {row.key: {heading: _cell(row, heading) for heading in COLUMNS} for row in rows}
    columns = [heading for heading in COLUMNS if any(cells[row.key][heading] for row in rows)] or ["ms"]
    table = new_table(["", *columns], [max(len(cells[row.key][heading]) for row in rows) for heading in columns])
    for setting, found in groupby(rows, lambda row: row.setting):
        candidates = list(found)
        alone = len(candidates) == 1 and len({row.implementation for row in rows}) == 1
        if not alone:
            table.add_row(f"[italic]{escape(label(setting))}[/italic]")
        for row in candidates:
            figures = [cells[row.key][heading] for heading in columns]
            if row.failure:
                figures[0] = "[red]failed[/red]"
            table.add_row(escape(label(setting) if alone else f"  {row.implementation}"), *figures)
    failed = [f"{label(row.setting)}: {row.implementation} failed: {row.failure}" for row in rows if row.failure]
    heading = f"[bold]{escape(rows[0].suite)}: {escape(rows[0].subject)}[/bold]"
    return Group(heading, table, *(f"[red]{escape(reason)}[/red]" for reason in failed))


def _cell(row: Row, heading: str) -> str:
    try:
        return COLUMNS[heading](row.values)
    except KeyError:
        return ""


def new_table(columns: Sequence[str], widths: Sequence[int] = ()) -> Table:
    """An empty table in one style: names to the left, figures to the right and never cut."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=0)
    table.add_column(columns[0], overflow="fold")
    for i, heading in enumerate(columns[1:]):
        width = max(len(word) for word in (heading, *(["failed"] if heading == "ms" else [])))
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(width, widths[i] if widths else 0))
    return table


def print_machine(machine: dict[str, Any]) -> None:
    """The device, its size, the versions and the date, in a line or two."""
    facts = {name: value for name, value in machine.items() if name not in ("device", "versions", "date")}
    print(f"{machine['device']}; {', '.join(f'{name} {value}' for name, value in facts.items())}")
    print(f"{', '.join(f'{name} {value}' for name, value in machine['versions'].items())}; {machine['date']}")


def print_exponents(rows: Sequence[Row]) -> None:
    """For each sweep of the scaling suite, the power of the swept size that time grows with."""
    from rich.console import Console

    sweeps = [row for row in rows if row.suite == "scaling" and "ms" in row.values]
    table = new_table(["scaling: time grows as", "of", "dtype", "from", "to", "power"])
    lines: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in sweeps:
        lines[row.subject, row.implementation, str(row.setting["dtype"])].append(row)
    for (subject, implementation, dtype), found in lines.items():
        points = [(float(row.setting[subject]), row.values["ms"]) for row in found]
        slope = exponent(points)
        if slope is not None:
            table.add_row(subject, implementation, dtype, f"{points[0][0]:.0f}", f"{points[-1][0]:.0f}", f"{slope:.2f}")
    if table.row_count:
        Console().print(table)


def print_comparison(before: Report, after: Report, pairs: Sequence[tuple[Row, Row, float]]) -> None:
    """The rows of two reports, one beside the other."""
    from rich.console import Console
    from rich.markup import escape

    for name, report in (("before", before), ("after", after)):
        print(f"{name}: {report.machine.get('device')}, {report.machine.get('date')}, {len(report.rows)} rows")
    table = new_table(["after / before: below 1 is faster", "before ms", "after ms", "ratio"])
    for a, b, ratio in pairs:
        name = f"{title(a.suite, a.subject, a.setting)}: {a.implementation}"
        table.add_row(escape(name), _ms(a.values["ms"]), _ms(b.values["ms"]), f"{ratio:.2f}")
    Console().print(table)
