"""What a probe means, by the figures of docs/evidence.md, and what it cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatial_tokens.diagnostics.intervals import Estimate
from spatial_tokens.diagnostics.readers import SECTIONS

if TYPE_CHECKING:
    from spatial_tokens.diagnostics.report import Layer, ProbeReport

# Figures of Spatial VQA's plan `full` (tests/diagnostics checks them against benchmarks/results/spatial_vqa): how often a linear
# reader finds a patch's column and row among twelve, and the questions of position answered, in percent.
PLAIN_RIGHT, ROLLED_RIGHT = (0.853, 0.860), (0.123, 0.126)
PLAIN_POSITION = {"MLP": 98.2, "SFE cropping": 97.9}  # after 400 steps, five seeds
ROLLED_POSITION = {"MLP": 44.8, "SFE cropping": 91.2}  # after 2,400 steps, five seeds
ROLLED_WITH_PLACES = 97.7  # after 2,400 steps, one seed

# Least squares on C channels of n patches explains C / n of the variance of anything, by chance: 2 % here. A share of the places as
# small as that cannot be found with fewer.
PATCHES_PER_CHANNEL = 50

PLAIN = (
    f"the plain features of our evidence ({PLAIN_RIGHT[0]:.0%} and {PLAIN_RIGHT[1]:.0%}, chance 8%). With those, spatial tokens "
    f"brought nothing measurable: on questions of position the MLP alone scored {PLAIN_POSITION['MLP']} %, cropping "
    f"{PLAIN_POSITION['SFE cropping']} %"
)
ROLLED = (
    f"the rolled features of our evidence ({ROLLED_RIGHT[0]:.0%} and {ROLLED_RIGHT[1]:.0%}, chance 8%). With those, the MLP alone "
    f"scored {ROLLED_POSITION['MLP']} % on questions of position, cropping {ROLLED_POSITION['SFE cropping']} %. Rolled features "
    "encode wrong places, which is harder than encoding none"
)
LIMITS = (
    "Limits: the evidence is one small encoder and language model on generated scenes (docs/evidence.md). The probe cannot tell "
    "what a larger language model reads from these features, or what spatial tokens add besides places. After training, "
    "usage(model, batches) measures whether they are used."
)


def verdict_of(report: ProbeReport) -> list[str]:
    """Sentences: how the encoder compares with the evidence, what the readings follow, the cheapest alternative, and the limits."""
    return [_comparison(report.main, report.fitted), *_following(report.main), _alternative(report), *_caveats(report), LIMITS]


def _comparison(layer: Layer, fitted: int) -> str:
    column, row = layer.readings
    text = (
        f"a linear reader finds a patch's column with R² {column.r2.value:.2f} and its row with {row.r2.value:.2f}, and the right "
        f"twelfth of the picture in {column.right.value:.0%} and {row.right.value:.0%} of cases (chance {column.chance:.0%} and "
        f"{row.chance:.0%})"
    )
    if layer.grid is None or min(layer.grid) < SECTIONS:
        return (
            f"No verdict: {text}. The evidence has {SECTIONS} x {SECTIONS} patches. With fewer patches on a side, or pictures of "
            "different sizes, finding the right twelfth is not the same task."
        )
    if column.right.low is None:
        return f"No verdict: {text}, but too few pictures were tested for intervals. Use more pictures."
    as_plain = all(_high(each.skill) >= skill_of(figure) for each, figure in zip(layer.readings, PLAIN_RIGHT, strict=True))
    as_rolled = all(_low(each.skill) <= skill_of(figure) for each, figure in zip(layer.readings, ROLLED_RIGHT, strict=True))
    if as_plain and as_rolled:
        return f"No verdict: {text}, but the intervals include both cases that were measured. Use more pictures."
    if as_plain:
        expected = "Do not expect a gain from spatial tokens."
        return f"The features encode places: {text}. That is not measurably less than {PLAIN}. {expected}"
    if as_rolled and _more_may_help(layer, layer.grid[0] * layer.grid[1] * fitted):
        return (
            f"No verdict: {text}. No place was found with {fitted} fitted pictures; more pictures may find it. Use more pictures."
        )
    if as_rolled:
        return f"The features do not encode places: {text}. That is not measurably more than {ROLLED}. Spatial tokens may help."
    return (
        f"The features encode places in part: {text}. That is between the two cases that were measured. One is {PLAIN}. The other "
        f"is {ROLLED}. What spatial tokens bring in between was not measured: train a short run with them and one without."
    )


def _more_may_help(layer: Layer, patches: int) -> bool:
    """Whether readers that found nothing in so many patches may find something in more."""
    return patches < PATCHES_PER_CHANNEL * layer.channels or any(_low(each.gain) > 0 for each in layer.readings)


def skill_of(right: float) -> float:
    """A figure of the evidence, whose twelfths have a patch each, beyond chance."""
    return (right - 1 / SECTIONS) / (1 - 1 / SECTIONS)


def _low(estimate: Estimate) -> float:
    return estimate.value if estimate.low is None else estimate.low


def _high(estimate: Estimate) -> float:
    return estimate.value if estimate.high is None else estimate.high


def _following(layer: Layer) -> list[str]:
    """What the readings follow, where there is something to read and it was measured."""
    shares = [each.follows for each in layer.readings if each.follows is not None]
    if len(shares) < 2 or all(_low(each.r2) <= 0 for each in layer.readings):
        return []
    means = {name: sum(getattr(each, name).value for each in shares) / 2 for name in ("slot", "border", "content")}
    most = max(means, key=lambda name: means[name])
    what = {
        "slot": "the patch's slot (a position embedding, or padding at the encoder's edge) and not the picture",
        "border": "the picture's border",
        "content": "what the patch shows, so pictures with another composition will be misread",
    }
    measured = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return [f"In shifted pictures the readings mostly follow {what[most]} ({measured})."]


def _alternative(report: ProbeReport) -> str:
    column, row = report.with_places.readings
    grid = report.main.grid
    size = "" if grid is None else f" ({grid[0] * grid[1] * report.main.channels:,} parameters if learned)"
    return (
        f"The cheapest alternative is a position embedding added to each patch{size}. With one as large as the features, R² is "
        f"{column.r2.value:.2f} and {row.r2.value:.2f}. In the rolled case, an embedding added to each patch token scored "
        f"{ROLLED_WITH_PLACES} % on questions of position (one seed)."
    )


def _caveats(report: ProbeReport) -> list[str]:
    """What to know about the weights and pictures that were given."""
    found = []
    if report.random_weights:
        found.append("The weights are random. This says nothing about a trained encoder.")
    if report.generated:
        found.append("The pictures were generated, with shapes at random places. In photographs, content may give places away.")
    return found
