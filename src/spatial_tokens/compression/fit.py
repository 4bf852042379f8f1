"""Candidates: how many maps and channels kernels may have, and what each number misses of the dense kernels' tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from spatial_tokens.compression.factors import Factors
from spatial_tokens.compression.kernels import DenseKernel
from spatial_tokens.compression.refit import Fit, Products, fit_core, share
from spatial_tokens.compression.samples import Sample
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import SpatialBasis
from spatial_tokens.ops.window_basis import weights

PRODUCT_BYTES = 2**30  # of sums over pictures that are kept at once; kernels that need more are fitted in several passes
ROUNDING = 1e-10  # of squares of float32 sums: a variance that is no larger a share of them is none


class Candidate(NamedTuple):
    """Channels, and frequencies of each side of a window, or fewer where the window has fewer."""

    rank: int
    frequencies: int


@dataclass
class KernelFit:
    """A kernel's sums over pictures, from which every candidate is fitted and judged.

    Args:
        kernel: The dense kernel, with the most frequencies in its basis.
        factors: Its factors, of the most frequencies and channels.
        plain: Those of a plain HOSVD.
        spatial_basis: Which its maps are.
        candidates: What is tried.

    Attributes:
        found: The fit of each candidate.
        plain_unexplained: What a plain HOSVD of each misses, as a share of the tokens' variance.
    """

    kernel: DenseKernel
    factors: Factors
    plain: Factors
    spatial_basis: SpatialBasis
    candidates: Sequence[Candidate]
    found: dict[Candidate, Fit] = field(init=False, default_factory=dict)
    plain_unexplained: dict[Candidate, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._read, self._read_plain = self._weights(self.factors), self._weights(self.plain)
        self._inputs = torch.unique(torch.cat([self._inputs_of(each) for each in self.candidates]))
        self._plain = [self._of(self.plain, each) for each in self.candidates]

    @property
    def product_bytes(self) -> int:
        """Of the sums."""
        return 2 * 8 * len(self._inputs) * (len(self._inputs) + len(self.kernel.weight))

    def begin(self) -> None:
        """Starts the sums."""
        size, outputs, device = len(self._inputs), len(self.kernel.weight), self.kernel.weight.device
        self._fitted, self._held_out = (Products.zeros(size, outputs, device) for _ in range(2))
        self._plain_errors = torch.zeros(len(self.candidates), dtype=torch.float64, device=device)

    def add(self, patches: torch.Tensor, projected: torch.Tensor, plain: torch.Tensor, held_out: torch.Tensor) -> None:
        """More pictures: features `(b, N, C)`, projected by both `(b, N, R)`, and which of them are held out."""
        tokens = self.kernel.tokens(patches).double()
        inputs = self._inputs_from(self._read, projected)[..., self._inputs]
        for products, which in ((self._fitted, ~held_out), (self._held_out, held_out)):
            products.add(inputs[which].flatten(0, 1), tokens[which].flatten(0, 1))
        inputs, tokens = self._inputs_from(self._read_plain, plain[held_out]), tokens[held_out]
        for i, (candidate, factors) in enumerate(zip(self.candidates, self._plain, strict=True)):
            given = inputs[..., self._inputs_of(candidate)] @ factors.core.flatten(1).T
            self._plain_errors[i] += (given - tokens).square().sum()

    def end(self) -> None:
        """Fits and judges every candidate, and lets go of the sums."""
        everything, samples = self._fitted + self._held_out, max(1, self._held_out.samples)
        variance = everything.variance
        if variance <= ROUNDING * everything.total.item() / everything.samples and bool(self.kernel.weight.any()):
            raise SpatialTokensError(
                f"all pictures have the same token of {self.kernel.name}; give features of pictures that differ"
            )
        for candidate, error in zip(self.candidates, self._plain_errors.tolist(), strict=True):
            kept = torch.searchsorted(self._inputs, self._inputs_of(candidate))
            prior, parts = self.factors_of(candidate), (self._fitted.part(kept), self._held_out.part(kept))
            found = fit_core(prior, *parts)
            self.found[candidate] = found._replace(core=found.core.to(self.kernel.dtype))
            self.plain_unexplained[candidate] = share(error / samples, variance)
        del self._fitted, self._held_out, self._plain_errors

    def factors_of(self, candidate: Candidate) -> Factors:
        """The factors of a candidate."""
        return self._of(self.factors, candidate)

    def _maps_of(self, candidate: Candidate) -> torch.Tensor:
        most = self.kernel.basis.frequencies
        number, all_of = min(candidate.frequencies, most), torch.arange(most**2, device=self.kernel.weight.device)
        return all_of[: number**2] if self.spatial_basis == "learned" else all_of.view(most, most)[:number, :number].flatten()

    def _inputs_of(self, candidate: Candidate) -> torch.Tensor:
        rank = len(self.factors.projection)
        channels = torch.arange(candidate.rank, device=self.kernel.weight.device)
        return (self._maps_of(candidate)[:, None] * rank + channels).flatten()

    def _of(self, factors: Factors, candidate: Candidate) -> Factors:
        return factors.part(self._maps_of(candidate), candidate.rank)

    def _weights(self, factors: Factors) -> torch.Tensor:
        maps = torch.unflatten(factors.maps, 1, self.kernel.basis.map_size)
        return weights(self.kernel.basis, self.kernel.grid_size, self.kernel.grid_size, maps).to(self.kernel.dtype)

    def _inputs_from(self, read: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """`(b, N, R)` to `(b, windows, M * R)` in float64."""
        windows = self.kernel.basis.num_windows
        return torch.unflatten(read @ projected, 1, (windows, -1)).flatten(2).double()


def gather(fits: Sequence[Sequence[KernelFit]], sample: Sample) -> None:
    """Fits kernels, in groups that share their channels, to a sample's pictures; in as many passes as the sums need."""
    passes = list(_passes(fits))
    for number, chosen in enumerate(passes, start=1):
        for fit in (fit for group in chosen for fit in group):
            fit.begin()
        stage = "tokens of dense kernels" + (f" ({number} of {len(passes)})" if len(passes) > 1 else "")
        for patches, held_out in sample.read(stage):
            for group in chosen:
                both = torch.cat([group[0].factors.projection, group[0].plain.projection]).to(patches.dtype)
                projected, plain = (patches @ both.T).chunk(2, dim=-1)
                for fit in group:
                    fit.add(patches, projected, plain, held_out)
        for fit in (fit for group in chosen for fit in group):
            fit.end()


def _passes(fits: Sequence[Sequence[KernelFit]]) -> Iterator[list[list[KernelFit]]]:
    chosen: list[list[KernelFit]] = []
    room = PRODUCT_BYTES
    for group in fits:
        chosen.append([])
        for fit in group:
            if fit.product_bytes > room and any(chosen):
                yield [each for each in chosen if each]
                chosen, room = [[]], PRODUCT_BYTES
            chosen[-1].append(fit)
            room -= fit.product_bytes
    yield [each for each in chosen if each]
