"""Linear readers of a patch's place, fitted in closed form to features that are seen once and not kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spatial_tokens.grid import Size

SECTIONS = (
    12  # of a side, as many as the grid of docs/evidence.md has columns: a reader's accuracy can be compared with its figures
)
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # over the variance of a standardized channel
PAIRED = 1024  # patches of a map that are compared with all others
CONSTANT = 1e-6  # a channel that varies by less than this share of its mean is rounding


class Moments:
    """Means and scatter of rows `[features, targets]`, summed in float64: the normal equations of a linear reader.

    Batches are merged by the update of Chan, Golub and LeVeque, which does not cancel where a channel's mean is far larger than its
    deviation. Memory is `(C + T)^2` numbers, however many rows there are.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(0)
        self.targets = 0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds features `(n, C)` and their targets `(n, T)`."""
        self.targets = targets.shape[1]
        rows = torch.cat([features.double(), targets.double()], dim=1)
        mean = rows.mean(0)
        centered = rows - mean
        self._merge(len(rows), mean, centered.T @ centered)

    def merged(self, others: Moments) -> Moments:
        """Those of the rows of both."""
        made = Moments()
        made.targets = self.targets
        for each in (self, others):
            made._merge(each.count, each.mean, each.scatter)
        return made

    def _merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total, apart = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + (self.count * count / total) * torch.outer(apart, apart)
        self.mean = self.mean + (count / total) * apart
        self.count = total


@dataclass(frozen=True)
class Reader:
    """A linear reader: features `(n, C)` to readings `(n, T)`."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features.double() @ self.weight + self.bias


def fit(train: Moments, validation: Moments) -> Reader:
    """The ridge regression to the targets; each target has the ridge whose error on validation is the least."""
    channels = len(train.mean) - train.targets
    mean, mean_target = train.mean[:channels], train.mean[channels:]
    covariance, with_target = train.scatter[:channels, :channels] / train.count, train.scatter[:channels, channels:] / train.count
    deviation = covariance.diagonal().sqrt()
    scale = torch.where(deviation > CONSTANT * mean.abs(), 1 / deviation, 0)  # a constant channel is not read
    correlation, with_target = covariance * torch.outer(scale, scale), with_target * scale[:, None]
    eye = torch.eye(channels, dtype=torch.float64, device=mean.device)
    weights = torch.stack(
        [scale[:, None] * torch.cholesky_solve(with_target, torch.linalg.cholesky(correlation + ridge * eye)) for ridge in RIDGES]
    )
    best = torch.stack([_errors(weight, train, validation) for weight in weights]).argmin(0)
    weight = weights[best, :, torch.arange(train.targets, device=best.device)].T
    return Reader(weight, mean_target - mean @ weight)


def _errors(weight: torch.Tensor, train: Moments, others: Moments) -> torch.Tensor:
    """The squared error of each target, on rows of which only the moments are known."""
    channels = len(weight)
    inputs, mixed, targets = (
        others.scatter[:channels, :channels], others.scatter[:channels, channels:], others.scatter[channels:, channels:],
    )  # fmt: skip
    apart = others.mean - train.mean
    off = apart[channels:] - apart[:channels] @ weight
    spread = targets.diagonal() - 2 * (weight * mixed).sum(0) + (weight * (inputs @ weight)).sum(0)
    return spread + others.count * off**2


def coordinates(grid: Size, device: torch.device) -> torch.Tensor:
    """Each patch's column and row, from -1 (the first's outer edge) to 1, `(H * W, 2)`."""
    down, across = ((2 * torch.arange(side, dtype=torch.float64, device=device) + 1) / side - 1 for side in grid)
    return torch.stack([across.expand(grid[0], -1), down[:, None].expand(-1, grid[1])], dim=-1).flatten(0, 1)


def sections(places: torch.Tensor) -> torch.Tensor:
    """Coordinates to the twelfth of the side that they are in, 0 to 11."""
    return ((places + 1) / 2 * SECTIONS).long().clamp(max=SECTIONS - 1)


def targets_of(places: torch.Tensor) -> torch.Tensor:
    """What a reader is fitted to: coordinates `(n, 2)` to these and one-hot twelfths, `(n, 2 + 2 * SECTIONS)`."""
    return torch.cat([places, torch.nn.functional.one_hot(sections(places), SECTIONS).flatten(1).double()], dim=1)


def right_order(readings: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the pairs of a picture's patches that differ in a coordinate: how many the readings order rightly; a tie is half.

    Pairs are all, or in a map of more than `PAIRED` patches those with `PAIRED` of them, drawn at random but always the same.

    Args:
        readings: `(N, 2)`.
        places: `(N, 2)`.

    Returns:
        The pairs that are right and all pairs, `(2,)` each.
    """
    drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:PAIRED].to(places.device)
    apart = (places[drawn, None] - places).sign()
    read = (readings[drawn, None] - readings).sign()
    asked = (apart != 0).sum((0, 1)).double()
    return (asked + (apart * read).sum((0, 1))) / 2, asked
