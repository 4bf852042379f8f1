"""Kernels in Tucker's form: maps on the window, a projection of the channels, and a core for each kernel."""

from collections.abc import Sequence
from math import sqrt
from typing import cast

import torch
from torch import nn

from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import KernelSize, Size, SpatialBasis, as_size
from spatial_tokens.modules.initialization import checked_factory
from spatial_tokens.modules.inputs import GridSizes, as_images, is_plain
from spatial_tokens.ops.window_basis import WindowBasis, cosine_maps, cosine_weights, weights


class FactorizedKernels(nn.Module):
    """Kernels on windows of a patch grid, for a grid of any size; at the paper's size `1 / 200` of the dense ones' parameters.

    Channel `s` of kernel `k` on a window is

        sum over r, f of core_k[s, f, r] * sum over c of D[r, c] * sum over patches p of phi_f(p) x[p, c]

    with maps `phi_f` on the window, one channel projection `D` for all kernels, and a core for each. The maps are products of the
    `F` lowest cosines of each side (DCT-II), and lie on the window, not on its patches: on another grid each patch has the
    cosine's integral over the part of it that is in the window. Learned maps start as those cosines.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        spatial_hidden_size: Channels `S` of the result.
        grid_size: The grid that windows are given in.
        bases: The windows and the number of maps of each kernel.
        rank: Channels `R` that `D` projects to.
        spatial_basis: "cosine", or "learned" for maps that are parameters.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(B, N, C)`; or images of several grids one after another, `(sum of N, C)`.
        - Output: `(B, sum of P, S)`: each kernel's windows in turn.

    Raises:
        SpatialTokensError: In `forward`, if the input does not fit.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        spatial_hidden_size: int,
        *,
        grid_size: KernelSize,
        bases: Sequence[WindowBasis],
        rank: int,
        spatial_basis: SpatialBasis = "cosine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vision_hidden_size = vision_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.bases = tuple(bases)
        self.rank = rank
        self.spatial_basis = spatial_basis
        factory = checked_factory(device, dtype)
        self.channel_projection = nn.Linear(vision_hidden_size, rank, bias=False, **factory)
        self.cores = nn.ModuleList(
            nn.Linear(basis.num_maps * rank, spatial_hidden_size, bias=False, **factory) for basis in self.bases
        )
        maps = self.bases if spatial_basis == "learned" else ()
        self.maps = nn.ParameterList(nn.Parameter(torch.empty(basis.num_maps, *basis.map_size, **factory)) for basis in maps)
        self._reset()

    def reset_parameters(self) -> None:
        """Initializes `D` with orthonormal rows, and the cores so that tokens have the variance of dense ones by `Conv2d`'s rule.

        That holds for features that, along each side of a window, are either the same everywhere or independent of their neighbors.
        A map adds up what is the same, so the weights of the lowest frequency start smaller, the more so the larger the window.
        """
        for core in self.cores:
            cast(nn.Linear, core).reset_parameters()
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        weight = self.channel_projection.weight
        weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device)))  # torch has no QR of 16 bits
        for i, values in enumerate(self.maps):
            basis = self.bases[i]
            values.copy_(cosine_maps(basis.map_size, basis.frequencies, values.device))
        for i, core in enumerate(self.cores):
            rows, columns = (_scales(side, self.bases[i].frequencies) for side in self.bases[i].map_size)
            scales = torch.tensor([row * column for row in rows for column in columns])
            torch.unflatten(cast(nn.Linear, core).weight, 1, (-1, self.rank)).mul_(scales[:, None].to(weight))

    def forward(self, patches: torch.Tensor, grid_sizes: GridSizes | None = None) -> torch.Tensor:
        """Patch features to `(B, sum of P, S)`."""
        images, grids = as_images(patches, grid_sizes, self.grid_size, self.vision_hidden_size, self.channel_projection)
        project, lengths = self.channel_projection, [basis.num_windows * basis.num_maps for basis in self.bases]
        read = self._read(project(images), grids) if self._channels_first(sum(lengths)) else project(self._read(images, grids))
        tokens = [
            core(torch.unflatten(part, 1, (basis.num_windows, basis.num_maps)).flatten(2))
            for core, basis, part in zip(self.cores, self.bases, torch.split(read, lengths, dim=1), strict=True)
        ]
        return torch.cat(tokens, dim=1)

    def _channels_first(self, maps: int) -> bool:
        """Whether it takes fewer multiply-adds to project the channels of all patches, and not of what the maps give."""
        patches = self.grid_size[0] * self.grid_size[1]
        return (patches - maps) * self.rank < maps * patches * (1 - self.rank / self.vision_hidden_size)

    def _read(self, images: torch.Tensor, grids: Size | list[Size]) -> torch.Tensor:
        """Features to what each map gives of them: `(B, sum of P * F * F, ...)`."""
        if isinstance(grids, tuple):  # not `@`, which would copy the features, and keep the copy, where the maps are learned
            return torch.bmm(self._weights(grids, images).expand(images.shape[0], -1, -1), images)
        parts = torch.split(images, [height * width for height, width in grids])
        if not grids:
            return images.unsqueeze(1).expand(-1, sum(basis.num_windows * basis.num_maps for basis in self.bases), -1)
        return torch.stack([self._weights(grid, part) @ part for grid, part in zip(grids, parts, strict=True)])

    def _weights(self, grid: Size, like: torch.Tensor) -> torch.Tensor:
        if self.spatial_basis == "cosine":
            return cosine_weights(self.bases, self.grid_size, grid, like)
        found = [weights(basis, self.grid_size, grid, maps) for basis, maps in zip(self.bases, self.maps, strict=True)]
        return torch.cat(found).to(like.dtype)

    def to_dense(self) -> list[torch.Tensor]:
        """The dense kernels that these stand for: each `(S, h * w * C)`, on its window's patches, or on its bins.

        Raises:
            SpatialTokensError: If a factor is wrapped or quantized.
        """
        if not all(map(is_plain, (self.channel_projection, *self.cores))):
            raise SpatialTokensError("a factor is wrapped, quantized or sharded; merge, unload or gather it first")
        weight = self.channel_projection.weight
        exact = torch.promote_types(weight.dtype, torch.float32)  # products of factors of 16 bits are rounded once
        dense = []
        for i, basis in enumerate(self.bases):
            core = torch.unflatten(cast(nn.Linear, self.cores[i]).weight, 1, (basis.num_maps, self.rank)).to(exact)
            maps = self.maps[i] if self.maps else cosine_maps(basis.map_size, basis.frequencies, core.device)
            channels = torch.einsum("sfr,rc->sfc", core, weight.to(exact))
            dense.append(torch.einsum("sfc,fp->spc", channels, maps.flatten(1).to(exact)).flatten(1).to(weight.dtype))
        return dense

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, rank={self.rank}, spatial_basis={self.spatial_basis!r}"


def _scales(side: int, frequencies: int) -> list[float]:
    """What the weights of each frequency start with, over `Linear`'s rule.

    Along a side of `k` patches the frequency 0 reads `sqrt(k)` times what is the same everywhere, and all `F` read once what is
    independent: with squares `F / k` of the first, and the rest shared by the others, both come out as from a dense kernel.
    """
    lowest = frequencies / side
    return [sqrt(lowest)] + [sqrt((frequencies - lowest) / (frequencies - 1)) for _ in range(1, frequencies)]
