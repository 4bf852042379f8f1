"""What the operators count for in torch's `FlopCounterMode`: import this module before counting.

Apart, because torch's counter imports triton, which `import spatial_tokens` does not.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from spatial_tokens.ops.window_linear import op  # noqa: F401 - it registers the operators


def _flops(batch: int, weights: Iterable[Sequence[int]], count: Sequence[int]) -> int:
    """Two for each multiply-add: every weight meets its windows of every image; each gradient takes as many."""
    return 2 * batch * count[0] * count[1] * sum(prod(shape) for shape in weights)


@register_flop_formula(torch.ops.spatial_tokens.window_linear)
def _(patch_map: Any, weights: Any, windows: Any, step: Any, count: Any, *_: Any, **__: Any) -> int:
    return _flops(patch_map[0], weights, count)


@register_flop_formula(torch.ops.spatial_tokens.window_linear_input_grad)
def _(grad: Any, weights: Any, windows: Any, step: Any, count: Any, *_: Any, **__: Any) -> int:
    return _flops(grad[0], weights, count)


@register_flop_formula(torch.ops.spatial_tokens.window_linear_weight_grad)
def _(grad: Any, patch_map: Any, windows: Any, step: Any, count: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return _flops(grad[0], out_shape, count)
