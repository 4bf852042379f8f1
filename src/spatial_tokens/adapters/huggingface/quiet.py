"""transformers without its warnings and progress bars, for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spatial_tokens.errors import MissingExtraError


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Gives transformers, silenced while the block runs; the caller's settings come back after it.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    logging: Any = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
