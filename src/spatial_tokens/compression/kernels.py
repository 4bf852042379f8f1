"""Dense kernels as what is compressed: a weight, and what it reads of a patch map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spatial_tokens.grid import Size
from spatial_tokens.ops.window_basis import WindowBasis, weights
from spatial_tokens.ops.windows import cut, pool

SLICE = 32  # of a kernel's outputs, which are cast together


@dataclass(frozen=True)
class DenseKernel:
    """A kernel of a dense projector.

    Args:
        name: What a report calls its tokens.
        weight: `(S, P * C)`, in the projector's dtype.
        basis: Its windows, and the frequencies that it shall have.
        grid_size: The projector's grid.
    """

    name: str
    weight: torch.Tensor
    basis: WindowBasis
    grid_size: Size

    @property
    def dtype(self) -> torch.dtype:
        """In what it is computed with: float64 if it is that, float32 if it is anything else."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def places(self) -> int:
        """`P`: the patches of its window, or the bins."""
        return self.basis.map_size[0] * self.basis.map_size[1]

    def slices(self) -> Iterator[torch.Tensor]:
        """The weight, a few outputs `(s, P, C)` at a time."""
        for part in torch.split(self.weight, SLICE):
            yield torch.unflatten(part.to(self.dtype), 1, (self.places, -1))

    def contract(self, maps: torch.Tensor) -> torch.Tensor:
        """The sum over places with `(M, P)`: `(S, M, C)` in float64."""
        return torch.cat([(maps.to(self.dtype) @ part).double() for part in self.slices()])

    def cells(self) -> torch.Tensor:
        """How much of each patch each place is, `(windows, P, N)` in float64."""
        one_each = torch.unflatten(torch.eye(self.places, dtype=torch.float64, device=self.weight.device), 1, self.basis.map_size)
        return torch.unflatten(weights(self.basis, self.grid_size, self.grid_size, one_each), 0, (-1, self.places))

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(b, N, C)` to what the kernel gives of each window, `(b, windows, S)`."""
        patch_map, basis = torch.unflatten(patches, 1, self.grid_size), self.basis
        if basis.bins is not None:
            return self._apply(pool(patch_map, basis.bins)).unsqueeze(1)
        (rows, columns), (down, right) = basis.count, basis.step
        corners = [(basis.window.top + i * down, basis.window.left + j * right) for i in range(rows) for j in range(columns)]
        windows = (basis.window._replace(top=top, left=left) for top, left in corners)
        return torch.stack([self._apply(cut(patch_map, window)) for window in windows], dim=1)

    def _apply(self, cells: torch.Tensor) -> torch.Tensor:
        rows = cells.flatten(1)
        if self.weight.dtype == self.dtype:
            return rows @ self.weight.T
        return torch.cat([rows @ part.flatten(1).T for part in self.slices()], dim=1)
