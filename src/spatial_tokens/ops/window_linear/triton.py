"""The GPU kernels: windows are read in place, all weights in one launch, sums in float32 in a fixed order, no atomics.

`tokens` splits the long sum: a program multiplies a stretch of patches of one weight with a block of windows, and `add_splits` adds
the stretches' sums, first to last. `input_grad` gathers, for one patch, from every window that sees it; `weight_grad` owns one
patch of one weight and a block of its outputs. Weights and windows reach a kernel as tuples; `_select` picks one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from spatial_tokens.grid import Size, Window
from spatial_tokens.ops.backends import on_device_of

PROGRAMS_PER_MULTIPROCESSOR = 12  # enough that the last ones, running alone, are a small part of the time


@triton.jit
def _select(index, pointers, WINDOWS: tl.constexpr):
    """The pointer and the window (top, left, height, width) of one weight."""
    pointer = pointers[0]
    top, left = tl.full([], WINDOWS[0][0], tl.int32), tl.full([], WINDOWS[0][1], tl.int32)
    height, width = tl.full([], WINDOWS[0][2], tl.int32), tl.full([], WINDOWS[0][3], tl.int32)
    for i in tl.static_range(1, len(WINDOWS)):
        pointer = tl.where(index == i, pointers[i], pointer)
        top, left = tl.where(index == i, WINDOWS[i][0], top), tl.where(index == i, WINDOWS[i][1], left)
        height, width = tl.where(index == i, WINDOWS[i][2], height), tl.where(index == i, WINDOWS[i][3], width)
    return pointer, top, left, height, width


@triton.jit
def _find(item, length, WINDOWS: tl.constexpr):
    """Which weight an item belongs to, and that weight's first item, where each has one for every `length` patches begun."""
    index, first, before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i in tl.static_range(len(WINDOWS)):
        index = tl.where(item >= before, i, index)
        first = tl.where(item >= before, before, first)
        before += tl.cdiv(WINDOWS[i][2] * WINDOWS[i][3], length)
    return index, first


@triton.jit
def _origins(rows, stride_b, stride_y, stride_x, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Where the windows' offsets from their weight's first window lie: row `b * P + p` is window `p` of image `b`."""
    image, position = rows // (COUNT[0] * COUNT[1]), rows % (COUNT[0] * COUNT[1])
    y, x = position // COUNT[1] * STEP[0], position % COUNT[1] * STEP[1]
    return image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # Triton's interpreter would multiply the bits of bfloat16; in float32 the products are exact
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tokens_kernel(
    patch_map,
    weights,
    sums,
    num_rows,
    stretch,
    stride_b,
    stride_y,
    stride_x,
    WINDOWS: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One stretch of patches of one weight, for a block of outputs and a block of windows: to `sums (stretches, B * P, S)`."""
    NUM_S: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    NUM_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    item = tl.program_id(1)
    index, first = _find(item, stretch, WINDOWS)
    weight, top, left, height, width = _select(index, weights, WINDOWS)
    s = tl.program_id(0) % NUM_S * BLOCK_S + tl.arange(0, BLOCK_S)
    r = tl.program_id(0) // NUM_S * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    weight_rows = weight + s[:, None].to(tl.int64) * (height * width * C)
    origins = patch_map + _origins(r, stride_b, stride_y, stride_x, STEP, COUNT)[None, :]

    first_patch = (item - first) * stretch
    patches = tl.minimum(stretch, height * width - first_patch)
    total = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for t in range(patches * NUM_C):
        patch, channels = first_patch + t // NUM_C, t % NUM_C * BLOCK_C + c
        place = (top + patch // width).to(tl.int64) * stride_y + (left + patch % width).to(tl.int64) * stride_x
        w = tl.load(weight_rows + patch * C + channels[None, :], mask=(s[:, None] < S) & (channels[None, :] < C), other=0.0)
        x = tl.load(origins + place + channels[:, None], mask=(r[None, :] < num_rows) & (channels[:, None] < C), other=0.0)
        total = _dot(w, x, total, PRECISION)
    out = sums + (item.to(tl.int64) * num_rows + r[None, :]) * S + s[:, None]
    tl.store(out, total, mask=(s[:, None] < S) & (r[None, :] < num_rows))


@triton.jit
def add_splits_kernel(
    sums, tokens, size, stretch, WINDOWS: tl.constexpr, POSITIONS: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the stretches of one weight, in order: `sums (stretches, B * P, S)`, `size` numbers each, to `tokens (B, K, P, S)`."""
    index = tl.program_id(1)
    first, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i in tl.static_range(len(WINDOWS)):
        items = tl.cdiv(WINDOWS[i][2] * WINDOWS[i][3], stretch)
        first += tl.where(i < index, items, 0)
        last += tl.where(i <= index, items, 0)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    total = tl.zeros((BLOCK,), tl.float32)
    part = sums + first.to(tl.int64) * size + offset
    for _ in range(last - first):
        total += tl.load(part, mask=inside, other=0.0)
        part += size
    row, s = offset // S, offset % S
    image, position = row // POSITIONS, row % POSITIONS
    out = tokens + ((image * len(WINDOWS) + index) * POSITIONS + position) * S + s
    tl.store(out, total.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def input_grad_kernel(
    grad,
    weights,
    map_grad,
    batch,
    grid_width,
    WINDOWS: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One patch, a block of its channels, a block of images: gathers from all windows that see the patch."""
    K: tl.constexpr = len(WINDOWS)
    P: tl.constexpr = COUNT[0] * COUNT[1]
    NUM_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    patch = tl.program_id(1)
    y, x = patch // grid_width, patch % grid_width
    c = tl.program_id(0) % NUM_C * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(0) // NUM_C * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    for window in range(K * P):
        weight, top, left, height, width = _select(window // P, weights, WINDOWS)
        i = y - top - window % P // COUNT[1] * STEP[0]
        j = x - left - window % P % COUNT[1] * STEP[1]
        if (i >= 0) & (i < height) & (j >= 0) & (j < width):
            at_patch = weight + (i * width + j) * C + c[None, :]
            at_token = grad + (b[None, :].to(tl.int64) * (K * P) + window) * S
            for start in range(0, S, BLOCK_S):
                s = start + tl.arange(0, BLOCK_S)
                w_offset = s[:, None].to(tl.int64) * (height * width * C)
                w = tl.load(at_patch + w_offset, mask=(s[:, None] < S) & (c[None, :] < C), other=0.0)
                g = tl.load(at_token + s[:, None], mask=(s[:, None] < S) & (b[None, :] < batch), other=0.0)
                total = _dot(tl.trans(w), g, total, PRECISION)
    out = map_grad + (b[None, :].to(tl.int64) * tl.num_programs(1) + patch) * C + c[:, None]
    tl.store(out, total.to(map_grad.dtype.element_ty), mask=(c[:, None] < C) & (b[None, :] < batch))


@triton.jit
def weight_grad_kernel(
    grad,
    patch_map,
    weight_grads,
    num_rows,
    stride_b,
    stride_y,
    stride_x,
    WINDOWS: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One patch of one weight, a block of its outputs and of its channels: sums over all windows of all images."""
    K: tl.constexpr = len(WINDOWS)
    P: tl.constexpr = COUNT[0] * COUNT[1]
    NUM_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    item = tl.program_id(1)
    index, first = _find(item, 1, WINDOWS)
    weight_grad, top, left, height, width = _select(index, weight_grads, WINDOWS)
    patch = item - first
    s = tl.program_id(0) // NUM_C * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(0) % NUM_C * BLOCK_C + tl.arange(0, BLOCK_C)
    place = (top + patch // width).to(tl.int64) * stride_y + (left + patch % width).to(tl.int64) * stride_x
    at_patch = patch_map + place + c[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        token = (r // P * K + index).to(tl.int64) * P + r % P
        g = tl.load(grad + token[None, :] * S + s[:, None], mask=(s[:, None] < S) & (r[None, :] < num_rows), other=0.0)
        places = _origins(r, stride_b, stride_y, stride_x, STEP, COUNT)
        x = tl.load(at_patch + places[:, None], mask=(r[:, None] < num_rows) & (c[None, :] < C), other=0.0)
        total = _dot(g, x, total, PRECISION)
    out = weight_grad + s[:, None].to(tl.int64) * (height * width * C) + patch * C + c[None, :]
    tl.store(out, total.to(weight_grad.dtype.element_ty), mask=(s[:, None] < S) & (c[None, :] < C))


def window_linear(
    patch_map: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size
) -> torch.Tensor:
    """`(B, H, W, C)` and weights `(S, h * w * C)` to tokens `(B, K * P, S)`."""
    patch_map, weights = _unit_stride(patch_map), [weight.contiguous() for weight in weights]
    positions, (hidden, channels) = count[0] * count[1], (weights[0].shape[0], patch_map.shape[3])
    num_rows, areas = patch_map.shape[0] * positions, [window.height * window.width for window in windows]
    tokens = patch_map.new_empty(patch_map.shape[0], len(weights) * positions, hidden)
    if not tokens.numel():
        return tokens
    blocks = tokens_blocks(num_rows, patch_map.dtype)
    tiles = triton.cdiv(hidden, blocks["BLOCK_S"]) * triton.cdiv(num_rows, blocks["BLOCK_R"])
    stretch = max(1, sum(areas) * tiles // (PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(patch_map)))
    stretches = sum(triton.cdiv(area, stretch) for area in areas)
    sums = torch.empty(stretches, num_rows, hidden, dtype=torch.float32, device=patch_map.device)
    shape = {"WINDOWS": _constants(windows), "S": hidden}
    with on_device_of(patch_map):
        tokens_kernel[(tiles, stretches)](
            patch_map, tuple(weights), sums, num_rows, stretch, *patch_map.stride()[:3],
            STEP=step, COUNT=count, C=channels, PRECISION=_precision(patch_map), **shape, **blocks,
        )  # fmt: skip
        add_splits_kernel[(triton.cdiv(num_rows * hidden, 256), len(weights))](
            sums, tokens, num_rows * hidden, stretch, POSITIONS=positions, BLOCK=256, **shape
        )
    return tokens


def input_grad(
    grad: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size, grid: Size
) -> torch.Tensor:
    """The tokens' gradient `(B, K * P, S)` to the patch map's `(B, H, W, C)`."""
    grad, weights = grad.contiguous(), [weight.contiguous() for weight in weights]
    batch, channels = grad.shape[0], weights[0].shape[1] // (windows[0].height * windows[0].width)
    map_grad = grad.new_empty(batch, *grid, channels)
    if not map_grad.numel():
        return map_grad
    blocks = input_grad_blocks(batch, grad.dtype)
    tiles = triton.cdiv(channels, blocks["BLOCK_C"]) * triton.cdiv(batch, blocks["BLOCK_B"])
    with on_device_of(grad):
        input_grad_kernel[(tiles, grid[0] * grid[1])](
            grad, tuple(weights), map_grad, batch, grid[1], WINDOWS=_constants(windows), STEP=step, COUNT=count,
            C=channels, S=grad.shape[2], PRECISION=_precision(grad), **blocks,
        )  # fmt: skip
    return map_grad


def weight_grad(
    grad: torch.Tensor, patch_map: torch.Tensor, windows: Sequence[Window], step: Size, count: Size
) -> list[torch.Tensor]:
    """The tokens' gradient `(B, K * P, S)` and the patch map to each weight's gradient `(S, h * w * C)`."""
    grad, patch_map = grad.contiguous(), _unit_stride(patch_map)
    hidden, channels, areas = grad.shape[2], patch_map.shape[3], [window.height * window.width for window in windows]
    weight_grads = [grad.new_empty(hidden, area * channels) for area in areas]
    num_rows = grad.shape[0] * count[0] * count[1]
    blocks = weight_grad_blocks(num_rows, grad.dtype)
    tiles = triton.cdiv(hidden, blocks["BLOCK_S"]) * triton.cdiv(channels, blocks["BLOCK_C"])
    with on_device_of(grad):
        weight_grad_kernel[(tiles, sum(areas))](
            grad, patch_map, tuple(weight_grads), num_rows, *patch_map.stride()[:3], WINDOWS=_constants(windows),
            STEP=step, COUNT=count, C=channels, S=hidden, PRECISION=_precision(grad), **blocks,
        )  # fmt: skip
    return weight_grads


def tokens_blocks(num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Few windows: bound by reading the weights, so deep and narrow. Many: bound by the products, so square."""
    wide = dtype.itemsize == 4  # half the channels a block, to keep the shared memory; more warps, to keep the registers
    if num_rows <= 64:
        rows, warps = _block(num_rows, 32 if wide else 64), 8 if wide or num_rows > 32 else 4
        return {"BLOCK_R": rows, "BLOCK_S": 64, "BLOCK_C": 64 if wide else 128, "num_warps": warps, "num_stages": 4}
    return {"BLOCK_R": 128, "BLOCK_S": 128, "BLOCK_C": 32 if wide else 64, "num_warps": 8, "num_stages": 3}


def input_grad_blocks(batch: int, dtype: torch.dtype) -> dict[str, int]:
    """As `tokens_blocks`, with images in the place of windows."""
    outputs = 16 if dtype.itemsize == 4 else 64
    return {"BLOCK_B": _block(batch, 128), "BLOCK_S": outputs, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}


def weight_grad_blocks(num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """The sum is over the windows; few of them leave the writing of the gradient as the limit."""
    rows = _block(num_rows, 16 if dtype.itemsize == 4 else 64)
    return {"BLOCK_R": rows, "BLOCK_S": 128, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}


def _block(size: int, most: int) -> int:
    return max(16, min(most, int(triton.next_power_of_2(size))))


def _constants(windows: Sequence[Window]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(window) for window in windows)


def _unit_stride(patch_map: torch.Tensor) -> torch.Tensor:
    return patch_map if patch_map.stride(3) == 1 else patch_map.contiguous()


def _precision(tensor: torch.Tensor) -> str:
    """As torch's own float32 products: exact, unless the user allows TF32."""
    if not tensor.is_cuda:
        return "interpreted"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _multiprocessors(tensor: torch.Tensor) -> int:
    if not tensor.is_cuda:
        return 1
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)
