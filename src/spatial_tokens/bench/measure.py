"""Times, taken side by side: the works take turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spatial_tokens.bench.machine import PeakMemory

LEAST_ROUNDS = 3
MOST_ROUNDS = 50
AHEAD = 2_000_000  # cycles, about a millisecond: the GPU waits while Python queues the work, so that launching is not timed


@dataclass(frozen=True)
class Times:
    """Seconds of one work over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        """The time that this share of the rounds did not exceed."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(share))


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """One run's time, between events of the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):  # events belong to the current one
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
        before.record()
        work()
        after.record()
        after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def side_by_side(works: Mapping[str, Callable[[], Any]], device: torch.device, budget: float) -> dict[str, Times]:
    """Each work's times, one of each in every round.

    Args:
        works: What to time, by name; each has run before.
        device: Where they run.
        budget: Seconds to spend, about; three rounds are taken whatever they cost.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    start = time.perf_counter()
    for round_number in range(MOST_ROUNDS):
        if round_number >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, work in works.items():
            taken[name].append(seconds_of(work, device))
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one run allocates at most above what was there, its result not counted."""
    gc.collect()
    with PeakMemory(device) as peak:
        result = work()
    if peak.num_bytes is None:
        return None
    return max(0, peak.num_bytes - _size(result))


def _size(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size()
    return sum(map(_size, result)) if isinstance(result, (list, tuple)) else 0
