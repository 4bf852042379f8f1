"""What every module asks of its input, and the error that says what is wrong with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.grid import Size, as_size
from spatial_tokens.ops.autocasting import autocasts
from spatial_tokens.ops.dense import check_dense

GridSizes = Size | Sequence[Size] | torch.Tensor


def as_patch_map(
    patches: torch.Tensor, grid_size: Size, hidden_size: int, kernel: nn.Module, grid_sizes: GridSizes | None = None
) -> torch.Tensor:
    """Views patch features `(B, N, C)` as a map `(B, H, W, C)`, for kernels that belong to one grid.

    Args:
        patches: Patch features, the grid's rows one after another.
        grid_size: The grid `(H, W)`; `N` must be `H * W`.
        hidden_size: The channels `C` expected.
        kernel: The layer that will read them: its dtype and device must be theirs.
        grid_sizes: A grid that the call gives, which is an error.

    Raises:
        SpatialTokensError: If the rank, number of patches, channels, dtype or device does not fit, or a grid is given.
    """
    require_own_grid(grid_sizes)
    check_features(patches, hidden_size, kernel, "patch features", "(B, N, C)", ndim=3)
    check_num_patches(patches.shape[1], grid_size)
    return torch.unflatten(patches, 1, grid_size)


def as_images(
    patches: torch.Tensor, grid_sizes: GridSizes | None, grid_size: Size, hidden_size: int, layer: nn.Module
) -> tuple[torch.Tensor, Size | list[Size]]:
    """Patch features of any grid, checked: a batch and its grid, or images one after another and the grid of each.

    Args:
        patches: `(B, N, C)`, or `(sum of N, C)`.
        grid_sizes: `(H, W)` of all images, or a list with that of each; tensors and arrays too. None for `grid_size`.
        grid_size: The grid of images whose grid is not given.
        hidden_size: The channels `C` expected.
        layer: The layer that will read them: its dtype and device must be theirs.

    Returns:
        `(B, N, C)` and one grid, or `(sum of N, C)` and a list.

    Raises:
        SpatialTokensError: If the features are none that the layer reads, or not those of the grids.
    """
    check_dense(patches, "patch features", "(B, N, C)")
    grid_sizes = _as_integers(grid_sizes)
    if patches.ndim != 3 and (patches.ndim != 2 or _is_one(grid_sizes)):
        raise SpatialTokensError(
            f"patch features must have shape (B, N, C), got {tuple(patches.shape)}; images one after another, (sum of N, C), need "
            f"the grid of each: grid_sizes=[(height, width), ...], got {shown(grid_sizes)}"
        )
    check_features(patches, hidden_size, layer, "patch features", "(B, N, C)")
    if _is_one(grid_sizes):
        if grid_sizes is None:
            check_num_patches(patches.shape[1], grid_size, ", or tell their grid: grid_sizes=(height, width)")
            return patches, grid_size
        grid = as_size(grid_sizes, "grid_sizes")
        expected = grid[0] * grid[1]
        if patches.shape[1] != expected:
            raise SpatialTokensError(
                f"got {patches.shape[1]} patches, but grid_sizes={grid} has {grid[0]} x {grid[1]} = {expected}; give the grid that "
                "the patches were made with"
            )
        return patches, grid
    grids = as_grid_list(grid_sizes)
    lengths = [height * width for height, width in grids]
    of_each = [patches.shape[1]] * patches.shape[0] if patches.ndim == 3 else lengths
    if lengths != of_each or sum(lengths) != patches.shape[:-1].numel():
        raise SpatialTokensError(
            f"patch features {tuple(patches.shape)} are not those of {len(grids)} images of {lengths} patches, as grid_sizes tell; "
            "give the grid of each image, in order"
        )
    return patches.reshape(-1, patches.shape[-1]), grids


def as_grid_list(grid_sizes: GridSizes | None) -> list[Size]:
    """The grid of each of several images.

    Raises:
        SpatialTokensError: If that is not what is given.
    """
    grids = _as_integers(grid_sizes)
    if not isinstance(grids, (tuple, list)):
        raise SpatialTokensError(f"grid_sizes must be a list with the grid of each image, got {shown(grid_sizes)}")
    return [as_size(each, "each of grid_sizes") for each in grids]


def _as_integers(grid_sizes: Any, depth: int = 2) -> Any:
    """Grids in plain integers: they may be a tensor or an array, or a list of these, as image processors give them."""
    if isinstance(grid_sizes, (tuple, list)):
        plain = [_as_integers(each, depth - 1) for each in grid_sizes] if depth else grid_sizes
        return tuple(plain) if isinstance(grid_sizes, tuple) else plain
    if isinstance(grid_sizes, int) or not hasattr(grid_sizes, "tolist"):
        return grid_sizes
    try:
        return grid_sizes.tolist()
    except RuntimeError as error:  # of tensors without values, and of sparse and nested ones
        raise SpatialTokensError(f"grid_sizes must be integers, or hold them, got {shown(grid_sizes)}") from error


def _is_one(grid_sizes: GridSizes | None) -> bool:
    """Whether it is one grid, an integer or a pair of them, and not a list of grids."""
    return not isinstance(grid_sizes, (tuple, list)) or (bool(grid_sizes) and all(isinstance(side, int) for side in grid_sizes))


def require_own_grid(grid_sizes: GridSizes | None) -> None:
    """Raises SpatialTokensError if a module that belongs to one grid is given any."""
    if grid_sizes is not None:
        raise SpatialTokensError(
            f"this module reads only the grid that it was built for, got grid_sizes={shown(grid_sizes)}; leave it out; "
            "factorized kernels (with a rank) read every grid"
        )


def check_features(
    features: torch.Tensor, hidden_size: int, layer: nn.Module, name: str, shape: str, *, ndim: int | None = None
) -> None:
    """Raises SpatialTokensError unless features are dense, floating `(..., hidden_size)` that `layer` can read."""
    check_dense(features, name, shape, ndim)
    if features.shape[-1] != hidden_size:
        raise SpatialTokensError(
            f"{name} have {features.shape[-1]} channels, this module was built for {hidden_size}; "
            f"got shape {tuple(features.shape)}, expected {shape} with the channels last"
        )
    if not features.is_floating_point():
        raise SpatialTokensError(f"{name} must be floating point, got {features.dtype}; encode the picture first")
    if type(layer) is nn.Linear:
        weight = layer.weight
        if (features.dtype != weight.dtype or features.device != weight.device) and is_plain(layer):
            check_placement(features, weight, name)


def check_num_patches(given: int, grid_size: Size, advice: str = "") -> None:
    """Raises SpatialTokensError unless the grid has as many patches; extra class and register tokens are named as such."""
    height, width = grid_size
    expected = height * width
    if given == expected:
        return
    found = f"got {given} positions for a grid of {height} x {width} = {expected} patches"
    if given == expected + 1:
        raise SpatialTokensError(f"{found}: one too many, which looks like the class token; drop it: patches[:, 1:]")
    if expected < given <= expected + 16:
        raise SpatialTokensError(
            f"{found}: {given - expected} too many, which look like class and register tokens; "
            f"drop them: patches[:, {given - expected}:]"
        )
    raise SpatialTokensError(f"{found}; resize the picture or build the module with its grid_size{advice}")


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear, a LayerNorm or a Sequential of them is torch's own, unwrapped: its parameters are all there is to it.

    LoRA, quantized, sharded and offloaded layers change their class, their weight's class or their forward, and others hang hooks
    on them; what dtype and device they accept, and what they compute, is theirs to say.
    """
    return (
        type(module) in (nn.Linear, nn.LayerNorm, nn.Sequential)
        and all(
            type(parameter) is nn.Parameter
            for parameter in (getattr(module, name, None) for name in ("weight", "bias"))
            if parameter is not None
        )
        and "forward" not in module.__dict__
        and not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
        and not any((hooks._global_forward_hooks, hooks._global_forward_pre_hooks))
        and not any((hooks._global_backward_hooks, hooks._global_backward_pre_hooks))
        and all(is_plain(child) for child in module.children())
    )


def check_placement(features: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    """Raises SpatialTokensError unless features are where the weights are, and of their dtype or of one that autocast casts."""
    if features.device != weight.device:
        raise SpatialTokensError(
            f"{name} are on {features.device}, the weights on {weight.device}; move one of them: .to({str(weight.device)!r})"
        )
    if features.dtype != weight.dtype and not autocasts(features, weight):
        raise SpatialTokensError(
            f"{name} are {features.dtype}, the weights {weight.dtype}; cast one of them: .to({weight.dtype}), or use torch.autocast"
        )
