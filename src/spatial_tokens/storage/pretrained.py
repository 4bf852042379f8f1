"""The library's own format: a directory with `config.json` and `model.safetensors`, strict both ways."""

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.files import Tensors, require_values
from spatial_tokens.storage.folder_format import FolderFormat
from spatial_tokens.storage.int8 import cast, is_quantized
from spatial_tokens.storage.sharded import shape_of
from spatial_tokens.versions import ENTRY, WRITER

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_FORMAT = FolderFormat(CONFIG_NAME, WEIGHTS_NAME, "config")

# What quantizers add to a layer's weight, and what it is called then.
_QUANTIZED = {
    re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"): "4-bit weights of bitsandbytes",
    re.compile(r"\.(SCB|weight_format)$"): "8-bit weights of bitsandbytes",
    re.compile(r"\.(qweight|qzeros|g_idx)$"): "packed weights of GPTQ or AWQ",
    re.compile(r"\.(weight_scale|weight_packed)$"): "quantized weights of compressed-tensors",
}


def save(directory: str | PathLike[str], values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a projector's description and tensors; if the process is killed, `load` gives the old state or the new one, whole.

    Raises:
        SpatialTokensError: If they cannot be written; a file that was not replaced is as it was.
    """
    _FORMAT.save(directory, json.dumps({ENTRY: WRITER, **values}, indent=2) + "\n", tensors)


def load(directory: str | PathLike[str]) -> tuple[dict[str, Any], Tensors]:
    """Reads both files; if they are of different saves, the weights and the description in them, with a warning.

    Raises:
        SpatialTokensError: If one is missing or damaged.
    """
    return _FORMAT.load(directory, _description)


def _description(text: str) -> dict[str, Any]:
    """The fields of a config, checked, or the description of parts that no config describes."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None  # of which the config's own reader says what is wrong
    if isinstance(values, dict) and "parts" in values:
        return {"parts": values["parts"]}
    return SPProjectorConfig.from_json(text).to_dict()


def assign(module: nn.Module, tensors: Tensors, source: str, dtype: torch.dtype | None = None) -> None:
    """Makes the tensors a module's parameters, cast to a dtype or as they are.

    Raises:
        SpatialTokensError: If names or shapes are not exactly the module's, a tensor is not floating or has no values, or they are
            of several dtypes and none is given.
    """
    require_values(tensors, f"cannot use {source}")
    require_exactly({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, source)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    named = ", ".join(sorted(map(str, dtypes)))
    if not all(given.is_floating_point for given in dtypes):
        raise SpatialTokensError(f"{source} has tensors of {named}; all must be floating point")
    if dtype is None and len(dtypes) > 1:
        raise SpatialTokensError(f"{source} has tensors of {named}; give the dtype that all should have")
    module.load_state_dict({name: cast(tensor, dtype) for name, tensor in tensors.items()}, assign=True)
    for parameter in module.parameters():
        if is_quantized(parameter):
            parameter.requires_grad_(False)


def require_exactly(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises SpatialTokensError, listing them, if a tensor is missing, unexpected or of the wrong shape."""
    require_unquantized(tensors, source)
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrongly shaped": [
            f"{name} {shape_of(tensors[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and shape_of(tensors[name]) != tuple(shape)
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if found:
        raise SpatialTokensError(f"the tensors of {source} do not fit: {'; '.join(found)}")


def require_unquantized(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises SpatialTokensError if tensors are packed by a quantizer."""
    for name, tensor in tensors.items():
        kinds = [kind for pattern, kind in _QUANTIZED.items() if pattern.search(name)]
        if not kinds and tensor.dtype == torch.uint8 and tensor.shape[1:] == (1,):
            kinds = ["4-bit weights of bitsandbytes"]
        if kinds:
            raise SpatialTokensError(
                f"{source} holds {kinds[0]} ({name}); use the checkpoint before quantization, or dequantize it and save it again"
            )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + rest
