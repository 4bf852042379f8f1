"""A measurement that several processes share: each has its own batches, all get what all have found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from spatial_tokens.errors import SpatialTokensError, reason

Found = TypeVar("Found")


class Processes:
    """The processes of a measurement.

    Args:
        together: All of torch.distributed's, each of which makes the same calls; otherwise this one alone.
    """

    def __init__(self, together: bool) -> None:
        together = together and dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def gather(self, work: Callable[[], Found]) -> list[Found]:
        """What each process's work gives, in the processes' order: plain values and tensors of the CPU.

        Raises:
            SpatialTokensError: If another process's work fails. None waits for one that has failed,
                unless the model is sharded, whose passes wait for one another.
        """
        if self.count == 1:
            return [work()]
        found, failure = None, None
        try:
            found = work()
        except Exception as error:
            failure = error
        given: list[Any] = [None] * self.count
        dist.all_gather_object(given, (found, None if failure is None else reason(failure)))
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(given):
            if message is not None:
                raise SpatialTokensError(f"process {rank}: {message}")
        return [each for each, _ in given]

    def own(self, batches: Any, size: int) -> int:
        """How many samples of the batch just read, its first, are no copies: accelerate fills up the last batch of each process."""
        if self.count == 1 or not getattr(batches, "end_of_dataloader", False):
            return size
        remainder: int = batches.remainder  # of the samples of all processes' last batches; none where these are full
        return size if remainder <= 0 else min(max(remainder - self.rank * size, 0), size)


def is_shared_out(batches: Any) -> bool:
    """Whether these are a DataLoader of accelerate's, which gives each process batches of its own."""
    return hasattr(batches, "end_of_dataloader")
