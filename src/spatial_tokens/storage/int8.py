"""Weights of 8 bits in weight files: torchao's weight-only int8, as two plain tensors each, without pickling."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spatial_tokens.errors import MissingExtraError, SpatialTokensError

METADATA_ENTRY = "int8"  # names of quantized weights to the dtype that they stand for, as JSON
SCALE = ".scale"

_OF_ACTIVATIONS = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds others in place of its values, as those of torchao do; a sharded one (DTensor) does not count."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")


def quantized_parameter(module: nn.Module) -> str | None:
    """The name of a module's first parameter that is packed or holds integers, so that it cannot be trained, if it has one."""
    from torch.distributed.tensor import DTensor

    plain = (torch.Tensor, nn.Parameter, DTensor)
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) not in plain:
            return name
    return None


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """The values that a quantized tensor stands for; a plain one as it is."""
    values: Any = tensor
    return values.dequantize() if is_quantized(tensor) else tensor


def is_int8(tensor: torch.Tensor) -> bool:
    """Whether it is torchao's weight-only int8, with a scale for each row."""
    if type(tensor).__name__ != "Int8Tensor" or not type(tensor).__module__.startswith("torchao."):
        return False
    inner: Any = tensor
    whole_rows = tensor.ndim == 2 and list(inner.block_size) == [1, tensor.shape[1]]
    symmetric = inner.zero_point is None or not bool(inner.zero_point.any())
    return whole_rows and symmetric and all(getattr(inner, name, None) is None for name in _OF_ACTIVATIONS)


def require_plain(tensors: Mapping[str, torch.Tensor], what: str, *, int8: bool = False) -> None:
    """Raises SpatialTokensError, which begins with `what`, if a tensor is quantized: unless it is int8, and that is taken."""
    for name, tensor in tensors.items():
        if is_quantized(tensor) and not (int8 and is_int8(tensor)):
            taken = "only torchao's Int8WeightOnlyConfig can be held" if int8 else "plain weights are needed"
            raise SpatialTokensError(
                f"{what}: {name} is quantized (a {type(tensor).__name__}), {taken}; use the projector before quantization"
            )


def flattened(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors as a file holds them, and what its metadata must say."""
    plain: dict[str, torch.Tensor] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in tensors.items():
        if is_int8(tensor):
            inner: Any = tensor.detach()
            plain[name], plain[name + SCALE] = inner.qdata, inner.scale
            dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        else:
            plain[name] = tensor
    return plain, {METADATA_ENTRY: json.dumps(dtypes)} if dtypes else {}


def restored(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str], source: str) -> dict[str, torch.Tensor]:
    """The tensors that `flattened` was given.

    Raises:
        MissingExtraError: If there are quantized ones, and torchao is not installed.
        SpatialTokensError: If the file does not hold what its metadata says.
    """
    if METADATA_ENTRY not in metadata:
        return tensors
    try:
        dtypes = {name: getattr(torch, dtype) for name, dtype in json.loads(metadata[METADATA_ENTRY]).items()}
        for name, dtype in dtypes.items():
            if name in tensors:
                tensors[name] = _int8(tensors[name], tensors.pop(name + SCALE), dtype)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SpatialTokensError):
            raise
        raise SpatialTokensError(f"{source} is damaged: its int8 weights are not those that its metadata describes") from error
    return tensors


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in another dtype; an int8 one that stands for values of that dtype."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    if is_int8(tensor):
        inner: Any = tensor
        return _int8(inner.qdata, inner.scale, dtype)
    return tensor.to(dtype=dtype)


def _int8(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    try:
        from torchao.quantization import Int8Tensor
    except ImportError as error:
        raise MissingExtraError("torchao 0.18 or later (for int8 weights)", "torchao") from error
    if values.dtype != torch.int8 or scale.shape != (len(values), 1) or not dtype.is_floating_point:
        raise ValueError
    tensor: torch.Tensor = Int8Tensor(values, scale, [1, values.shape[1]], dtype)
    return tensor
