"""Dense kernels in 8 bits, by torchao."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from spatial_tokens.compression.target import dense_layers
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.modules import SPProjector


def quantize_int8(projector: SPProjector) -> SPProjector:
    """A copy of a dense projector whose kernels are int8 weights with a scale for each row (torchao's `Int8WeightOnlyConfig`).

    It takes a quarter of float32's bytes, or half of bfloat16's; products are of the features' dtype. Heads and attention are
    copied as they are. `save_pretrained` and `from_pretrained` hold it, without pickling. On a CPU it is slower than the dense one,
    unless it is compiled and in bfloat16.

    Raises:
        MissingExtraError: If torchao is not installed.
        SpatialTokensError: If the projector is not dense, or its kernels are wrapped, quantized already, or float64.

    Examples:
        `small = quantize_int8(SPProjector.from_pretrained("projector")); small.save_pretrained("int8")`
    """
    layers = dense_layers(projector)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingExtraError("torchao 0.18 or later", "torchao") from error
    quantized: dict[int, Any] = {}
    for layer in layers:
        if layer.weight.dtype == torch.float64:
            raise SpatialTokensError("torchao quantizes no float64; cast the projector first: .to(torch.float32)")
        small = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        small.weight = layer.weight  # which quantize_ replaces, and does not change
        quantize_(small, Int8WeightOnlyConfig())
        quantized[id(layer)] = small.train(layer.training)
    return copy.deepcopy(projector, quantized)
