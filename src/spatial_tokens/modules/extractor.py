"""The Spatial Feature Extractor (LLaVA-SP, section 3.2)."""

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from spatial_tokens.grid import KernelSize, Variant, as_size, check_kernel_sizes, check_positive, crop_window, pyramid_windows
from spatial_tokens.modules.initialization import checked_factory, reset
from spatial_tokens.modules.inputs import as_patch_map
from spatial_tokens.modules.window_projection import apply_kernels
from spatial_tokens.ops.pyramid import pyramid


class SpatialFeatureExtractor(nn.Module):
    """One spatial token from each scale of the patch grid (equations 2 and 3).

    Each scale is a window of the grid: its center (cropping) or all of it, averaged to fewer bins (pooling). The paper's
    convolution covers its whole window, so it is a linear map of the window's patches, and is held as one:
    `kernels[i].weight[s]` is the convolution's kernel `s` with its rows, columns and then channels in order.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        spatial_hidden_size: Channels `S` of the spatial tokens.
        grid_size: The patch grid: `(H, W)`, or an integer for a square.
        kernel_sizes: One window each, increasing: integers for squares, or `(height, width)` pairs.
        variant: "cropping" or "pooling".
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(B, N, C)`, the grid's rows one after another, without class token.
        - Output: `(B, K, S)`, one token a kernel, in the order of `kernel_sizes`.

    Raises:
        SpatialTokensError: At construction if a kernel does not fit the grid; in `forward` if the input does not fit.

    Examples:
        >>> extractor = SpatialFeatureExtractor(32, 16, grid_size=(8, 8), kernel_sizes=(4, 8), variant="pooling")
        >>> extractor(torch.randn(2, 64, 32)).shape
        torch.Size([2, 2, 16])
    """

    def __init__(
        self,
        vision_hidden_size: int,
        spatial_hidden_size: int,
        *,
        grid_size: KernelSize,
        kernel_sizes: Sequence[KernelSize],
        variant: Variant = "cropping",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(vision_hidden_size=vision_hidden_size, spatial_hidden_size=spatial_hidden_size)
        self.vision_hidden_size = vision_hidden_size
        self.spatial_hidden_size = spatial_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.kernel_sizes = check_kernel_sizes(self.grid_size, kernel_sizes, variant)
        self.variant = variant
        sizes = [as_size(size, "kernel size") for size in self.kernel_sizes]
        self._pooled_sizes = sizes if variant == "pooling" else None
        self._windows = pyramid_windows(sizes) if variant == "pooling" else [crop_window(self.grid_size, size) for size in sizes]
        factory = checked_factory(device, dtype)
        self.kernels = nn.ModuleList(
            nn.Linear(prod(size) * vision_hidden_size, spatial_hidden_size, bias=False, **factory) for size in sizes
        )

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` an image."""
        return len(self.kernel_sizes)

    def reset_parameters(self) -> None:
        """Initializes the kernels as `Conv2d` initializes its own."""
        reset(self.kernels)

    def forward(self, patches: torch.Tensor, grid_sizes: None = None) -> torch.Tensor:
        """Patch features `(B, N, C)` to spatial tokens `(B, K, S)`; no other grid is read, so `grid_sizes` must be None."""
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.kernels[0], grid_sizes)
        if self._pooled_sizes is not None:
            patch_map = pyramid(patch_map, self._pooled_sizes)  # (B, 1, R, C)
        return apply_kernels(self.kernels, patch_map, self._windows)

    def extra_repr(self) -> str:
        return (
            f"{self.vision_hidden_size}, {self.spatial_hidden_size}, grid_size={self.grid_size}, "
            f"kernel_sizes={self.kernel_sizes}, variant={self.variant!r}"
        )
