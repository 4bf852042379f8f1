"""A compression's error against its parameters."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from spatial_tokens.compression.report import CompressionReport
from spatial_tokens.errors import MissingExtraError

LEAST = 1e-12  # that is plotted, on an axis of logarithms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_report(report: CompressionReport) -> Figure:
    """The share of the tokens' variance that is missed, against the parameters of the kernels; whitened and plain.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    best, least = [], float("inf")
    for point in report.curve:  # by parameters: those that fewer miss more than
        if point.unexplained < least:
            best.append(point)
            least = point.unexplained
    axes.plot([p.parameters for p in best], [_shown(p.unexplained) for p in best], "o-", label="whitened and refitted")
    axes.plot([p.parameters for p in best], [_shown(p.plain_hosvd) for p in best], "s--", label="plain HOSVD")
    for point in best:
        text = f"rank {point.rank}, {point.frequencies} x {point.frequencies}"
        axes.annotate(text, (point.parameters, _shown(point.unexplained)), xytext=(4, 6), textcoords="offset points", fontsize=7)
    chosen = _shown(report.unexplained)
    axes.plot(report.parameters, chosen, "o", markersize=12, fillstyle="none", color="black", label="chosen")
    axes.set(
        xscale="log", yscale="log", xlabel=f"parameters of the kernels (dense: {report.dense_parameters:,})",
        ylabel=f"share of variance missed, {report.held_out} held-out pictures",
    )  # fmt: skip
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    return figure


def _shown(share: float) -> float:
    return max(share, LEAST)


def __getattr__(name: str) -> Any:
    if name == "plot":
        warnings.warn("compression.plot.plot is called plot_report now", FutureWarning, stacklevel=2)
        return plot_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
