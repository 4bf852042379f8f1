"""Where and in what dtype parameters are made, and initializing what a module is made of."""

from typing import Any

import torch
from torch import nn

from spatial_tokens.errors import SpatialTokensError, reason, shown

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_factory(device: Any, dtype: Any) -> dict[str, Any]:
    """The two arguments that torch's layers take, once it is sure that parameters can be made of them.

    Raises:
        SpatialTokensError: If there is no such device here, or the dtype is not one that parameters can have.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise SpatialTokensError(f"cannot use the device {shown(device)}: {reason(error)}; give 'cpu', 'cuda' or 'meta'") from error
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATS):
        raise SpatialTokensError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {shown(dtype)}")
    return {"device": device, "dtype": dtype}


def reset(module: nn.Module) -> None:
    """Calls `reset_parameters` of a module, or of its children where it has none."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return
    for child in module.children():
        reset(child)
