"""The library's version in the files that it writes, and errors that name a file of a newer version as such."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spatial_tokens import __version__
from spatial_tokens.errors import SpatialTokensError

ENTRY = "library"  # of a config file: what wrote it
WRITER = f"spatial-tokens {__version__}"


def release(writer: Any) -> tuple[int, ...]:
    """(0, 2, 1) for "spatial-tokens 0.2.1" and "spatial-tokens 0.2.1.dev3"; () for what no version of the library writes."""
    text = writer if isinstance(writer, str) else ""
    match = re.fullmatch(r"spatial-tokens (\d{1,9}(?:\.\d{1,9})*)(?!\d)[\w.+]*", text, flags=re.ASCII)
    return tuple(map(int, match[1].split("."))) if match else ()


@contextmanager
def naming_newer_files(values: Any) -> Iterator[None]:
    """Adds to an error about a file's values that a newer version of the library wrote the file, where its entry says so."""
    try:
        yield
    except SpatialTokensError as error:
        writer = values.get(ENTRY) if isinstance(values, dict) else None
        if release(writer) <= release(WRITER):
            raise
        raise SpatialTokensError(f"written by {writer}, newer than this {WRITER}; upgrade the library: {error}") from error
