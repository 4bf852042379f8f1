"""Estimates with 95 % intervals, by a bootstrap over pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

RESAMPLES = 2000
LEAST = 6  # pictures: so few as five agree in sign by chance in 2 / 2**5 of cases, over 5 %, and all resamples with them


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval over pictures; None for the bounds where there are fewer than `LEAST` pictures.

    Args:
        value: Of all pictures.
        low: The 2.5th percentile over resamples of the pictures.
        high: The 97.5th.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, spec: str) -> str:
        if self.low is None or self.high is None:
            return format(self.value, spec)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(sums: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor], *, seed: int = 0) -> list[Estimate]:
    """Statistics of sums over pictures, with percentile intervals over resamples of the pictures.

    Args:
        sums: What each picture adds, `(pictures, values)`.
        statistic: Sums `(resamples, values)` to statistics `(resamples, statistics)`.
        seed: Of the resamples; the same for every call, so that statistics of the same pictures are paired.

    Returns:
        An estimate for each statistic.
    """
    sums = sums.double().cpu()
    values = statistic(sums.sum(0, keepdim=True))[0]
    if len(sums) < LEAST:
        return [Estimate(value) for value in values.tolist()]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    times = torch.zeros(RESAMPLES, len(sums), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    bounds = statistic(times @ sums).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [Estimate(*found) for found in zip(values.tolist(), *bounds.tolist(), strict=True)]


def ratios(sums: torch.Tensor) -> torch.Tensor:
    """Pairs of values `(resamples, 2 * n)`, numerator and denominator in turn, to their ratios `(resamples, n)`."""
    return sums[:, 0::2] / sums[:, 1::2]
