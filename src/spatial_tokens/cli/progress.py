"""How far a command is."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

SECONDS = 10  # from one line to the next where no terminal is


class Progress:
    """How far a command is, on standard error: one line that changes on a terminal, else a line now and then.

    Args:
        of: What is counted.
    """

    def __init__(self, of: str = "pictures") -> None:
        self._of = of
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._stage, self._shown = "", 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._stage:
            self._write("\n")

    def __call__(self, stage: str, count: int) -> None:
        now = time.monotonic()
        if self._terminal:
            self._write(("\n" if self._stage not in ("", stage) else "") + f"\r{stage}: {count} {self._of}\033[K")
        elif stage != self._stage or now - self._shown > SECONDS:
            self._write(f"{stage}: {count} {self._of}\n")
            self._shown = now
        self._stage = stage

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError, AttributeError):  # it is closed: nobody wants to know
            sys.stderr.write(text)
            sys.stderr.flush()
