"""Checkpoints that are known to be complete: a list of their files, written last, with the size and checksum of each."""

from __future__ import annotations

import json
import re
import warnings
import zlib
from os import PathLike
from pathlib import Path

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.storage.files import atomic_write
from spatial_tokens.storage.staging import is_staging, sync

MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 2**24


def mark_complete(folder: str | PathLike[str]) -> None:
    """Lists what is in a folder, with sizes and CRC-32, once it is on the disk; to be called when all of it has been written.

    Raises:
        SpatialTokensError: If there is nothing, or the list cannot be written.
    """
    folder = as_path(folder)
    names = _files(folder)
    if not names:
        raise SpatialTokensError(f"{folder} holds no files; write the checkpoint first")
    for name in names:
        sync(folder / name)
    files = {name: list(_fingerprint(folder / name)) for name in names}
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_complete(folder: str | PathLike[str]) -> None:
    """Raises SpatialTokensError if a checkpoint was not written to its end, or is no longer what was written."""
    folder = as_path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(size), int(checksum)) for name, (size, checksum) in files.items()}
    except FileNotFoundError as error:
        raise SpatialTokensError(f"{folder} has no {MANIFEST}: it was not written to its end") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SpatialTokensError(f"{folder / MANIFEST} cannot be read: {reason(error)}") from error
    if not listed:
        raise SpatialTokensError(f"{folder / MANIFEST} lists no files: it is not of a complete checkpoint")
    for name, (size, checksum) in listed.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise SpatialTokensError(f"{folder / name} cannot be read: {reason(error)}") from error
        if found[0] != size:
            raise SpatialTokensError(f"{folder / name} has {found[0]} bytes, {size} were written")
        if found[1] != checksum:
            raise SpatialTokensError(f"{folder / name} is damaged: its checksum is not that of what was written")


def last_complete(directory: str | PathLike[str]) -> Path | None:
    """The newest `checkpoint-N` of a directory that is complete, or None; a warning names each newer one that is not."""
    for folder in reversed(checkpoints_in(directory)):
        try:
            check_complete(folder)
        except SpatialTokensError as error:
            warnings.warn(f"skipped a checkpoint: {error}", stacklevel=2)
            continue
        return folder
    return None


def checkpoints_in(directory: str | PathLike[str]) -> list[Path]:
    """The folders `checkpoint-N` of a directory, in the order of their steps."""
    found = [(int(match[1]), path) for path in as_path(directory).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.as_posix() != MANIFEST and not any(map(is_staging, path.parts)))


def _fingerprint(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
