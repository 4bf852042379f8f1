"""The library's own format: a directory with `config.json` and `model.safetensors`, strict both ways."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.files import Tensors, atomic_write, make_directory, read_tensors, read_text, write_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save(directory: str | PathLike[str], config: SPProjectorConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files; neither takes its place before both are whole.

    Raises:
        SpatialTokensError: If they cannot be written; what was there before is still there.
    """
    folder = make_directory(directory)
    with atomic_write(folder / CONFIG_NAME) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")
        write_tensors(folder / WEIGHTS_NAME, tensors, {"library": "spatial-tokens"})


def load(directory: str | PathLike[str]) -> tuple[SPProjectorConfig, Tensors]:
    """Reads both files.

    Raises:
        SpatialTokensError: If one is missing or damaged.
    """
    folder = Path(directory)
    return SPProjectorConfig.from_json(read_text(folder / CONFIG_NAME)), read_tensors(folder / WEIGHTS_NAME)


def assign(module: nn.Module, tensors: Tensors, source: str) -> None:
    """Makes the tensors a module's parameters, without a copy.

    Raises:
        SpatialTokensError: If names or shapes are not exactly the module's, or the dtypes are mixed or not floating.
    """
    require_exactly({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, source)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise SpatialTokensError(f"{source} has tensors of {', '.join(sorted(map(str, dtypes)))}; cast them to one floating dtype")
    module.load_state_dict(tensors, assign=True)


def require_exactly(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises SpatialTokensError, listing them, if a tensor is missing, unexpected or of the wrong shape."""
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrongly shaped": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if found:
        raise SpatialTokensError(f"the tensors of {source} do not fit: {'; '.join(found)}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + rest
