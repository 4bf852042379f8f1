"""Files that are complete or not there: atomic writes, and weight files read without running their code."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.storage.contents import described
from spatial_tokens.storage.int8 import flattened, require_plain, restored
from spatial_tokens.storage.staging import staging_folder, sync
from spatial_tokens.storage.text import read_text

Tensors = dict[str, torch.Tensor]

# A folder's weights are the first of these that it holds: our own and Hugging Face's names, then the released projectors'.
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raises errors of the file system as SpatialTokensErrors that say what could not be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, SpatialTokensError):
            raise
        raise SpatialTokensError(f"cannot write {target}: {reason(error)}") from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file, renamed to `path` when the block ends well and removed when it does not.

    The file is on the disk before it is renamed. It has the permissions of any new file, whatever writes it.

    Raises:
        SpatialTokensError: If the file cannot be written; what was at `path` is still there.
    """
    target = as_path(path)
    with writing(target), staging_folder(target) as folder:
        temporary = folder / f"new{target.suffix}"
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Makes a directory and those above it, if they are not there.

    Raises:
        SpatialTokensError: If it cannot be made.
    """
    folder = as_path(path)
    try:
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            sync(each.parent)
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot make the directory {path}: {reason(error)}") from error
    return folder


def check_writable(path: str | os.PathLike[str]) -> None:
    """Whether `atomic_write` could write there, without touching what is there.

    Raises:
        SpatialTokensError: If it could not.
    """
    target = as_path(path)
    if os.path.isdir(target):
        raise SpatialTokensError(f"cannot write {target}: it is a directory")
    with writing(target), staging_folder(target):
        pass


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a weight file, atomically: `.bin` or `.pt` by `torch.save`, anything else as safetensors.

    Raises:
        SpatialTokensError: If it cannot be written.
    """
    require_values(tensors, f"cannot write {path}")
    pickled = as_path(path).suffix in (".bin", ".pt")
    require_plain(tensors, f"cannot write {path}", int8=not pickled)
    plain, of_int8 = flattened(tensors)
    whole = {name: tensor.detach().contiguous() for name, tensor in plain.items()}
    with atomic_write(path) as temporary:
        try:
            if pickled:
                torch.save(whole, temporary)
            else:
                save_file(whole, temporary, metadata={"format": "pt", **metadata, **of_int8})
        except (SafetensorError, RuntimeError) as error:
            raise SpatialTokensError(f"cannot write {path}: {reason(error)}") from error


def read_tensors(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
    """The tensors of a weight file, of an index file's shards, or of the weights in a folder.

    Args:
        path: A `.safetensors`, `.bin` or `.pt` file, an `.index.json`, or a folder that holds one of `FOLDER_NAMES`.
        wanted: Which names to read; the others are skipped, and shards that hold none are not opened.

    Raises:
        SpatialTokensError: If a file is missing, truncated, of another kind, or would need code to be run.
    """
    path = as_path(path)
    if os.path.isdir(path):
        found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
        if not found:
            raise SpatialTokensError(f"no weights in {path}; looked for {', '.join(FOLDER_NAMES)}")
        path = found[0]
    if not os.path.isfile(path):  # which, unlike Path.is_file(), takes any name
        raise SpatialTokensError(f"{path} does not exist; give a weight file, an index file or a folder of them")
    return _read_index(path, wanted) if path.name.endswith(".index.json") else _read_file(path, wanted)


def read_safetensors(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its metadata, both of the same save.

    Raises:
        SpatialTokensError: If it is missing, or not whole.
    """
    path = as_path(path)
    with _opened(path) as file:
        # A tensor of `safe_open` is a view of the mapped file, and changes with it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys() if wanted(name)}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    return restored(tensors, metadata, str(path)), metadata


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, from its header: no values are read.

    Raises:
        SpatialTokensError: If it is missing, or not whole.
    """
    with _opened(as_path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; its errors, and those of reading it, as SpatialTokensErrors."""
    try:
        with path.open("rb") as held, safe_open(_same_file(path, held.fileno()), framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise SpatialTokensError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SpatialTokensError(f"{path} is not a complete safetensors file: {_fault(path, reason(error))}") from error


def _same_file(path: Path, descriptor: int) -> Path:
    """Another name of an open file: `safe_open` opens twice, and a save may have replaced what is at `path` in between."""
    link = Path(f"/proc/self/fd/{descriptor}")
    return link if link.exists() else path


def require_values(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises SpatialTokensError, which begins with `what`, if a tensor has no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise SpatialTokensError(f"{what}: {name} is on the meta device, without values; load or initialize it before saving")


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    return read_safetensors(path, wanted)[0] if path.suffix == ".safetensors" else _read_pickle(path, wanted)


def _read_pickle(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise SpatialTokensError(
            f"{path} is not a complete PyTorch file of tensors alone (no code is run to read it): {_fault(path, _of_pickle(error))}"
        ) from error
    if not is_state_dict(values):
        raise SpatialTokensError(f"{path} holds a {type(values).__name__} that is not a state dict of tensors")
    tensors = {name: tensor for name, tensor in values.items() if wanted(name)}
    require_values(tensors, f"cannot use {path}")
    return tensors


def _fault(path: Path, otherwise: str) -> str:
    kind = described(path)
    return otherwise if kind is None else f"it is {kind}"


def _of_pickle(error: Exception) -> str:
    """What is wrong with a pickle, without PyTorch's advice to run its code."""
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds {named[1]}, which needs code to be run; get a safetensors file, or one of the state dict alone"
    if "TorchScript" in text:
        return "it is a TorchScript program; get the state dict that it was made of"
    if isinstance(error, (OSError, RuntimeError)) and "weights_only" not in text:
        return reason(error)
    return "it is damaged, or was not written by torch.save"


def is_state_dict(values: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """Whether all names are strings and all values tensors."""
    return isinstance(values, Mapping) and all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in values.items())


def _read_index(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    try:
        shard_of = json.loads(read_text(path))["weight_map"].items()
        shards = {Path(shard) for name, shard in shard_of if wanted(name)}
    except SpatialTokensError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SpatialTokensError(f"{path} is not an index of shards: it needs a 'weight_map' of names to files") from error
    tensors: Tensors = {}
    for shard in sorted(shards):
        if shard.name != str(shard) or not os.path.isfile(path.parent / shard):
            raise SpatialTokensError(f"{path} names the shard {str(shard)!r}, which is not a file beside it")
        tensors |= _read_file(path.parent / shard, wanted)
    lost = [name for name, _ in shard_of if wanted(name) and name not in tensors]
    if lost:
        raise SpatialTokensError(f"{path} lists tensors that its shards do not hold: {', '.join(lost[:20])}")
    return tensors
