"""The library's own format: a directory with `config.json` and `model.safetensors`, strict both ways."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.files import (
    Tensors,
    atomic_write,
    make_directory,
    read_metadata,
    read_tensors,
    read_text,
    write_tensors,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save(directory: str | PathLike[str], config: SPProjectorConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files; neither takes its place before both are whole.

    The weights name the config that they belong to, so that `load` can tell if a process died between the two renames.

    Raises:
        SpatialTokensError: If they cannot be written; a file that was not replaced is as it was.
    """
    folder = make_directory(directory)
    with atomic_write(folder / CONFIG_NAME) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")
        write_tensors(folder / WEIGHTS_NAME, tensors, {"config": config.to_json()})


def gathered(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as they are; where some are sharded over processes (DTensors), all of them whole, to be written by the first.

    Then every process must call this: the first gets them on the CPU, one gathered after another, the others an empty dict.
    """
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        return dict(tensors)
    first, whole = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if first:
            whole[name] = found.cpu()
    return whole


def load(directory: str | PathLike[str]) -> tuple[SPProjectorConfig, Tensors]:
    """Reads both files.

    Raises:
        SpatialTokensError: If one is missing or damaged, or they are of two different saves.
    """
    folder = Path(directory)
    config = SPProjectorConfig.from_json(read_text(folder / CONFIG_NAME))
    tensors = read_tensors(folder / WEIGHTS_NAME)
    written_with = read_metadata(folder / WEIGHTS_NAME).get("config")
    if written_with is not None and SPProjectorConfig.from_json(written_with) != config:
        raise SpatialTokensError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} in {folder} are of different saves; the config of the weights is {written_with}"
        )
    return config, tensors


def assign(module: nn.Module, tensors: Tensors, source: str, dtype: torch.dtype | None = None) -> None:
    """Makes the tensors a module's parameters, cast to a dtype or as they are.

    Raises:
        SpatialTokensError: If names or shapes are not exactly the module's, a tensor is not floating, or they are of several
            dtypes and none is given.
    """
    require_exactly({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, source)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    named = ", ".join(sorted(map(str, dtypes)))
    if not all(given.is_floating_point for given in dtypes):
        raise SpatialTokensError(f"{source} has tensors of {named}; all must be floating point")
    if dtype is None and len(dtypes) > 1:
        raise SpatialTokensError(f"{source} has tensors of {named}; give the dtype that all should have")
    module.load_state_dict({name: tensor.to(dtype=dtype) for name, tensor in tensors.items()}, assign=True)


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
