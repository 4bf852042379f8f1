"""Windows of a patch map `(B, H, W, C)`: cropped, pooled and strided, with the channels last as the features lie in memory."""

import torch
from einops import rearrange
from torch.nn import functional

from spatial_tokens.grid import Size, crop_window


def crop(patch_map: torch.Tensor, size: Size) -> torch.Tensor:
    """The centred window: `(B, H, W, C)` to `(B, h, w, C)` for a size `(h, w)` (section 3.2, "cropping"). A view."""
    window = crop_window((patch_map.shape[1], patch_map.shape[2]), size)
    return patch_map[:, window.top : window.bottom, window.left : window.right]


def pool(patch_map: torch.Tensor, size: Size) -> torch.Tensor:
    """Adaptive average pooling: `(B, H, W, C)` to `(B, h, w, C)` for a size `(h, w)` (section 3.2, "pooling").

    The identity where the size is the grid's.
    """
    if tuple(patch_map.shape[1:3]) == size:
        return patch_map
    return functional.adaptive_avg_pool2d(patch_map.movedim(-1, 1), size).movedim(1, -1)


def unfold(patch_map: torch.Tensor, size: Size, stride: Size) -> torch.Tensor:
    """All strided windows: `(B, H, W, C)` to `(B, P, h * w * C)`, left to right and top to bottom, without padding."""
    windows = patch_map.unfold(1, size[0], stride[0]).unfold(2, size[1], stride[1])
    return rearrange(windows, "b rows columns c h w -> b (rows columns) (h w c)")
