"""Files that are whole or not there: atomic writes, and weight files read without running their code."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spatial_tokens.errors import SpatialTokensError, reason

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
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file beside `path`, renamed to it when the block ends well and removed when it does not.

    The file has the permissions of any new file, whatever writes it.

    Raises:
        SpatialTokensError: If the file cannot be written; what was at `path` is still there.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        if isinstance(error, SpatialTokensError):
            raise
        raise SpatialTokensError(f"cannot write {target}: {reason(error)}") from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink()


@contextmanager
def new_directory(path: str | os.PathLike[str], replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a temporary directory beside `path`, which takes its place when the block ends well, and is removed if not.

    Args:
        path: Where it is to be.
        replaceable: Whether what is there may be replaced.

    Raises:
        SpatialTokensError: If it cannot be written, or something else is there; what was there is still there.
    """
    target = Path(path)
    if target.exists() and not replaceable(target):
        raise SpatialTokensError(
            f"{target} is there already, and is not what would be written; remove it, or choose another folder"
        )
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        with _writing(target):
            temporary.mkdir()
        yield temporary
        with _writing(target):
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpatialTokensError(f"cannot write {target}: {reason(error)}") from error


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Makes a directory and those above it, if they are not there.

    Raises:
        SpatialTokensError: If it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot make the directory {path}: {reason(error)}") from error
    return Path(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Whether `atomic_write` could write there, without touching what is there.

    Raises:
        SpatialTokensError: If it could not.
    """
    target = Path(path)
    if os.path.isdir(target):
        raise SpatialTokensError(f"cannot write {target}: it is a directory")
    probe = target.parent / f".{target.name}.{os.getpid()}.probe"
    try:
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot write {target}: {reason(error)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file.

    Raises:
        SpatialTokensError: If it is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot read {path}: {reason(error)}") from error


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a weight file, atomically: `.bin` or `.pt` by `torch.save`, anything else as safetensors.

    Raises:
        SpatialTokensError: If it cannot be written.
    """
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise SpatialTokensError(f"cannot write {path}: {on_meta[0]} is on the meta device, without values; load or initialise it")
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            if Path(path).suffix in (".bin", ".pt"):
                torch.save(whole, temporary)
            else:
                save_file(whole, temporary, metadata={"format": "pt", **metadata})
        except (SafetensorError, RuntimeError) as error:
            raise SpatialTokensError(f"cannot write {path}: {reason(error)}") from error


def read_tensors(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
    """The tensors of a weight file, of an index file's shards, or of the weights in a folder.

    Args:
        path: A `.safetensors`, `.bin` or `.pt` file, an `.index.json`, or a folder that holds one of `FOLDER_NAMES`.
        wanted: Which names to read; the others are passed over, and shards that hold none are not opened.

    Raises:
        SpatialTokensError: If a file is missing, truncated, of another kind, or would need code to be run.
    """
    path = Path(path)
    if os.path.isdir(path):
        found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
        if not found:
            raise SpatialTokensError(f"no weights in {path}; looked for {', '.join(FOLDER_NAMES)}")
        path = found[0]
    if not os.path.isfile(path):  # which, unlike Path.is_file(), takes any name
        raise SpatialTokensError(f"{path} does not exist; give a weight file, an index file or a folder of them")
    return _read_index(path, wanted) if path.name.endswith(".index.json") else _read_file(path, wanted)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        SpatialTokensError: If it is missing or not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise SpatialTokensError(f"{path} is not a whole safetensors file: {reason(error)}") from error


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    return _read_safetensors(path, wanted) if path.suffix == ".safetensors" else _read_pickle(path, wanted)


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SpatialTokensError(f"{path} is not a whole safetensors file: {reason(error)}") from error


def _read_pickle(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise SpatialTokensError(
            f"{path} is not a whole PyTorch file of tensors alone (no code is run to read it): {reason(error)}"
        ) from error
    if not is_state_dict(values):
        raise SpatialTokensError(f"{path} holds a {type(values).__name__} that is not a state dict of tensors")
    return {name: tensor for name, tensor in values.items() if wanted(name)}


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
