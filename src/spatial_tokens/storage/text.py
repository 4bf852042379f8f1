"""Text files, read with errors that say what is wrong; needs no torch."""

import os
from pathlib import Path

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.storage.contents import LFS_POINTER, described


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file.

    Raises:
        SpatialTokensError: If it is missing, unreadable or not UTF-8.
    """
    try:
        text = as_path(path).read_text(encoding="utf-8")
    except SpatialTokensError:
        raise
    except (OSError, ValueError) as error:
        raise SpatialTokensError(f"cannot read {path}: {reason(error)}") from error
    if text.startswith(LFS_POINTER):
        raise SpatialTokensError(f"cannot read {path}: it is {described(Path(path))}")
    return text
