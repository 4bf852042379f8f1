"""What the device can do at best: bytes read and copied, and multiply-adds, in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.options import DTYPES, Options

NUM_BYTES = {"cpu": 2**30, "cuda": 2**32}
WIDTH = {"cpu": 4096, "cuda": 8192}


def comparisons(options: Options) -> Iterator[Comparison]:
    """Bandwidth on a tensor far larger than a cache, and square products in each dtype."""
    num_bytes = NUM_BYTES[options.device.type]
    yield Comparison(
        "limits",
        "memory",
        {"size": f"{num_bytes / 2**30:g} GiB"},
        {"read": partial(_read, options.device, num_bytes), "copy": partial(_copy, options.device, num_bytes)},
        memory=3 * num_bytes,
    )
    for name in options.dtypes:
        yield products(options.device, name)


def products(device: torch.device, dtype: str) -> Comparison:
    """The product of two square matrices."""
    width = WIDTH[device.type]
    candidates: dict[str, Callable[[], Candidate]] = {"torch.mm": partial(_product, device, DTYPES[dtype], width)}
    return Comparison("limits", "matrix product", {"width": width, "dtype": dtype}, candidates)


def _read(device: torch.device, num_bytes: int) -> Candidate:
    source = torch.randn(num_bytes // 4, device=device)
    return Candidate(source.sum, finish=lambda seconds: {"gb_per_s": num_bytes / seconds / 1e9})


def _copy(device: torch.device, num_bytes: int) -> Candidate:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Candidate(lambda: target.copy_(source), finish=lambda seconds: {"gb_per_s": 2 * num_bytes / seconds / 1e9})


def _product(device: torch.device, dtype: torch.dtype, width: int) -> Candidate:
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return Candidate(lambda: left @ right, finish=lambda seconds: {"tflop_per_s": 2 * width**3 / seconds / 1e12})
