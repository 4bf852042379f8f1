"""`pyramid` as an operator: torch's own poolings, or the kernels as a registered operator and its gradient."""

from collections.abc import Sequence
from typing import Any

import torch

from spatial_tokens.grid import Size
from spatial_tokens.ops import vmap
from spatial_tokens.ops.backends import Backend, resolve
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.ops.pyramid import naive


def pyramid(patch_map: torch.Tensor, sizes: Sequence[Size], *, backend: Backend = "auto") -> torch.Tensor:
    """Adaptive average poolings of one map, one after another, as a map of one row.

    Args:
        patch_map: Patch features `(B, H, W, C)`.
        sizes: `(height, width)` of each pooling, at most the map's.
        backend: "naive", "gemm" (the same here), "triton", or "auto".

    Returns:
        `(B, 1, R, C)` with `R` the sum of the sizes' areas, each size row by row.

    Raises:
        SpatialTokensError: If the map is no dense tensor of four dimensions, or the named backend cannot run here.
    """
    check_dense(patch_map, "the patch map", "(B, H, W, C)", 4)
    if resolve(backend, patch_map) != "triton":
        return naive.pyramid(patch_map, sizes)
    pooled: torch.Tensor = _pyramid(patch_map, [number for size in sizes for number in size])
    return pooled


def _sizes(flat: Sequence[int]) -> list[Size]:
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


@torch.library.custom_op("spatial_tokens::pyramid", mutates_args=(), schema="(Tensor patch_map, int[] sizes) -> Tensor")
def _pyramid(patch_map: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    from spatial_tokens.ops.pyramid import triton

    return triton.pyramid(patch_map, _sizes(sizes))


@torch.library.custom_op("spatial_tokens::pyramid_grad", mutates_args=(), schema="(Tensor grad, int[] sizes, int[] grid) -> Tensor")
def _pyramid_grad(grad: torch.Tensor, sizes: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    from spatial_tokens.ops.pyramid import triton

    return triton.pyramid_grad(grad, _sizes(sizes), (grid[0], grid[1]))


@_pyramid.register_fake
def _(patch_map: Any, sizes: Any) -> torch.Tensor:
    rows = sum(height * width for height, width in _sizes(sizes))
    pooled: torch.Tensor = patch_map.new_empty(patch_map.shape[0], 1, rows, patch_map.shape[3])
    return pooled


@_pyramid_grad.register_fake
def _(grad: Any, sizes: Any, grid: Any) -> torch.Tensor:
    map_grad: torch.Tensor = grad.new_empty(grad.shape[0], *grid, grad.shape[3])
    return map_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.sizes, ctx.grid = inputs[1], [inputs[0].shape[1], inputs[0].shape[2]]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, None]:
    return _pyramid_grad(grad, ctx.sizes, ctx.grid), None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.sizes = inputs[1]


def _grad_backward(ctx: Any, patch_map: torch.Tensor) -> tuple[Any, None, None]:
    return _pyramid(patch_map, ctx.sizes), None, None


_pyramid.register_autograd(_backward, setup_context=_save)
_pyramid_grad.register_autograd(_grad_backward, setup_context=_save_grad)
vmap.register(_pyramid, images_first=True)
vmap.register(_pyramid_grad, images_first=True)
