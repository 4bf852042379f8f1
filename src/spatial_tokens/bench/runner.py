"""Runs a comparison: builds, checks, then times its candidates, and says what went wrong with those that could not."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from spatial_tokens.bench.comparison import Candidate, Comparison, Row
from spatial_tokens.bench.machine import free_memory
from spatial_tokens.bench.measure import Times, peak_bytes, side_by_side
from spatial_tokens.errors import SpatialTokensError, reason

READ = "read the weights"
BUDGET = 2.0  # seconds a comparison


def run_comparison(comparison: Comparison, device: torch.device, peak_flops: float | None, budget: float = BUDGET) -> list[Row]:
    """The rows of a comparison, in its candidates' order.

    Args:
        comparison: What to compare.
        device: Where.
        peak_flops: The device's measured operations a second for this dtype, if the comparison has a limit.
        budget: Seconds to spend on timing.
    """
    free = free_memory(device)
    if free is not None and comparison.memory > free:
        lack = f"needs about {comparison.memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return [_row(comparison, name, failure=lack) for name in comparison.candidates]

    ready, failures, errors = _build(comparison)
    works = {name: candidate.run for name, candidate in ready.items()}
    try:
        weights = comparison.weights() if ready else ()
        if weights:
            works[READ] = lambda: [_read(weight) for weight in weights]
            works[READ]()
        in_cache = [name for name, candidate in ready.items() if candidate.in_cache]
        times = side_by_side(works, device, budget, in_cache) if ready else {}
        peaks = {name: peak_bytes(candidate.run, device) for name, candidate in ready.items()}
    except Exception as error:  # what ran once, alone, may still not run beside the others
        return [_row(comparison, name, failure=failures.get(name, failure_of(error))) for name in comparison.candidates]
    rows = []
    for name in comparison.candidates:
        if name in failures:
            rows.append(_row(comparison, name, failure=failures[name]))
            continue
        candidate = ready[name]
        values = {**_timed(times[name]), **candidate.values, **candidate.finish(times[name].median)}
        if comparison.baseline in times:
            values["ratio"] = times[comparison.baseline].median / times[name].median
        if name in errors:
            values["error"] = errors[name]
        work = candidate.work or (comparison.num_bytes, comparison.num_flops)
        values.update(_limits(work, sum(weight.nbytes for weight in weights), times, name, peak_flops))
        peak = peaks[name]
        if peak is not None:
            values["peak_mib"] = peak / 2**20
        rows.append(_row(comparison, name, values))
    ready.clear()
    works.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _build(comparison: Comparison) -> tuple[dict[str, Candidate], dict[str, str], dict[str, float]]:
    """Entries that run and give the reference's result; why the others do not; how far each is from the reference."""
    candidate: Candidate | None
    found: Any
    ready: dict[str, Candidate] = {}
    failures: dict[str, str] = {}
    errors: dict[str, float] = {}
    expected = None
    names = sorted(comparison.candidates, key=lambda name: name != comparison.reference)
    for name in names:
        try:
            candidate = comparison.candidates[name]()
            found = candidate.result(candidate.run())
            if name == comparison.reference:
                expected = found
            elif expected is not None:
                errors[name] = _distance(found, expected[: candidate.num_compared])
                if not errors[name] <= comparison.tolerance:  # NaN never passes
                    failures[name] = f"wrong: off by {errors[name]:.1e} of the reference's norm"
                    continue
            ready[name] = candidate
        except Exception as error:  # whatever a competitor raises is its row's to tell
            failures[name] = failure_of(error)
            if name == comparison.reference:
                unchecked = f"not checked, as {name} failed"
                return {}, {**dict.fromkeys(names, unchecked), **failures}, {}
        finally:
            candidate = found = None
    return ready, failures, errors


def failure_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {reason(error)}"[:160]


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN try its algorithms and keep the fastest, as the authors' convolutions deserve; float32 is float32, as in ours."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def _distance(found: Any, expected: Any) -> float:
    """The largest relative distance of a tensor from its reference, in norm."""
    shapes, others = [tuple(a.shape) for a in found], [tuple(b.shape) for b in expected]
    if shapes != others:
        raise SpatialTokensError(f"wrong: gave {shapes}, not {others}")
    errors = [((a - b).float().norm(), b.float().norm()) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack([torch.where(far == 0, far, far / size) for far, size in errors]).max())  # NaN wins, unlike max()


def _read(weight: torch.Tensor) -> torch.Tensor:
    """Reads every byte once, and does as little else as torch can."""
    return weight.view(torch.float32).sum() if weight.dtype.itemsize < 4 and weight.shape[-1] % 2 == 0 else weight.sum()


def _limits(
    work: tuple[int, int], num_read: int, times: Mapping[str, Times], name: str, peak_flops: float | None
) -> dict[str, float]:
    """The least time that the bytes at the measured bandwidth and the operations at the measured peak allow."""
    if READ not in times or peak_flops is None:
        return {}
    bandwidth = num_read / times[READ].median
    to_move, to_do = work[0] / bandwidth, work[1] / peak_flops
    limit = max(to_move, to_do)
    return {
        "read_gb_per_s": bandwidth / 1e9,
        "limit_ms": 1000 * limit,
        "share_of_limit": limit / times[name].median,
    }


def _timed(times: Times) -> dict[str, float]:
    values = {"ms": times.median, "p20_ms": times.quantile(0.2), "p80_ms": times.quantile(0.8)}
    return {**{name: 1000 * seconds for name, seconds in values.items()}, "rounds": len(times.seconds)}


def _row(comparison: Comparison, name: str, values: Mapping[str, float] | None = None, failure: str | None = None) -> Row:
    return Row(comparison.suite, comparison.subject, name, comparison.setting, values or {}, failure)
