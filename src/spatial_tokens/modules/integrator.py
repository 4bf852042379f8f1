"""The Detail Feature Integrator (LLaVA-SP, section 3.3)."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast, overload

import torch
from torch import nn

from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import (
    KernelSize,
    SpatialBasis,
    Window,
    as_frequencies,
    as_kernel_size,
    as_size,
    check_factors,
    check_positive,
    strided_grid_size,
)
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.modules.initialization import checked_factory, reset
from spatial_tokens.modules.inputs import GridSizes, as_patch_map, check_features, is_plain
from spatial_tokens.modules.window_projection import apply_kernels
from spatial_tokens.ops.integrate import attend, integrate
from spatial_tokens.ops.window_basis import WindowBasis


class DetailFeatureIntegrator(nn.Module):
    """Spatial tokens look up details in a finer map of the same patches, by cross-attention of one head (equation 4).

    The detail map is a strided convolution over the grid, without padding and bias; as in `SpatialFeatureExtractor` its kernel
    is held as a linear map of a window's patches. Query, key and value have a LayerNorm and a Linear of their own. With a `rank`
    the kernel is factorized as those of `FactorizedFeatureExtractor`, with a channel projection of its own: the `P` windows are
    then shares of the picture, so that the detail map has `P` positions on every grid.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        spatial_hidden_size: Channels `S` of the spatial tokens and of the detail map.
        grid_size: The patch grid: `(H, W)`, or an integer for a square.
        kernel_size: The detail kernel, in patches; table 6 compares 4, 8, 12 and 16.
        stride: Its stride, in patches. As in `Conv2d`, patches beyond the last complete window are not seen.
        rank: Channels that a factorized kernel sees; None for a dense one.
        frequencies: Its cosines of each side of the window; 3 if there is a rank.
        spatial_basis: "cosine", or "learned" for maps that are parameters.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Inputs: spatial tokens `(B, K, S)`, patch features `(B, N, C)`.
        - Output: `(B, K, 2S)`: the spatial tokens, then what they looked up. With `return_attention=True` also the attention
          `(B, K, P)` over the `P` positions of the detail map, row by row (figure 5).

    Raises:
        SpatialTokensError: At construction if the kernel does not fit the grid, or its factors the kernel; in `forward` if an
            input does not fit.

    Examples:
        >>> integrator = DetailFeatureIntegrator(32, 16, grid_size=8, kernel_size=4, stride=2)
        >>> tokens, attention = integrator(torch.randn(2, 6, 16), torch.randn(2, 64, 32), return_attention=True)
        >>> tokens.shape, attention.shape
        (torch.Size([2, 6, 32]), torch.Size([2, 6, 9]))
    """

    def __init__(
        self,
        vision_hidden_size: int,
        spatial_hidden_size: int,
        *,
        grid_size: KernelSize,
        kernel_size: KernelSize = 16,
        stride: KernelSize = 2,
        rank: int | None = None,
        frequencies: int | None = None,
        spatial_basis: SpatialBasis = "cosine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(vision_hidden_size=vision_hidden_size, spatial_hidden_size=spatial_hidden_size)
        self.vision_hidden_size = vision_hidden_size
        self.spatial_hidden_size = spatial_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.kernel_size = as_kernel_size(kernel_size, "kernel_size")
        self.stride = as_kernel_size(stride, "stride")
        self.detail_grid_size = strided_grid_size(self.grid_size, self.kernel_size, self.stride)
        self._window = Window(0, 0, *as_size(self.kernel_size, "kernel_size"))
        self._step = as_size(self.stride, "stride")
        factory = checked_factory(device, dtype)
        self.detail_kernel = self._kernel(rank, frequencies, spatial_basis, factory)

        def projector() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(spatial_hidden_size, **factory), nn.Linear(spatial_hidden_size, spatial_hidden_size, **factory)
            )

        self.query_projector = projector()
        self.key_projector = projector()
        self.value_projector = projector()

    def _kernel(self, rank: int | None, frequencies: int | None, spatial_basis: SpatialBasis, factory: dict[str, Any]) -> nn.Module:
        channels, spatial_hidden_size = self.vision_hidden_size, self.spatial_hidden_size
        checked = check_factors(channels, [self.kernel_size], rank, frequencies, spatial_basis)
        if rank is None or checked is None:
            return nn.Linear(self._window.height * self._window.width * channels, spatial_hidden_size, bias=False, **factory)
        (number,) = as_frequencies(checked, 1)
        basis = WindowBasis(self._window, number, step=self._step, count=self.detail_grid_size)
        return FactorizedKernels(
            channels,
            spatial_hidden_size,
            grid_size=self.grid_size,
            bases=[basis],
            rank=rank,
            spatial_basis=spatial_basis,
            **factory,
        )

    @property
    def rank(self) -> int | None:
        """Channels that the factorized kernel sees; None of a dense one."""
        return self.detail_kernel.rank if isinstance(self.detail_kernel, FactorizedKernels) else None

    @property
    def frequencies(self) -> int | None:
        """The factorized kernel's cosines of each side of the window; None of a dense one."""
        return self.detail_kernel.bases[0].frequencies if isinstance(self.detail_kernel, FactorizedKernels) else None

    @property
    def spatial_basis(self) -> SpatialBasis:
        """What its maps on the window are: "cosine" or "learned"."""
        return self.detail_kernel.spatial_basis if isinstance(self.detail_kernel, FactorizedKernels) else "cosine"

    @property
    def any_grid(self) -> bool:
        """Whether it reads patches of every grid."""
        return self.rank is not None

    @property
    def out_features(self) -> int:
        """Channels of the output: `2S`."""
        return 2 * self.spatial_hidden_size

    def reset_parameters(self) -> None:
        """Initializes the kernel as `Conv2d` does, or its factors to the same variance, the norms and linears as torch does."""
        for part in self.children():
            reset(part)

    @overload
    def forward(
        self,
        spatial_tokens: torch.Tensor,
        patches: torch.Tensor,
        grid_sizes: GridSizes | None = None,
        *,
        return_attention: Literal[False] = False,
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self,
        spatial_tokens: torch.Tensor,
        patches: torch.Tensor,
        grid_sizes: GridSizes | None = None,
        *,
        return_attention: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def forward(
        self, spatial_tokens: torch.Tensor, patches: torch.Tensor, grid_sizes: GridSizes | None = None, *, return_attention: bool
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self,
        spatial_tokens: torch.Tensor,
        patches: torch.Tensor,
        grid_sizes: GridSizes | None = None,
        *,
        return_attention: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Spatial tokens `(B, K, S)` and patch features `(B, N, C)` to `(B, K, 2S)`, and the attention `(B, K, P)` if asked.

        Args:
            spatial_tokens: Those of the same images.
            patches: Patch features; of a factorized kernel also `(sum of N, C)`, images of different grids one after another.
            grid_sizes: For a factorized kernel: the grid `(H, W)` of all images, or a list with that of each.
            return_attention: Whether to return it.
        """
        detail = self.detail_map(patches, grid_sizes)
        query = self.query_projector
        layer = query[-1] if isinstance(query, nn.Sequential) else query
        check_features(spatial_tokens, self.spatial_hidden_size, layer, "spatial tokens", "(B, K, S)", ndim=3)
        if spatial_tokens.shape[0] != detail.shape[0]:
            raise SpatialTokensError(
                f"spatial tokens are for a batch of {spatial_tokens.shape[0]}, patch features for one of {detail.shape[0]}; "
                "give both of the same images"
            )
        tokens, attention = self.look_up(spatial_tokens, detail)
        return (tokens, attention) if return_attention else tokens

    def detail_map(self, patches: torch.Tensor, grid_sizes: GridSizes | None = None) -> torch.Tensor:
        """Patch features `(B, N, C)` to the detail map `(B, P, S)`, its positions row by row."""
        if isinstance(self.detail_kernel, FactorizedKernels):
            return self.detail_kernel(patches, grid_sizes)  # type: ignore[no-any-return]
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.detail_kernel, grid_sizes)
        return apply_kernels([self.detail_kernel], patch_map, [self._window], self._step, self.detail_grid_size)

    def look_up(self, spatial_tokens: torch.Tensor, detail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spatial tokens `(B, K, S)` and a detail map `(B, P, S)` to `(B, K, 2S)` and the attention `(B, K, P)`."""
        query, key, value = projectors = self.query_projector, self.key_projector, self.value_projector
        if all(map(_is_norm_and_linear, projectors)):
            parameters = [list(projector.parameters()) for projector in projectors]
            eps = [cast(nn.LayerNorm, projector[0]).eps for projector in projectors]
            return integrate(spatial_tokens, detail, *parameters, eps=eps)
        return attend(spatial_tokens, query(spatial_tokens), key(detail), value(detail))

    @torch.no_grad()
    def to_dense(self) -> DetailFeatureIntegrator:
        """A copy with the dense kernel that a factorized one is on `grid_size`, equal but for rounding.

        Raises:
            SpatialTokensError: If a factor is wrapped or quantized.
        """
        if not isinstance(self.detail_kernel, FactorizedKernels):
            return copy.deepcopy(self)
        (weight,) = self.detail_kernel.to_dense()
        kernel = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        kernel.load_state_dict({"weight": weight}, assign=True)
        return copy.deepcopy(self, {id(self.detail_kernel): kernel.train(self.training)})

    def extra_repr(self) -> str:
        return (
            f"{self.vision_hidden_size}, {self.spatial_hidden_size}, grid_size={self.grid_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}"
        )


def _is_norm_and_linear(projector: nn.Module) -> bool:
    """Whether it is as it was made: a LayerNorm and a Linear, with their biases, that is not wrapped."""
    layers = [type(layer) for layer in projector.children()]
    return is_plain(projector) and layers == [nn.LayerNorm, nn.Linear] and len(list(projector.parameters())) == 4
