"""What a measurement of usage found, as numbers, JSON and sentences."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from spatial_tokens.diagnostics.intervals import Estimate

WIDTH = 110  # of sentences


@dataclass(frozen=True)
class Change:
    """What replacing tokens does to a model.

    Args:
        loss: The loss with the others less that with its own, paired by sample: above 0 where the own ones are of use.
        right: The share of samples whose labels are all predicted, given the labels before, with its own tokens less that with the
            others.
    """

    loss: Estimate
    right: Estimate


@dataclass(frozen=True)
class LayerAttention:
    """The share of a layer's attention, mean over heads, that text behind a picture pays.

    Args:
        spatial: To the picture's spatial tokens.
        patches: To its patch tokens.
    """

    spatial: Estimate
    patches: Estimate


@dataclass(frozen=True)
class UsageReport:
    """Whether a model uses its spatial tokens. Intervals are of a bootstrap over pictures, whose samples stay together.

    Args:
        samples: Those with a picture and labels.
        pictures: Different ones.
        loss: With its own tokens: the mean over samples of the mean over a sample's labels.
        right: The share of samples whose labels are all predicted.
        another: With the spatial tokens of another picture.
        mean: With no picture's: the mean of all.
        patches: With another picture's patch tokens; None where this model's cannot be exchanged.
        attention: By layer; None where the model gives no attention.
        places: The spatial tokens' share of a picture's places, to compare attention with.
    """

    samples: int
    pictures: int
    loss: Estimate
    right: Estimate
    another: Change
    mean: Change
    patches: Change | None
    attention: list[LayerAttention] | None
    places: float

    @property
    def share(self) -> float | None:
        """The spatial tokens' share of what a picture's tokens bring: their gain over the sum of theirs and the patch tokens'.

        None where patch tokens cannot be exchanged, or bring nothing measurable. A gain below 0 counts as 0.
        """
        if self.patches is None or self.patches.loss.low is None or self.patches.loss.low <= 0:
            return None
        spatial = max(0.0, self.another.loss.value)
        return spatial / (spatial + self.patches.loss.value)

    @property
    def attention_share(self) -> float | None:
        """The spatial tokens' share of the attention that text pays to a picture, mean over layers."""
        if not self.attention:
            return None
        shares = [each.spatial.value / (each.spatial.value + each.patches.value) for each in self.attention]
        return sum(shares) / len(shares)

    @property
    def verdict(self) -> str:
        """What it means, in a sentence."""
        gain, found = self.another.loss, f"on {self.samples} samples of {self.pictures} pictures"
        if gain.low is None or gain.high is None:
            return f"No verdict: too few pictures for intervals, {found}. Use more pictures."
        if gain.low > 0:
            return f"The spatial tokens are used: with another picture's the loss is higher by {gain:.4f}, {found}."
        if gain.high < 0:
            return f"The spatial tokens mislead: with another picture's the loss is lower, by {gain:.4f}, {found}."
        return f"No use of the spatial tokens is seen: with another picture's the loss changes by {gain:.4f}, {found}."

    def metrics(self, prefix: str = "usage_") -> dict[str, float]:
        """Numbers for a training log; what was not measured is left out."""
        found = {
            "gain": self.another.loss.value,
            "gain_low": self.another.loss.low,
            "gain_high": self.another.loss.high,
            "gain_over_mean": self.mean.loss.value,
            "share": self.share,
            "attention_share": self.attention_share,
            "places": self.places,
        }
        return {prefix + name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        derived = {"share": self.share, "attention_share": self.attention_share, "verdict": self.verdict}
        return {**asdict(self), **derived}

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"its own tokens                   loss {self.loss:.4f}, right {self.right:.3f}"]
        rows = [("another picture's spatial tokens", self.another), ("the mean spatial tokens         ", self.mean)]
        if self.patches is not None:
            rows.append(("another picture's patch tokens  ", self.patches))
        lines += [f"{name} loss {change.loss:+.4f}, right {_negated(change.right):+.3f}" for name, change in rows]
        if self.share is not None:
            lines.append(f"share of what the picture's tokens bring: {self.share:.1%}")
        if self.attention_share is not None:
            lines.append(f"share of the attention to the picture: {self.attention_share:.1%} ({self.places:.1%} of its places)")
        return "\n".join([*lines, fill(self.verdict, WIDTH)])


def _negated(estimate: Estimate) -> Estimate:
    """The same with its sign changed."""
    bounds = [None if each is None else 0 - each for each in (estimate.high, estimate.low)]
    return Estimate(0 - estimate.value, *bounds)
