"""What the commands share: tables, JSON, and paths that are not empty."""

import json
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from spatial_tokens.checks import as_path


def require_paths(arguments: Namespace, *names: str) -> None:
    """Refuses an empty string, which `Path` would take for the working directory."""
    for name in names:
        if getattr(arguments, name) is not None:
            as_path(getattr(arguments, name), f"--{name}")


def shape_text(shape: tuple[int, ...]) -> str:
    """1 x 582 x 512."""
    return " x ".join(map(str, shape))


def print_json(value: Any) -> None:
    """A value as JSON, on lines of its own."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_wrapped(text: str) -> None:
    """A sentence, broken between words where a terminal's line ends; as it is where no terminal shows it."""
    if sys.stdout.isatty():
        text = textwrap.fill(text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    print(text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A title, and columns as wide as their cells: the first starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    print(title, "", line(header), line(["-" * width for width in widths]), *map(line, rows), "", sep="\n")
