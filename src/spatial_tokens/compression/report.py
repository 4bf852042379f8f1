"""What a compression did: how much of each token it misses, and what fewer or more parameters would have missed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from spatial_tokens.grid import SpatialBasis


@dataclass(frozen=True)
class TokenReport:
    """What is missed of a token: the mean squared error on held-out pictures, over its variance over all pictures.

    Args:
        token: The kernel that makes it, or "detail map".
        unexplained: By the factors whitened by the features and refitted.
        whitened: Without the refit.
        plain_hosvd: By a plain HOSVD of the kernel, which does not use the features, of the same rank and maps.
        ridge: That of the refit, chosen on the held-out pictures.
    """

    token: str
    unexplained: float
    whitened: float
    plain_hosvd: float
    ridge: float


@dataclass(frozen=True)
class CurvePoint:
    """What a rank and a number of frequencies miss, in the mean over tokens, and the parameters of their kernels."""

    rank: int
    frequencies: int
    parameters: int
    unexplained: float
    plain_hosvd: float


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Args:
        rank: Of the kernels.
        frequencies: Maps of each side of each kernel's window; the integrator's has the most of them, or as many as fit.
        spatial_basis: "cosine" or "learned".
        pictures: That the kernels were fitted to.
        held_out: Those of them on which ridges were chosen, and on which a fit to the others was judged.
        dense_parameters: Of the dense kernels.
        parameters: Of the factorized ones.
        unexplained: The mean over tokens.
        tokens: Each token.
        curve: Other ranks and frequencies, by their parameters.
    """

    rank: int
    frequencies: tuple[int, ...]
    spatial_basis: SpatialBasis
    pictures: int
    held_out: int
    dense_parameters: int
    parameters: int
    unexplained: float
    tokens: tuple[TokenReport, ...]
    curve: tuple[CurvePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return asdict(self)

    def to_json(self) -> str:
        """What `to_dict` gives, as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        """A table of the tokens."""
        ratio = self.dense_parameters / self.parameters
        lines = [
            f"{self.dense_parameters:,} parameters of dense kernels to {self.parameters:,} (1/{ratio:.0f}): rank {self.rank}, "
            f"{self.spatial_basis} maps, {' '.join(map(str, self.frequencies))} a side",
            f"variance missed on {self.held_out} of {self.pictures} pictures, by a fit to the others:",
            f"{'token':<14}{'refitted':>10}{'whitened':>10}{'plain HOSVD':>13}{'ridge':>9}",
        ]
        for token in self.tokens:
            shares = f"{token.unexplained:>10.2%}{token.whitened:>10.2%}{token.plain_hosvd:>13.2%}"
            lines.append(f"{token.token:<14}{shares}{token.ridge:>9.0e}")
        return "\n".join(lines)
