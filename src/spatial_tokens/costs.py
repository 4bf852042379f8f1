"""What a projector costs, counted from its config: nothing is allocated."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from spatial_tokens.grid import as_size

if TYPE_CHECKING:
    from spatial_tokens.config import SPProjectorConfig


class PartCost(NamedTuple):
    """One part's size and work: parameters, their bytes, and the multiply-adds of one image's forward pass."""

    part: str
    parameters: int
    bytes: int
    multiply_adds: int


def part_costs(config: SPProjectorConfig, bytes_per_parameter: int) -> tuple[PartCost, ...]:
    """The parts in the order in which patches pass them.

    Matrix products are counted; the additions of pooling, normalisations, softmax and GELU are not.
    """
    c, s, d = config.vision_hidden_size, config.spatial_hidden_size, config.text_hidden_size
    k, n = config.num_spatial_tokens, config.num_patches
    kernels = sum(prod(as_size(size, "kernel size")) for size in config.kernel_sizes) * c * s

    counts = {"extractor": (kernels, kernels)}
    spatial_features = s
    if config.detail_kernel_size is not None:
        p = prod(config.detail_grid_size)
        detail_kernel = prod(as_size(config.detail_kernel_size, "detail_kernel_size")) * c * s
        attention = k * s * s + 2 * p * s * s + 2 * k * p * s
        counts["integrator detail map"] = (detail_kernel, p * detail_kernel)
        counts["integrator attention"] = (3 * (s * s + s) + 3 * 2 * s, attention)
        spatial_features = 2 * s

    bias = d if config.spatial_head_bias else 0
    spatial_head = spatial_features * d + (d * d if config.spatial_head == "mlp" else 0)
    spatial_biases = 2 * d if config.spatial_head == "mlp" else bias
    counts["spatial head"] = (spatial_head + spatial_biases, k * spatial_head)
    counts["patch head"] = (c * d + d * d + 2 * d, n * (c * d + d * d))
    return tuple(PartCost(name, size, size * bytes_per_parameter, work) for name, (size, work) in counts.items())
