"""What a stopped run resumes from: one file, whole or not there."""

import time
from pathlib import Path
from typing import Any

import torch

from spatial_tokens import SpatialTokensError
from spatial_tokens.errors import reason
from spatial_tokens.storage.files import atomic_write

EVERY = 60.0  # seconds between checkpoints, which are written after a step: a stop while the model is asked costs that too


class Checkpoint:
    """The file of a run's state.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.written = path, time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The state that was written last, if any was.

        Raises:
            SpatialTokensError: If the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            return dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except Exception as error:  # what a damaged pickle raises depends on where it is damaged
            raise SpatialTokensError(
                f"{self.path} is damaged ({reason(error)}); delete it, and the same command begins the run again"
            ) from error

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and time.monotonic() - self.written >= EVERY

    def write(self, state: dict[str, Any]) -> None:
        """Writes a state of tensors and plain values, in place of the last."""
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                torch.save(state, temporary)
        self.written = time.monotonic()

    def remove(self) -> None:
        """Removes the file, of a run that is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
