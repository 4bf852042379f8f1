"""The extractor and the detail map as the authors wrote them: whole-map convolutions on permuted features."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from spatial_tokens.grid import as_size, crop_window
from spatial_tokens.modules import DetailFeatureIntegrator, SpatialFeatureExtractor


def as_convolution(weight: torch.Tensor, size: tuple[int, int], memory_format: torch.memory_format) -> nn.Parameter:
    """A kernel `(S, h * w * C)` as a convolution's `(S, C, h, w)`; channels last, it is the same memory."""
    kernel = torch.unflatten(weight.detach(), 1, (*size, -1)).permute(0, 3, 1, 2)
    return nn.Parameter(kernel.contiguous(memory_format=memory_format))


class ConvExtractor(nn.Module):
    """One convolution for each scale, over its whole crop or its whole pooled map."""

    def __init__(self, extractor: SpatialFeatureExtractor, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.grid_size, self.variant, self.memory_format = extractor.grid_size, extractor.variant, memory_format
        self.sizes = [as_size(size, "kernel size") for size in extractor.kernel_sizes]
        self.kernels = nn.ParameterList(
            as_convolution(cast(nn.Linear, kernel).weight, size, memory_format)
            for kernel, size in zip(extractor.kernels, self.sizes, strict=True)
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, N, C)` to `(B, K, S)`."""
        patch_map = torch.unflatten(patches, 1, self.grid_size).permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)
        tokens = []
        for kernel, size in zip(self.kernels, self.sizes, strict=True):
            if self.variant == "cropping":
                window = crop_window(self.grid_size, size)
                scale = patch_map[:, :, window.top : window.bottom, window.left : window.right]
            else:
                scale = functional.adaptive_avg_pool2d(patch_map, size)
            tokens.append(functional.conv2d(scale, kernel).flatten(1))
        return torch.stack(tokens, dim=1)


class ConvDetail(nn.Module):
    """The strided convolution of the detail map."""

    def __init__(self, integrator: DetailFeatureIntegrator, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.grid_size, self.stride, self.memory_format = integrator.grid_size, integrator.stride, memory_format
        size = as_size(integrator.kernel_size, "kernel size")
        self.kernel = as_convolution(cast(nn.Linear, integrator.detail_kernel).weight, size, memory_format)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, N, C)` to `(B, P, S)`."""
        patch_map = torch.unflatten(patches, 1, self.grid_size).permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)
        return functional.conv2d(patch_map, self.kernel, stride=self.stride).flatten(2).transpose(1, 2)
