"""`spatial-tokens bench`: runs suites, shows their rows as they come, and keeps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache, partial

import torch

from spatial_tokens.bench import console, plots
from spatial_tokens.bench.comparison import Row
from spatial_tokens.bench.machine import describe
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.report import Report, paired_rows, read_report
from spatial_tokens.bench.runner import cudnn_benchmark, run_comparison
from spatial_tokens.bench.suites import SUITES
from spatial_tokens.bench.suites.limits import products
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.files import check_writable, make_directory


def run(options: Options, suites: Sequence[str], command: str, json_file: str | None, plot_directory: str | None) -> Report:
    """Runs suites and prints a table for each comparison. The report is written after each one, so an interrupted run keeps it.

    Raises:
        SpatialTokensError: If a file cannot be written, or nothing could be run.
    """
    console.require_rich()
    if json_file is not None:
        check_writable(json_file)  # an impossible path is to be known now, not after the work
    if plot_directory is not None:
        plots.require_matplotlib()
        check_writable(make_directory(plot_directory) / "plot.png")
    report = Report(command, describe(options.device))
    console.print_machine(report.machine)
    try:
        with cudnn_benchmark(), torch.random.fork_rng():
            torch.manual_seed(0)
            _run_suites(options, suites, report, json_file)
        console.print_exponents(report.rows)
    finally:
        for path in plots.draw(report, plot_directory) if plot_directory is not None else []:
            print(f"wrote {path}")
    if json_file is not None:
        print(f"wrote {json_file}")
    if all(row.failure for row in report.rows):
        raise SpatialTokensError("nothing could be run; the rows above say why")
    return report


def _run_suites(options: Options, suites: Sequence[str], report: Report, json_file: str | None) -> None:
    peak_of = cache(partial(_peak, options))
    for suite in suites:
        comparisons = deque(SUITES[suite](options))
        with console.Screen(len(comparisons)) as screen:
            while comparisons:
                comparison = comparisons.popleft()  # what it has built goes with it
                peak = peak_of(str(comparison.setting["dtype"])) if comparison.num_flops else None
                report.rows.extend(screen.run(comparison, partial(run_comparison, comparison, options.device, peak)))
                if json_file is not None:
                    report.write(json_file)


def compare(before: str, after: str) -> None:
    """Prints the second report's times over the first's.

    Raises:
        SpatialTokensError: If one cannot be read, or they have no row in common.
    """
    console.require_rich()
    first, second = read_report(before), read_report(after)
    console.print_comparison(first, second, paired_rows(first, second))


def _peak(options: Options, dtype: str) -> float | None:
    """Operations a second of the matrix product, measured; None where it cannot run."""
    rows: list[Row] = run_comparison(products(options.device, dtype), options.device, None, budget=0.5)
    found = [row.values["tflop_per_s"] for row in rows if "tflop_per_s" in row.values]
    return found[0] * 1e12 if found else None
