"""`window_linear` as a registered operator: differentiable, traceable, one call for all kernels.

Tokens are linear in the patch map and in the weights, so each gradient is linear too, and the three operators are one another's
derivatives: that gives gradients of any order.
"""

from collections.abc import Sequence
from typing import Any

import torch

from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size, Window
from spatial_tokens.ops import vmap
from spatial_tokens.ops.autocasting import autocast
from spatial_tokens.ops.backends import Backend, resolve
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.ops.window_linear import gemm, naive
from spatial_tokens.ops.windows import ONCE


def window_linear(
    patch_map: torch.Tensor,
    weights: Sequence[torch.Tensor],
    windows: Sequence[Window],
    *,
    step: Size = ONCE,
    count: Size = ONCE,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Kernels on their windows: each weight is a Linear over the patches of its window, row by row, channels last.

    Args:
        patch_map: Patch features `(B, H, W, C)`.
        weights: `K` weights `(S, h * w * C)`.
        windows: Each weight's first window.
        step: Rows and columns from a window to the next.
        count: Rows and columns of windows that each weight meets, `P` in all.
        backend: "naive", "gemm", "triton", or "auto".

    Returns:
        Tokens `(B, K * P, S)`: a weight's windows one after another, row by row.

    Raises:
        SpatialTokensError: If the map is no dense tensor of four dimensions, a window leaves it, a weight does not fit its
            window, or the named backend cannot run here.
    """
    _check(patch_map, weights, windows, step, count)
    patch_map, *weights = autocast(patch_map, *weights)
    chosen = resolve(backend, patch_map)
    if chosen == "naive":
        return naive.window_linear(patch_map, weights, windows, step, count)
    flat = [number for window in windows for number in window]
    tokens: torch.Tensor = _tokens(patch_map, list(weights), flat, list(step), list(count), chosen)
    return tokens


def _check(patch_map: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size) -> None:
    check_dense(patch_map, "the patch map", "(B, H, W, C)", 4)
    height, width, channels = patch_map.shape[1:]
    if not weights or len(weights) != len(windows):
        raise SpatialTokensError(f"each weight needs a window: got {len(weights)} weights and {len(windows)} windows")
    for weight, window in zip(weights, windows, strict=True):
        bottom, right = window.bottom + (count[0] - 1) * step[0], window.right + (count[1] - 1) * step[1]
        if min(window.top, window.left) < 0 or min(*step, *count) < 1 or bottom > height or right > width:
            raise SpatialTokensError(
                f"{window} leaves the patch map of {height} x {width} (step {step}, count {count}); build the module for its grid"
            )
        expected = (weights[0].shape[0], window.height * window.width * channels)
        if tuple(weight.shape) != expected:
            raise SpatialTokensError(f"{window} of {channels} channels needs a weight {expected}, got {tuple(weight.shape)}")


def _implementation(backend: str) -> Any:
    if backend == "gemm":
        return gemm
    from spatial_tokens.ops.window_linear import triton

    return triton


def _windows(flat: Sequence[int]) -> list[Window]:
    return [Window(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


@torch.library.custom_op(
    "spatial_tokens::window_linear",
    mutates_args=(),
    schema="(Tensor patch_map, Tensor[] weights, int[] windows, int[] step, int[] count, str backend) -> Tensor",
)
def _tokens(
    patch_map: torch.Tensor,
    weights: Sequence[torch.Tensor],
    windows: Sequence[int],
    step: Sequence[int],
    count: Sequence[int],
    backend: str,
) -> torch.Tensor:
    run = _implementation(backend).window_linear
    result: torch.Tensor = run(patch_map, weights, _windows(windows), (step[0], step[1]), (count[0], count[1]))
    return result


@torch.library.custom_op(
    "spatial_tokens::window_linear_input_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] weights, int[] windows, int[] step, int[] count, int[] grid, str backend) -> Tensor",
)
def _input_grad(
    grad: torch.Tensor,
    weights: Sequence[torch.Tensor],
    windows: Sequence[int],
    step: Sequence[int],
    count: Sequence[int],
    grid: Sequence[int],
    backend: str,
) -> torch.Tensor:
    run = _implementation(backend).input_grad
    result: torch.Tensor = run(grad, weights, _windows(windows), (step[0], step[1]), (count[0], count[1]), (grid[0], grid[1]))
    return result


@torch.library.custom_op(
    "spatial_tokens::window_linear_weight_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor patch_map, int[] windows, int[] step, int[] count, str backend) -> Tensor[]",
)
def _weight_grad(
    grad: torch.Tensor,
    patch_map: torch.Tensor,
    windows: Sequence[int],
    step: Sequence[int],
    count: Sequence[int],
    backend: str,
) -> list[torch.Tensor]:
    run = _implementation(backend).weight_grad
    result: list[torch.Tensor] = run(grad, patch_map, _windows(windows), (step[0], step[1]), (count[0], count[1]))
    return result


@_tokens.register_fake
def _(patch_map: Any, weights: Any, windows: Any, step: Any, count: Any, backend: str) -> torch.Tensor:
    size = (patch_map.shape[0], len(weights) * count[0] * count[1], weights[0].shape[0])
    result: torch.Tensor = patch_map.new_empty(size)
    return result


@_input_grad.register_fake
def _(grad: Any, weights: Any, windows: Any, step: Any, count: Any, grid: Any, backend: str) -> torch.Tensor:
    result: torch.Tensor = grad.new_empty(grad.shape[0], *grid, weights[0].shape[1] // (windows[2] * windows[3]))
    return result


@_weight_grad.register_fake
def _(grad: Any, patch_map: Any, windows: Any, step: Any, count: Any, backend: str) -> list[torch.Tensor]:
    return [grad.new_empty(grad.shape[2], w.height * w.width * patch_map.shape[3]) for w in _windows(windows)]


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    patch_map, weights, *ctx.geometry, ctx.backend = inputs
    ctx.grid = [patch_map.shape[1], patch_map.shape[2]]
    ctx.save_for_backward(patch_map, *weights)


def _tokens_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (patch_map, *weights), needs = ctx.saved_tensors, ctx.needs_input_grad
    to_map = _input_grad(grad, weights, *ctx.geometry, ctx.grid, ctx.backend) if needs[0] else None
    to_weights = _weight_grad(grad, patch_map, *ctx.geometry, ctx.backend) if any(needs[1]) else [None] * len(weights)
    return to_map, to_weights, *[None] * 4


def _save_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, weights, *ctx.geometry, _, ctx.backend = inputs
    ctx.save_for_backward(grad, *weights)


def _input_grad_backward(ctx: Any, patch_map: torch.Tensor) -> tuple[Any, ...]:
    (grad, *weights), needs = ctx.saved_tensors, ctx.needs_input_grad
    to_grad = _tokens(patch_map, weights, *ctx.geometry, ctx.backend) if needs[0] else None
    to_weights = _weight_grad(grad, patch_map, *ctx.geometry, ctx.backend) if any(needs[1]) else [None] * len(weights)
    return to_grad, to_weights, *[None] * 5


def _save_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, patch_map, *ctx.geometry, ctx.backend = inputs
    ctx.shapes = [weight.shape for weight in output]
    ctx.save_for_backward(grad, patch_map)


def _weight_grad_backward(ctx: Any, given: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    (grad, patch_map), needs = ctx.saved_tensors, ctx.needs_input_grad
    weights = [grad.new_zeros(s) if weight is None else weight for weight, s in zip(given, ctx.shapes, strict=True)]
    to_grad = _tokens(patch_map, weights, *ctx.geometry, ctx.backend) if needs[0] else None
    grid = [patch_map.shape[1], patch_map.shape[2]]
    to_map = _input_grad(grad, weights, *ctx.geometry, grid, ctx.backend) if needs[1] else None
    return to_grad, to_map, *[None] * 4


_tokens.register_autograd(_tokens_backward, setup_context=_save_tokens)
_input_grad.register_autograd(_input_grad_backward, setup_context=_save_input_grad)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_weight_grad)
vmap.register(_tokens, images_first=True)
vmap.register(_input_grad, images_first=True)
vmap.register(_weight_grad, images_first=False)
