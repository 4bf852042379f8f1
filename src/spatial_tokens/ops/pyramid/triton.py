"""The GPU kernels: every bin is read in place and averaged in float32, in a fixed order; no permuted copy, no atomics.

Adaptive pooling of `n` rows to `k` has bins `[floor(i * n / k), ceil((i + 1) * n / k))`; turned round, row `y` lies in the bins
`[floor(y * k / n), ceil((y + 1) * k / n))`, which is what the gradient gathers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from spatial_tokens.grid import Size
from spatial_tokens.ops.backends import on_device_of

BLOCK_C = 256
WARPS = 2  # with 4, the gradient's registers spill on sm_90 (triton 3.6)


@triton.jit
def _first(index, bins, length):
    return index * length // bins


@triton.jit
def _past(index, bins, length):
    return ((index + 1) * length + bins - 1) // bins


@triton.jit
def pool_kernel(patch_map, pooled, stride_b, stride_y, stride_x, H, W, SIZES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """One bin, a block of its channels: the mean of its patches."""
    row = tl.program_id(0)
    rows, columns, first = tl.full([], SIZES[0][0], tl.int32), tl.full([], SIZES[0][1], tl.int32), tl.full([], 0, tl.int32)
    before = 0
    for i in tl.static_range(len(SIZES)):
        here = row >= before
        rows, columns = tl.where(here, SIZES[i][0], rows), tl.where(here, SIZES[i][1], columns)
        first = tl.where(here, before, first)
        before += SIZES[i][0] * SIZES[i][1]
    i, j = (row - first) // columns, (row - first) % columns
    top, bottom = _first(i, rows, H), _past(i, rows, H)
    left, right = _first(j, columns, W), _past(j, columns, W)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for patch in range((bottom - top) * (right - left)):
        y, x = top + patch // (right - left), left + patch % (right - left)
        place = image * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        total += tl.load(patch_map + place + c, mask=c < C, other=0.0).to(tl.float32)
    mean = total / ((bottom - top) * (right - left))
    tl.store(pooled + (image * tl.num_programs(0) + row) * C + c, mean.to(pooled.dtype.element_ty), mask=c < C)


@triton.jit
def pool_grad_kernel(grad, map_grad, H, W, R, SIZES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """One patch, a block of its channels: what the bins that it lies in have for it, the sizes one after another."""
    patch = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    first = 0
    for size in tl.static_range(len(SIZES)):
        rows, columns = SIZES[size][0], SIZES[size][1]
        for i in range(_first(patch // W, H, rows), _past(patch // W, H, rows)):
            for j in range(_first(patch % W, W, columns), _past(patch % W, W, columns)):
                height = _past(i, rows, H) - _first(i, rows, H)
                width = _past(j, columns, W) - _first(j, columns, W)
                g = tl.load(grad + (image * R + first + i * columns + j) * C + c, mask=c < C, other=0.0).to(tl.float32)
                total += g / (height * width)
        first += rows * columns
    tl.store(map_grad + (image * tl.num_programs(0) + patch) * C + c, total.to(map_grad.dtype.element_ty), mask=c < C)


def pyramid(patch_map: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """`(B, H, W, C)` to `(B, 1, R, C)`."""
    if patch_map.stride(3) != 1:
        patch_map = patch_map.contiguous()
    batch, height, width, channels = patch_map.shape
    rows = sum(h * w for h, w in sizes)
    pooled = patch_map.new_empty(batch, 1, rows, channels)
    if pooled.numel():
        with on_device_of(patch_map):
            pool_kernel[(rows, triton.cdiv(channels, BLOCK_C), batch)](
                patch_map, pooled, *patch_map.stride()[:3], height, width, SIZES=tuple(sizes), C=channels, BLOCK=BLOCK_C
            )
    return pooled


def pyramid_grad(grad: torch.Tensor, sizes: Sequence[Size], grid: Size) -> torch.Tensor:
    """The gradient `(B, 1, R, C)` to the patch map's `(B, H, W, C)`."""
    grad = grad.contiguous()
    batch, rows, channels = grad.shape[0], grad.shape[2], grad.shape[3]
    map_grad = grad.new_empty(batch, *grid, channels)
    if map_grad.numel():
        with on_device_of(grad):
            pool_grad_kernel[(grid[0] * grid[1], triton.cdiv(channels, BLOCK_C), batch)](
                grad, map_grad, *grid, rows, SIZES=tuple(sizes), C=channels, BLOCK=BLOCK_C, num_warps=WARPS
            )
    return map_grad
