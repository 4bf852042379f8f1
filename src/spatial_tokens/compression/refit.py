"""Cores refitted by least squares to what the dense kernels give, with a ridge that is chosen on held-out pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spatial_tokens.compression.factors import Factors

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 9))  # relative to the features' own moments


@dataclass
class Products:
    """Sums over samples: products of what a core reads with itself and with the dense kernel's tokens.

    Args:
        inputs: `(d, d)`.
        targets: `(S, d)`.
        total: Of the squares of the tokens.
        mean: Of the tokens, `(S,)`, times the samples.
        samples: How many.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor
    samples: int = 0

    @classmethod
    def zeros(cls, size: int, outputs: int, device: torch.device) -> Products:
        """Before any sample."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(size, size), zeros(outputs, size), zeros(), zeros(outputs))

    def add(self, inputs: torch.Tensor, tokens: torch.Tensor) -> None:
        """More samples: `(n, d)` and `(n, S)`, in float64."""
        self.inputs.addmm_(inputs.T, inputs)
        self.targets.addmm_(tokens.T, inputs)
        self.total += tokens.square().sum()
        self.mean += tokens.sum(0)
        self.samples += len(tokens)

    def part(self, kept: torch.Tensor) -> Products:
        """Of some of the inputs."""
        return Products(self.inputs[kept][:, kept], self.targets[:, kept], self.total, self.mean, self.samples)

    def __add__(self, other: Products) -> Products:
        return Products(
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.total + other.total,
            self.mean + other.mean,
            self.samples + other.samples,
        )

    @property
    def variance(self) -> float:
        """Of the tokens, summed over channels."""
        return (self.total / self.samples - (self.mean / self.samples).square().sum()).clamp_min(0).item()

    def error(self, core: torch.Tensor) -> float:
        """What a core `(S, d)` is off by: the squares, summed over channels, in the mean of the samples."""
        squares = self.total - 2 * (core * self.targets).sum() + ((core @ self.inputs) * core).sum()
        return squares.clamp_min(0).item() / max(1, self.samples)


class Fit(NamedTuple):
    """A core, and how well such cores do on held-out pictures.

    Args:
        core: `(S, M * R)`, fitted to all pictures.
        ridge: The one that does best on the held-out ones, in a fit to the others.
        unexplained: What is missed with it on held-out pictures, as a share of the tokens' variance over all pictures.
        before: The same without a fit.
    """

    core: torch.Tensor
    ridge: float
    unexplained: float
    before: float


def fit_core(prior: Factors, fitted: Products, held_out: Products) -> Fit:
    """The core with the ridge that is best on held-out pictures."""
    cores = solver(prior, fitted)
    errors = {ridge: held_out.error(cores(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    everything = fitted + held_out
    core, variance = solver(prior, everything)(ridge), everything.variance
    return Fit(core, ridge, share(errors[ridge], variance), share(held_out.error(prior.core.flatten(1)), variance))


def solver(prior: Factors, products: Products) -> Callable[[float], torch.Tensor]:
    """For any ridge the core `(S, M * R)` that gives the tokens best, drawn towards that of the factors.

    It minimizes `|tokens - core @ inputs|^2 + ridge * |(core - prior) moments^(1/2)|^2` in the mean over samples, with the inputs'
    second moments as those of channels and places tell them: a ridge without end leaves what is best for these.
    """
    core = prior.core.flatten(1)
    whiten = torch.kron(_inverse_root(prior.of_maps), _inverse_root(prior.of_channels))
    seen, rotation = torch.linalg.eigh(whiten.T @ (products.inputs / products.samples) @ whiten)
    basis = whiten @ rotation
    missing = (products.targets - core @ products.inputs) / products.samples @ basis  # what the prior does not give
    return lambda ridge: core + (missing / (seen.clamp_min(0) + ridge)) @ basis.T


def share(error: float, variance: float) -> float:
    """An error as a share of a variance; 0 of the tokens of a kernel of zeros, which has none."""
    return error / variance if variance > 0 else 0.0 if error == 0 else float("inf")


def _inverse_root(symmetric: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    least = 1e-14 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    inverse: torch.Tensor = vectors * values.clamp_min(least).rsqrt()
    return inverse
