"""Times, taken side by side: the works take turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spatial_tokens.bench.machine import PeakMemory

LEAST_ROUNDS = 3
MOST_ROUNDS = 50
LAUNCH_CYCLES = 2_000_000  # cycles, about a millisecond: the GPU waits while Python queues the work, so that launching is not timed


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
        torch.cuda._sleep(LAUNCH_CYCLES)  # type: ignore[no-untyped-call]
        before.record()
        work()
        after.record()
        after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def side_by_side(
    works: Mapping[str, Callable[[], Any]], device: torch.device, budget: float, in_cache: Collection[str] = ()
) -> dict[str, Times]:
    """Each work's times, one of each in every round.

    What takes so long that three rounds of it leave no time for more is taken three times; the others go on taking turns.

    Args:
        works: What to time, by name; each has run before.
        device: Where they run.
        budget: Seconds to spend, about; three rounds are taken whatever they cost.
        in_cache: Those that run once, untimed, before each timed run.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    spent = dict.fromkeys(works, 0.0)
    left = list(works)
    gc.collect()
    for round_number in range(MOST_ROUNDS):
        while round_number == LEAST_ROUNDS and left and sum(spent[name] for name in left) > budget:
            left.remove(max(left, key=spent.__getitem__))
        if round_number >= LEAST_ROUNDS and sum(spent[name] for name in left) > budget:
            break
        for name in left:
            start = time.perf_counter()
            if name in in_cache:
                works[name]()
            taken[name].append(seconds_of(works[name], device))
            spent[name] += time.perf_counter() - start
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
