"""The channels and maps that dense kernels need most: singular vectors of kernels that are weighed by the features' moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spatial_tokens.compression.kernels import DenseKernel
from spatial_tokens.compression.samples import Sample
from spatial_tokens.grid import SpatialBasis
from spatial_tokens.ops.window_basis import cosine_maps


@dataclass(frozen=True)
class SecondMoments:
    """Of features, of their channels and of their places: the product stands for those of channels and places together.

    Args:
        channels: `(C, C)`, in the mean over patches.
        places: `(N, N)`, in the mean over channels, its diagonal 1 in the mean.
    """

    channels: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, sample: Sample) -> SecondMoments:
        """Of all pictures of a sample, in float64."""
        size = sample.grid_size[0] * sample.grid_size[1]
        channels = torch.zeros(sample.hidden_size, sample.hidden_size, dtype=torch.float64, device=sample.device)
        places = torch.zeros(size, size, dtype=torch.float64, device=sample.device)
        for patches, _ in sample.read("moments of features"):
            of_channels, of_places = patches.flatten(0, 1), patches.transpose(0, 1).flatten(1)
            channels += of_channels.T @ of_channels
            places += of_places @ of_places.T
        return cls(channels / (sample.pictures * size), places * size / _energy(places))


@dataclass(frozen=True)
class Factors:
    """What stands for a kernel.

    Args:
        maps: `(M, P)`, orthonormal rows.
        projection: `(R, C)`, orthonormal rows.
        core: `(S, M, R)`: the best, if features have these moments.
        of_maps: `(M, M)`: second moments of what the maps read.
        of_channels: `(R, R)`: of what the projection gives.
    """

    maps: torch.Tensor
    projection: torch.Tensor
    core: torch.Tensor
    of_maps: torch.Tensor
    of_channels: torch.Tensor

    def part(self, maps: torch.Tensor, rank: int) -> Factors:
        """Some of the maps and the first channels, with the core that is best for them."""
        onto_maps = _solve(self.of_maps[maps][:, maps], self.of_maps[maps])
        onto_channels = _solve(self.of_channels[:rank, :rank], self.of_channels[:rank])
        return Factors(
            self.maps[maps],
            self.projection[:rank],
            torch.einsum("smr,nm,qr->snq", self.core, onto_maps, onto_channels),
            self.of_maps[maps][:, maps],
            self.of_channels[:rank, :rank],
        )


def decompose(
    kernels: Sequence[DenseKernel], rank: int, spatial_basis: SpatialBasis, moments: SecondMoments | None
) -> list[Factors]:
    """The factors of kernels that share their channels; the first maps and channels are also the best fewer ones.

    Each kernel counts alike, whatever its size.

    Args:
        kernels: With the frequencies that each shall have in its `basis`.
        rank: The channels.
        spatial_basis: "cosine", or "learned" for maps that are singular vectors too.
        moments: Of the features; None for a plain HOSVD, which knows none.
    """
    weight = kernels[0].weight
    channels = _identity(weight.shape[1] // kernels[0].places, weight) if moments is None else moments.channels
    root = _root(channels)
    gram, contracted = torch.zeros_like(channels), []
    for kernel in kernels:
        places = _identity(kernel.places, weight) if moments is None else _of_places(kernel, moments.places)
        maps = _maps(kernel, spatial_basis, places, None if moments is None else root).to(weight.dtype).double()
        of_maps = maps @ places @ maps.T
        best = kernel.contract(_solve(of_maps, maps @ places))  # (S, M, C)
        whitened = torch.einsum("smc,mn->snc", best, _root(of_maps)).flatten(0, 1)
        own = whitened.T @ whitened
        gram += own / _energy(own @ channels)
        contracted.append((maps, of_maps, best))
    projection = _orthonormal(_leading(gram, root, rank)).to(weight.dtype).double()
    of_channels = projection @ channels @ projection.T
    onto = _solve(of_channels, projection @ channels)
    return [
        Factors(maps, projection, torch.einsum("smc,rc->smr", best, onto), of_maps, of_channels)
        for maps, of_maps, best in contracted
    ]


def _of_places(kernel: DenseKernel, places: torch.Tensor) -> torch.Tensor:
    """Second moments `(P, P)` of what a kernel sees, in the mean over its windows."""
    cells = kernel.cells()
    return torch.stack([each @ places @ each.T for each in cells]).mean(0) if len(cells) > 1 else cells[0] @ places @ cells[0].T


def _maps(kernel: DenseKernel, spatial_basis: SpatialBasis, places: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    if spatial_basis == "cosine":
        return cosine_maps(kernel.basis.map_size, kernel.basis.frequencies, places.device).flatten(1)
    gram, of_channels = torch.zeros_like(places), None if root is None else root.to(kernel.dtype)
    for part in kernel.slices():
        rows = (part if of_channels is None else part @ of_channels).transpose(0, 1).flatten(1)
        gram += rows @ rows.T
    return _orthonormal(_leading(gram, _root(places), kernel.basis.num_maps))


def _leading(gram: torch.Tensor, root: torch.Tensor, count: int) -> torch.Tensor:
    """What reads the leading singular vectors `V` of a whitened kernel: `V^T root^-1`, each row scaled, without an inverse."""
    vectors: torch.Tensor = torch.linalg.eigh(root @ gram @ root)[1].flip(1)
    return vectors[:, :count].mT @ root @ gram


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows, of which the first span what the first did."""
    scale = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    columns: torch.Tensor = torch.linalg.qr((rows / scale).mT)[0]
    return columns.mT.contiguous()


def _root(symmetric: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def _solve(symmetric: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A pseudo-inverse times a matrix: features may have no energy in some direction."""
    inverse: torch.Tensor = torch.linalg.pinv(symmetric, rtol=1e-13, hermitian=True)
    return inverse @ right


def _identity(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64, device=like.device)


def _energy(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.trace().clamp_min(torch.finfo(matrix.dtype).tiny)
