"""What a probe found, as numbers, JSON and a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from spatial_tokens.diagnostics.intervals import Estimate
from spatial_tokens.diagnostics.verdict import verdict_of
from spatial_tokens.grid import Size


@dataclass(frozen=True)
class Shares:
    """How far a reading follows what it may follow, in pictures that are shifted: 1 for all the way, 0 not at all.

    Args:
        slot: The patch's own place: an embedding of it, or the encoder's edge, such as the zeros around a convolution.
        border: The picture's border.
        content: What the patch shows, whose place in the picture may be usual, such as the sky's.
    """

    slot: Estimate
    border: Estimate
    content: Estimate


@dataclass(frozen=True)
class Reading:
    """How well a patch's column, or row, is read in pictures that the readers have not seen.

    Args:
        r2: The share of the coordinate's variance that is read; below 0 where saying the middle would be nearer.
        right: How often the right twelfth of the picture is found.
        gain: How much more often it is found than by a reader fitted to half as many pictures.
        chance: How often that is if always the most frequent twelfth is named: of 14 patches on a side, some twelfths have two.
        order: How often it is told rightly which of two patches of a picture is further; chance is 0.5.
        follows: What the reading follows; None where it was not asked, or of one picture.
    """

    r2: Estimate
    right: Estimate
    gain: Estimate
    chance: float
    order: Estimate
    follows: Shares | None = None

    @property
    def skill(self) -> Estimate:
        """How often the right twelfth is found beyond chance: 0 at chance, 1 for always."""
        bounds = (self.right.value, self.right.low, self.right.high)
        value, low, high = (None if each is None else (each - self.chance) / (1 - self.chance) for each in bounds)
        return Estimate(float(value or 0), low, high)


@dataclass(frozen=True)
class Layer:
    """One layer's features.

    Args:
        name: The layer.
        grid: Patches `(H, W)`; None where pictures differ.
        channels: Of a patch.
        column: How well columns are read: left and right.
        row: How well rows are: up and down.
    """

    name: str
    grid: Size | None
    channels: int
    column: Reading
    row: Reading

    @property
    def readings(self) -> tuple[Reading, Reading]:
        return self.column, self.row


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found.

    Args:
        encoder: Its name.
        random_weights: Whether its weights are random.
        pictures: How many there were.
        fitted: How many of them the readers were fitted to.
        tested: How many of them the readers were tested on; intervals are of a bootstrap over these.
        generated: Whether they were generated.
        layer: The layer that a projector reads.
        layers: Every layer.
        with_places: The layer that a projector reads, with a sine-cosine embedding of each patch's place added to its features, as
            large as these: the cheapest alternative to spatial tokens.
    """

    encoder: str
    random_weights: bool
    pictures: int
    fitted: int
    tested: int
    generated: bool
    layer: str
    layers: list[Layer]
    with_places: Layer

    @property
    def main(self) -> Layer:
        """The layer that a projector reads."""
        return next(each for each in self.layers if each.name == self.layer)

    @property
    def verdict(self) -> list[str]:
        """What it means, in sentences that say what they rest on."""
        return verdict_of(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {**asdict(self), "verdict": self.verdict}

    def to_json(self, **others: Any) -> str:
        """All of it, and other entries, as JSON."""
        return json.dumps({**self.to_dict(), **others}, indent=1, allow_nan=False)

    def __str__(self) -> str:
        return "\n".join([*_table(self), "", *_details(self), "", *(fill(each, WIDTH) for each in self.verdict)])


WIDTH = 110  # of sentences
COLUMNS = ("layer", "patches", "channels")
MEASURES = ("R²", "right twelfth", "order of two", "slot", "border", "content")  # of column and row


def _table(report: ProbeReport) -> list[str]:
    """Every layer in a line; of column and row."""
    rows: list[tuple[str, ...]] = [(*("" for _ in COLUMNS), *MEASURES), (*COLUMNS, *(_pair("col", "row") for _ in MEASURES))]
    for each in report.layers:
        mark = "*" if each.name == report.layer else ""
        follows = [reading.follows for reading in each.readings]
        rows.append(
            (
                each.name + mark,
                "of many sizes" if each.grid is None else f"{each.grid[0]} x {each.grid[1]}",
                f"{each.channels:,}",
                _pair(*(f"{reading.r2.value:.2f}" for reading in each.readings)),
                _pair(*(f"{reading.right.value:.0%}" for reading in each.readings)),
                _pair(*(f"{reading.order.value:.0%}" for reading in each.readings)),
                *(
                    _pair(*("" if shares is None else f"{getattr(shares, name).value:.2f}" for shares in follows))
                    for name in ("slot", "border", "content")
                ),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    weights = ", random weights" if report.random_weights else ""
    kind = "generated " if report.generated else ""
    title = (
        f"{report.encoder}{weights}: a patch's column and row, by linear readers; {report.pictures} {kind}pictures, tested on "
        f"{report.tested}"
    )
    return [title, "", *lines[:2], "  ".join("-" * width for width in widths), *lines[2:]]


def _pair(column: str, row: str) -> str:
    return f"{column:>5} {row:>5}"


def _details(report: ProbeReport) -> list[str]:
    """The layer that is read, with its intervals."""
    found = [(f"layer {report.layer}", report.main), ("with places added", report.with_places)]
    lines = ["* the layer that a projector reads; value and 95 % interval (bootstrap over the tested pictures):"]
    for title, layer in found:
        for axis, reading in zip(("column", "row"), layer.readings, strict=True):
            right = f"right twelfth {reading.right:.3f} (chance {reading.chance:.3f})"
            lines.append(f"  {title}, {axis}: R² {reading.r2:.3f}, {right}, order of two {reading.order:.3f}")
    return lines
