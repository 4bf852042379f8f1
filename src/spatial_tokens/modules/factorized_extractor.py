"""The Spatial Feature Extractor with factorized kernels."""

from collections.abc import Sequence

import torch
from torch import nn

from spatial_tokens.grid import (
    RANK,
    KernelSize,
    SpatialBasis,
    Variant,
    Window,
    as_frequencies,
    as_size,
    check_factors,
    check_kernel_sizes,
    check_positive,
    crop_window,
)
from spatial_tokens.modules.extractor import SpatialFeatureExtractor
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.modules.initialization import reset
from spatial_tokens.modules.inputs import GridSizes
from spatial_tokens.ops.window_basis import WindowBasis


class FactorizedFeatureExtractor(nn.Module):
    """One spatial token from each scale of any patch grid; at the paper's size, `1 / 200` of SpatialFeatureExtractor's parameters.

    The scales are those of the paper (section 3.2); each kernel is a Tucker form: `F x F` cosines on its window, one projection of
    the channels that all kernels share, and a core of its own (`FactorizedKernels` has the equation). A window is a share of the
    picture, so that the same weights read patches of every grid.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        spatial_hidden_size: Channels `S` of the spatial tokens.
        grid_size: The patch grid that `kernel_sizes` are given in: `(H, W)`, or an integer for a square.
        kernel_sizes: One window each, increasing: integers for squares, or `(height, width)` pairs.
        variant: "cropping" or "pooling". Pooled scales are nearly the same few cosines of the whole picture, with different cores:
            the tokens then differ in their weights more than in what they see.
        frequencies: Cosines `F` of each side of a window, for all kernels or one number for each; by default 3, or as many as fit.
        rank: Channels `R` that the kernels see; by default 128, or `C` if that is fewer.
        spatial_basis: "cosine", or "learned" for maps that are parameters, and start as the cosines.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(B, N, C)`, the grid's rows one after another, without class token; or `(sum of N, C)`, images of different grids
          one after another.
        - Output: `(B, K, S)`, one token a kernel, in the order of `kernel_sizes`.

    Raises:
        SpatialTokensError: At construction if a kernel does not fit the grid, has fewer patches a side than frequencies, or the
            rank is larger than `C`; in `forward` if the input does not fit.

    Examples:
        >>> extractor = FactorizedFeatureExtractor(32, 16, grid_size=8, kernel_sizes=(4, 8), frequencies=3, rank=4)
        >>> extractor(torch.randn(2, 64, 32)).shape
        torch.Size([2, 2, 16])
        >>> extractor(torch.randn(2, 12 * 10, 32), (12, 10)).shape
        torch.Size([2, 2, 16])
        >>> extractor(torch.randn(64 + 120, 32), [(8, 8), (12, 10)]).shape
        torch.Size([2, 2, 16])
    """

    any_grid = True

    def __init__(
        self,
        vision_hidden_size: int,
        spatial_hidden_size: int,
        *,
        grid_size: KernelSize,
        kernel_sizes: Sequence[KernelSize],
        variant: Variant = "cropping",
        frequencies: int | Sequence[int] | None = None,
        rank: int | None = None,
        spatial_basis: SpatialBasis = "cosine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(vision_hidden_size=vision_hidden_size, spatial_hidden_size=spatial_hidden_size)
        rank = min(RANK, vision_hidden_size) if rank is None else rank
        self.vision_hidden_size = vision_hidden_size
        self.spatial_hidden_size = spatial_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.kernel_sizes = check_kernel_sizes(self.grid_size, kernel_sizes, variant)
        self.variant = variant
        self.frequencies = check_factors(vision_hidden_size, self.kernel_sizes, rank, frequencies, spatial_basis)
        self.rank = rank
        sizes = [as_size(size, "kernel size") for size in self.kernel_sizes]
        numbers = as_frequencies(self.frequencies or (), len(sizes))
        pooled = variant == "pooling"
        bases = [
            WindowBasis(Window(0, 0, *self.grid_size), number, bins=size) if pooled
            else WindowBasis(crop_window(self.grid_size, size), number)
            for size, number in zip(sizes, numbers, strict=True)
        ]  # fmt: skip
        self.kernels = FactorizedKernels(
            vision_hidden_size,
            spatial_hidden_size,
            grid_size=self.grid_size,
            bases=bases,
            rank=rank,
            spatial_basis=spatial_basis,
            device=device,
            dtype=dtype,
        )

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` an image."""
        return len(self.kernel_sizes)

    @property
    def spatial_basis(self) -> SpatialBasis:
        """What the maps on the windows are: "cosine" or "learned"."""
        return self.kernels.spatial_basis

    def reset_parameters(self) -> None:
        """Initializes the factors so that tokens have the variance that `SpatialFeatureExtractor` gives them."""
        reset(self.kernels)

    def forward(self, patches: torch.Tensor, grid_sizes: GridSizes | None = None) -> torch.Tensor:
        """Patch features to spatial tokens `(B, K, S)`.

        Args:
            patches: `(B, N, C)`, or `(sum of N, C)` for images of different grids.
            grid_sizes: The grid `(H, W)` of all images, or a list with that of each; a tensor or array of integers too. None for
                `grid_size`.
        """
        return self.kernels(patches, grid_sizes)  # type: ignore[no-any-return]

    @torch.no_grad()
    def to_dense(self) -> SpatialFeatureExtractor:
        """The dense kernels that these are, on `grid_size`: equal but for rounding, in the same dtype and on the same device.

        Raises:
            SpatialTokensError: If a factor is wrapped or quantized.
        """
        kernels = self.kernels.to_dense()
        dense = SpatialFeatureExtractor(
            self.vision_hidden_size,
            self.spatial_hidden_size,
            grid_size=self.grid_size,
            kernel_sizes=self.kernel_sizes,
            variant=self.variant,
            device="meta",
            dtype=kernels[0].dtype,
        )
        dense.load_state_dict({f"kernels.{i}.weight": weight for i, weight in enumerate(kernels)}, assign=True)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.vision_hidden_size}, {self.spatial_hidden_size}, grid_size={self.grid_size}, "
            f"kernel_sizes={self.kernel_sizes}, variant={self.variant!r}, frequencies={self.frequencies}, rank={self.rank}, "
            f"spatial_basis={self.spatial_basis!r}"
        )
