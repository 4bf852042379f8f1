"""The paper's equations on torch's convolutions, step by step: shares no code with `src`, which must equal it.

`parameters` is a plain dict under a module's own names. A linear kernel's input is in row, column, channel order.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def part(parameters, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}


def as_map(patches, grid_size):
    batch, _, channels = patches.shape
    return patches.reshape(batch, *pair(grid_size), channels).permute(0, 3, 1, 2)  # (B, C, H, W)


def convolve(feature_map, weight, kernel_size, stride=1):
    kernel = weight.reshape(len(weight), *pair(kernel_size), feature_map.shape[1]).permute(0, 3, 1, 2)  # (S, C, h, w)
    return F.conv2d(feature_map, kernel, stride=pair(stride))


def scale(feature_map, kernel_size, variant):
    if variant == "pooling":
        return F.adaptive_avg_pool2d(feature_map, pair(kernel_size))
    (height, width), (h, w) = feature_map.shape[2:], pair(kernel_size)
    top, left = (height - h) // 2, (width - w) // 2
    return feature_map[:, :, top : top + h, left : left + w]


def extractor(parameters, patches, *, grid_size, kernel_sizes, variant="cropping"):
    feature_map = as_map(patches, grid_size)
    tokens = [
        convolve(scale(feature_map, size, variant), parameters[f"kernels.{i}.weight"], size).flatten(1)
        for i, size in enumerate(kernel_sizes)
    ]
    return torch.stack(tokens, dim=1)  # (B, K, S)


def sliding_window(parameters, patches, *, grid_size, kernel_size, stride=None):
    feature_map, (height, width), (h, w) = as_map(patches, grid_size), pair(grid_size), pair(kernel_size)
    down, right = pair(stride or kernel_size)
    corners = [(top, left) for top in range(0, height - h + 1, down) for left in range(0, width - w + 1, right)]
    tokens = [
        convolve(feature_map[:, :, top : top + h, left : left + w], parameters[f"kernels.{i}.weight"], kernel_size).flatten(1)
        for i, (top, left) in enumerate(corners)
    ]
    return torch.stack(tokens, dim=1)


def patch_weight(patch, length, own, start, size, frequency):
    """A cosine's integral over the part of a patch that is in the window, by Gauss and Legendre's rule.

    The window has `size` patches of the kernel's own grid of `own`; the patch is one of `length`. The cosine has the height at
    which its integrals over the window's own patches are those of the orthonormal DCT-II.
    """
    low, high = max(patch * own / length, start), min((patch + 1) * own / length, start + size)
    if low >= high:
        return 0.0
    half_turn = math.pi * frequency / (2 * size)
    height = math.sqrt((2 if frequency else 1) / size) * (half_turn / math.sin(half_turn) if frequency else 1)
    points, shares = np.polynomial.legendre.leggauss(30)
    at = low + (high - low) * (points + 1) / 2
    return float((np.cos(math.pi * frequency * (at - start) / size) * shares).sum() * (high - low) / 2 * height)


def overlap(patch, length, own, low, high):
    """How much of the bin from `low` to `high` a patch covers."""
    return max(0.0, min((patch + 1) * own / length, high) - max(patch * own / length, low)) / (high - low)


def dct(size, frequencies):
    """`(F, size)`: the lowest rows of the orthonormal DCT-II."""
    return torch.tensor(
        [
            [math.sqrt((2 if f else 1) / size) * math.cos(math.pi * f * (p + 0.5) / size) for p in range(size)]
            for f in range(frequencies)
        ],
        dtype=torch.float64,
    )


def factorized_maps(parameters, i, grid, *, grid_size, window, frequencies, bins=None):
    """`(F * F, H, W)`: with what weight each map reads each patch of a grid."""
    top, left, *sizes = window
    learned = parameters.get(f"maps.{i}")
    if learned is None and bins is None:
        rows, columns = (
            torch.tensor(
                [[patch_weight(p, length, own, start, size, f) for p in range(length)] for f in range(frequencies)],
                dtype=torch.float64,
            )
            for length, own, start, size in zip(grid, grid_size, (top, left), sizes, strict=True)
        )
        return torch.einsum("fh,gw->fghw", rows, columns).flatten(0, 1)
    counts = bins or sizes
    if learned is None:
        learned = torch.einsum("fh,gw->fghw", *(dct(count, frequencies) for count in counts)).flatten(0, 1)
    rows, columns = (
        torch.tensor(
            [
                [
                    overlap(p, length, own, start + b * size // count, start + math.ceil((b + 1) * size / count))
                    for p in range(length)
                ]
                for b in range(count)
            ],
            dtype=torch.float64,
        )
        for length, own, start, size, count in zip(grid, grid_size, (top, left), sizes, counts, strict=True)
    )
    return torch.einsum("mij,ih,jw->mhw", learned, rows, columns)


def factorized(parameters, images, grids, *, grid_size, windows, frequencies, bins=None):
    """Images `(N, C)` each to `(B, K, S)`: token k, channel s: sum over r, f of core_k[s, f, r] * D[r, c] * phi_f(p) * x[p, c]."""
    tokens = []
    for image, grid in zip(images, grids, strict=True):
        for i, (window, number) in enumerate(zip(windows, frequencies, strict=True)):
            maps = factorized_maps(
                parameters, i, grid, grid_size=grid_size, window=window, frequencies=number, bins=bins[i] if bins else None
            )
            read = torch.einsum("mp,pc,rc->mr", maps.flatten(1), image, parameters["channel_projection.weight"])
            core = parameters[f"cores.{i if f'cores.{i}.weight' in parameters else 0}.weight"]
            tokens.append(core.reshape(len(core), *read.shape).flatten(1) @ read.flatten())
    return torch.stack(tokens).reshape(len(grids), len(windows), -1)


def softmax(scores):
    exponentials = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm(parameters, x):
    centered = x - x.mean(-1, keepdim=True)
    normal = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal * parameters["weight"] + parameters.get("bias", 0)


def linear(parameters, x):
    return x @ parameters["weight"].T + parameters.get("bias", 0)


def detail_map(weight, patches, *, grid_size, kernel_size, stride):
    return convolve(as_map(patches, grid_size), weight, kernel_size, stride).flatten(2).transpose(1, 2)  # (B, P, S)


def attend(parameters, tokens, detail):
    def project(name, x):
        return linear(part(parameters, f"{name}_projector.1."), layer_norm(part(parameters, f"{name}_projector.0."), x))

    query, key, value = project("query", tokens), project("key", detail), project("value", detail)
    attention = softmax(query @ key.transpose(1, 2) / math.sqrt(tokens.shape[-1]))
    return torch.cat([tokens, attention @ value], dim=-1), attention


def integrator(parameters, tokens, patches, *, grid_size, kernel_size, stride):
    weight = parameters["detail_kernel.weight"]
    return attend(parameters, tokens, detail_map(weight, patches, grid_size=grid_size, kernel_size=kernel_size, stride=stride))


def head(parameters, x):
    if "fc.weight" in parameters:  # the released models' spatial head
        return linear(part(parameters, "fc."), gelu(x))
    return linear(part(parameters, "fc2."), gelu(linear(part(parameters, "fc1."), x)))


def projector(
    parameters, patches, *, grid_size, kernel_sizes, variant="cropping", detail_kernel_size=None, detail_stride=2, **_others
):
    """Tokens, and the attention where there is an integrator: a tuple of one or two."""
    tokens = extractor(part(parameters, "extractor."), patches, grid_size=grid_size, kernel_sizes=kernel_sizes, variant=variant)
    attention = ()
    if detail_kernel_size is not None:
        tokens, *attention = integrator(
            part(parameters, "integrator."),
            tokens,
            patches,
            grid_size=grid_size,
            kernel_size=detail_kernel_size,
            stride=detail_stride,
        )
    spatial, patch = head(part(parameters, "spatial_head."), tokens), head(part(parameters, "patch_head."), patches)
    return torch.cat([spatial, patch], dim=1), *attention


def multi_head_attention(parameters, x, memory, num_heads):
    def split(weight, sequence):
        return (sequence @ weight.T).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, positions, channels)

    query, key, value = map(split, parameters["in_proj_weight"].chunk(3), (x, memory, memory))
    attention = softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]))
    return linear(part(parameters, "out_proj."), (attention @ value).transpose(1, 2).flatten(2))


def transformer_layer(parameters, x, memory, num_heads):
    """Pre-norm: self-attention, in a decoder attention to the memory, feed-forward."""

    def norm(i):
        return layer_norm(part(parameters, f"norm{i}."), x)

    x = x + multi_head_attention(part(parameters, "self_attn."), norm(1), norm(1), num_heads)
    if memory is not None:
        x = x + multi_head_attention(part(parameters, "multihead_attn."), norm(2), memory, num_heads)
    hidden = linear(part(parameters, "linear1."), norm(2 if memory is None else 3)).relu()
    return x + linear(part(parameters, "linear2."), hidden)


def transformer_stack(parameters, x, memory, num_layers, num_heads):
    for i in range(num_layers):
        x = transformer_layer(part(parameters, f"layers.{i}."), x, memory, num_heads)
    return layer_norm(part(parameters, "norm."), x)


def transformer(parameters, patches, *, grid_size, kernel_sizes, variant="cropping", num_layers=4, num_heads=8):
    feature_map, tokens = as_map(patches, grid_size), []
    for i, size in enumerate(kernel_sizes):
        one = part(parameters, f"transformers.{i}.")
        sequence = scale(feature_map, size, variant).flatten(2).transpose(1, 2)  # (B, h * w, C)
        memory = transformer_stack(part(one, "encoder."), sequence, None, num_layers, num_heads)
        query = parameters[f"queries.{i}"].expand(len(patches), -1, -1)
        tokens.append(transformer_stack(part(one, "decoder."), query, memory, num_layers, num_heads))
    return torch.cat(tokens, dim=1)
