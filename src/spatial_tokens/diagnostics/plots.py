"""Pictures of what was found: places by layer, and usage over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spatial_tokens.diagnostics.intervals import Estimate
from spatial_tokens.diagnostics.report import ProbeReport
from spatial_tokens.diagnostics.verdict import PLAIN_RIGHT, ROLLED_RIGHT, skill_of
from spatial_tokens.errors import MissingExtraError, SpatialTokensError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = (("column", "o-", "#2a6f97"), ("row", "s--", "#e4572e"))


def plot_probe(report: ProbeReport) -> Figure:
    """R², the right twelfth (beyond chance) and the order of two patches, layer by layer, with their 95 % intervals.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = _figure(11, 3.6)
    panels = (("r2", "R²"), ("skill", "right twelfth, beyond chance"), ("order", "which of two is further"))
    names = [each.name for each in report.layers]
    for axes, (field, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for axis, style, color in AXES:
            _line(axes, range(len(names)), [getattr(getattr(each, axis), field) for each in report.layers], axis, style, color)
            alternative = getattr(getattr(report.with_places, axis), field).value
            axes.plot([names.index(report.layer)], [alternative], "*", color=color, markersize=10, label=f"{axis}, places added")
        if field == "skill":
            for figures, name in ((PLAIN_RIGHT, "plain"), (ROLLED_RIGHT, "rolled")):
                height = sum(map(skill_of, figures)) / 2
                axes.axhline(height, color="gray", linestyle=":", linewidth=1)
                axes.text(0.02, height + 0.02, f"evidence: {name}", color="gray", fontsize=7, transform=axes.get_yaxis_transform())
        axes.axvline(names.index(report.layer), color="gray", linewidth=0.5)
        axes.set(title=title, xlabel="layer", ylim=(min(-0.05, axes.get_ylim()[0]), 1.05))
        step = -(-len(names) // 12)
        axes.set_xticks(range(0, len(names), step), names[::step])
        axes.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    weights = ", random weights" if report.random_weights else ""
    figure.suptitle(f"{report.encoder}{weights}: what patches tell of their places ({report.tested} pictures tested)", fontsize=10)
    return figure


def plot_usage(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """The spatial tokens' gain and their share over training, from what `log_usage` has logged.

    Args:
        log_history: `trainer.state.log_history`, or "log_history" of a checkpoint's `trainer_state.json`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        SpatialTokensError: If nothing was logged.
    """
    logged = [entry for entry in log_history if "usage_gain" in entry]
    if not logged:
        raise SpatialTokensError("no usage was logged; log_usage(trainer) before training, with an evaluation now and then")
    figure = _figure(9, 3.6)
    gain, share = figure.subplots(1, 2)
    steps = [entry["step"] for entry in logged]
    values = [Estimate(entry["usage_gain"], entry.get("usage_gain_low"), entry.get("usage_gain_high")) for entry in logged]
    _line(gain, steps, values, "over another picture's tokens", "o-", AXES[0][2])
    over_mean = [Estimate(entry["usage_gain_over_mean"]) for entry in logged]
    _line(gain, steps, over_mean, "over the mean tokens", "s--", AXES[1][2])
    gain.axhline(0, color="black", linewidth=0.8)
    gain.set(title="gain of the spatial tokens", xlabel="step", ylabel="loss without, less with")
    gain.legend(fontsize=7)
    for name, label, style, color in (
        ("usage_share", "of what the picture's tokens bring", "o-", AXES[0][2]),
        ("usage_attention_share", "of the attention to the picture", "s--", AXES[1][2]),
        ("usage_places", "of the picture's places", ":", "gray"),
    ):
        points = [(entry["step"], entry[name]) for entry in logged if name in entry]
        if points:
            share.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
    share.set(title="share of the spatial tokens", xlabel="step")
    share.set_ylim(0, max(0.02, 1.1 * share.get_ylim()[1]))
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    share.legend(fontsize=7)
    for axes in (gain, share):
        axes.grid(True, alpha=0.3)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    return Figure(figsize=(width, height), layout="constrained")


def _line(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], label: str, style: str, color: str) -> None:
    """Values, and their intervals as a band."""
    axes.plot(places, [each.value for each in estimates], style, color=color, label=label, markersize=4)
    lows = [each.value if each.low is None else each.low for each in estimates]
    highs = [each.value if each.high is None else each.high for each in estimates]
    axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
