"""One matrix product for each row of a kernel, on the features in their memory layout; sums in float32, in the rows' order.

A row of a window is one run of `w * C` numbers, and so is the row of the weight that meets it. So a window needs no copy: its rows
are the batch of a batched product, and splitting the long sum is also what keeps every core reading. (16 bits on a CPU are the
exception: one product, of a copied window.) Where a kernel meets several windows, these overlap in memory; one row of all of them
is gathered at a time, `1 / h` of the unfolded map.
"""

from collections.abc import Sequence

import torch

from spatial_tokens.grid import Size, Window
from spatial_tokens.ops.windows import ONCE, cut

LONGEST_RUN = 32  # patches; longer rows are split, so that a pooled scale, which is one row, is a batch of products too
FEWEST_RUNS = 4  # of one image's window: enough for the cores, long enough to stream


def window_linear(
    patch_map: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size
) -> torch.Tensor:
    """`(B, H, W, C)` and weights `(S, h * w * C)` to tokens `(B, K * P, S)`."""
    batch, positions = patch_map.shape[0], count[0] * count[1]
    tokens = patch_map.new_empty(batch, len(weights), positions, weights[0].shape[0])
    for i, (weight, window) in enumerate(zip(weights, windows, strict=True)):
        if count == ONCE:
            runs = _runs(patch_map, window)
            tokens[:, i, 0] = _sum(_products(runs, _weight_runs(weight, runs.shape[0]).transpose(1, 2)))
        else:
            total = torch.zeros(batch * positions, weight.shape[0], dtype=_sum_dtype(weight), device=weight.device)
            for r, row in enumerate(_weight_runs(weight, window.height)):
                total += torch.mm(_row_of_windows(patch_map, window, step, count, r), row.t())
            tokens[:, i] = total.view(batch, positions, weight.shape[0])
    return tokens.flatten(1, 2)


def input_grad(
    grad: torch.Tensor, weights: Sequence[torch.Tensor], windows: Sequence[Window], step: Size, count: Size, grid: Size
) -> torch.Tensor:
    """The tokens' gradient `(B, K * P, S)` to the patch map's `(B, H, W, C)`: every window adds to its patches."""
    batch, grad = grad.shape[0], torch.unflatten(grad, 1, (len(weights), count[0] * count[1]))
    channels = weights[0].shape[1] // (windows[0].height * windows[0].width)
    total = torch.zeros(batch, *grid, channels, dtype=_sum_dtype(grad), device=grad.device)
    for i, (weight, window) in enumerate(zip(weights, windows, strict=True)):
        if count == ONCE:
            weight_runs = _weight_runs(weight, _num_runs(grad, window))
            runs = _products(grad[:, i, 0].expand(weight_runs.shape[0], -1, -1), weight_runs)  # (runs, B, length)
            part = runs.transpose(0, 1).reshape(batch, window.height, window.width, channels)
            cut(total, window).add_(part)
            continue
        for r, row in enumerate(_weight_runs(weight, window.height)):
            part = torch.mm(grad[:, i].flatten(0, 1), row).view(batch, *count, window.width, channels)
            for y in range(count[0]):
                for x in range(count[1]):
                    place = Window(window.top + r + y * step[0], window.left + x * step[1], 1, window.width)
                    cut(total, place).squeeze(1).add_(part[:, y, x])
    return total.to(grad.dtype)


def weight_grad(
    grad: torch.Tensor, patch_map: torch.Tensor, windows: Sequence[Window], step: Size, count: Size
) -> list[torch.Tensor]:
    """The tokens' gradient `(B, K * P, S)` and the patch map to each weight's gradient `(S, h * w * C)`."""
    grad, grads = torch.unflatten(grad, 1, (len(windows), count[0] * count[1])), []
    for i, window in enumerate(windows):
        tokens = grad[:, i].flatten(0, 1).t()  # (S, B * P)
        weight = grad.new_empty(grad.shape[-1], window.height * window.width * patch_map.shape[-1])
        runs = _runs(patch_map, window) if count == ONCE else None
        for r, row in enumerate(_weight_runs(weight, window.height if runs is None else runs.shape[0])):
            inputs = _row_of_windows(patch_map, window, step, count, r) if runs is None else runs[r]
            torch.mm(tokens, inputs, out=row)
        grads.append(weight)
    return grads


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left[0], right[0])[None] if left.shape[0] == 1 else torch.bmm(left, right)


def _sum(parts: torch.Tensor) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0, dtype=_sum_dtype(parts))


def _num_runs(images: torch.Tensor, window: Window) -> int:
    """Into how many equal runs the sum over a single window is split: times on a CPU at the paper's size (README.md)."""
    if images.dtype.itemsize == 2 and images.device.type == "cpu":
        return 1  # oneDNN's batched product takes 20 times the time of its plain one here
    if images.shape[0] == 1:  # copying one image's window is 1/256 of the reading, and long runs read faster
        return _divisor(window.height * window.width, FEWEST_RUNS)
    return window.height * _divisor(window.width, -(-window.width // LONGEST_RUN))


def _divisor(number: int, least: int) -> int:
    """The smallest divisor that is at least so large, or the number itself."""
    return next((n for n in range(least, number) if number % n == 0), number)


def _weight_runs(weight: torch.Tensor, runs: int) -> torch.Tensor:
    """`(S, h * w * C)` as `(runs, S, length)`. A view."""
    return torch.unflatten(weight, 1, (runs, -1)).transpose(0, 1)


def _runs(patch_map: torch.Tensor, window: Window) -> torch.Tensor:
    """One window of each image as `(runs, B, length)`: a view where the runs are whole rows, or parts of one."""
    runs, rows = _num_runs(patch_map, window), cut(patch_map, window).flatten(2)  # (B, h, w * C)
    if runs % window.height:
        return torch.unflatten(rows.flatten(1), 1, (runs, -1)).transpose(0, 1)
    return torch.unflatten(rows, 2, (runs // window.height, -1)).flatten(1, 2).transpose(0, 1)


def _row_of_windows(patch_map: torch.Tensor, window: Window, step: Size, count: Size, row: int) -> torch.Tensor:
    """Row `row` of each of a kernel's windows: `(B * P, w * C)`."""
    channels = patch_map.shape[-1]
    top, width = window.top + row, window.width + (count[1] - 1) * step[1]
    band = patch_map[:, top : top + (count[0] - 1) * step[0] + 1 : step[0], window.left : window.left + width]
    return band.flatten(2).unfold(2, window.width * channels, step[1] * channels).flatten(0, 2)
