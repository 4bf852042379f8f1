"""The sliding-window extractor (LLaVA-SP, table 5)."""

from math import prod

import torch
from torch import nn

from spatial_tokens.grid import KernelSize, as_kernel_size, as_size, check_positive, strided_windows
from spatial_tokens.modules.initialization import checked_factory, reset
from spatial_tokens.modules.inputs import as_patch_map
from spatial_tokens.modules.window_projection import apply_kernels


class SlidingWindowExtractor(nn.Module):
    """One spatial token from each window of one size, left to right and top to bottom, each with a convolution of its own.

    The paper gives neither the size nor the number of windows; on a 24 x 24 grid, `kernel_size=(12, 8)` makes six.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        spatial_hidden_size: Channels `S` of the spatial tokens.
        grid_size: The patch grid: `(H, W)`, or an integer for a square.
        kernel_size: The windows' size, in patches.
        stride: The step from window to window; the kernel size (windows side by side) when left out.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(B, N, C)`.
        - Output: `(B, K, S)`, one token a window.

    Raises:
        SpatialTokensError: At construction if the kernel does not fit the grid; in `forward` if the input does not fit.

    Examples:
        >>> SlidingWindowExtractor(32, 16, grid_size=24, kernel_size=(12, 8))(torch.randn(2, 576, 32)).shape
        torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        vision_hidden_size: int,
        spatial_hidden_size: int,
        *,
        grid_size: KernelSize,
        kernel_size: KernelSize,
        stride: KernelSize | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(vision_hidden_size=vision_hidden_size, spatial_hidden_size=spatial_hidden_size)
        self.vision_hidden_size = vision_hidden_size
        self.spatial_hidden_size = spatial_hidden_size
        self.grid_size = as_size(grid_size, "grid_size")
        self.kernel_size = as_kernel_size(kernel_size, "kernel_size")
        self.stride = as_kernel_size(self.kernel_size if stride is None else stride, "stride")
        self._windows = strided_windows(self.grid_size, self.kernel_size, self.stride)
        in_features = prod(as_size(self.kernel_size, "kernel_size")) * vision_hidden_size
        factory = checked_factory(device, dtype)
        self.kernels = nn.ModuleList(nn.Linear(in_features, spatial_hidden_size, bias=False, **factory) for _ in self._windows)

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` an image: one for each window."""
        return len(self._windows)

    def reset_parameters(self) -> None:
        """Initializes the kernels as `Conv2d` initializes its own."""
        reset(self.kernels)

    def forward(self, patches: torch.Tensor, grid_sizes: None = None) -> torch.Tensor:
        """Patch features `(B, N, C)` to spatial tokens `(B, K, S)`; no other grid is read, so `grid_sizes` must be None."""
        patch_map = as_patch_map(patches, self.grid_size, self.vision_hidden_size, self.kernels[0], grid_sizes)
        return apply_kernels(self.kernels, patch_map, self._windows)

    def extra_repr(self) -> str:
        return (
            f"{self.vision_hidden_size}, {self.spatial_hidden_size}, grid_size={self.grid_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}"
        )
