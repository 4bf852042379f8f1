"""Time and memory of the extractor against batch, grid, channels and number of tokens, one at a time around the paper's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from spatial_tokens.bench.contest import Contest, Entry
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.bench.suites.kernels import PASSES, TOLERANCE, verified
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.grid import as_size, crop_sizes
from spatial_tokens.modules import SpatialFeatureExtractor

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GRIDS = (16, 20, 24, 32, 40, 48, 64)
CHANNELS = (768, 1024, 1536, 2048, 3072, 4096)
NUM_TOKENS = (1, 2, 3, 6, 12, 24)


def contests(options: Options) -> Iterator[Contest]:
    """Four sweeps, each in each dtype: the subject names what is varied, the setting its value."""
    config = replace(options.config, detail_kernel_size=None, detail_stride=None)
    for dtype in options.dtypes:
        for batch in options.batches or BATCHES:
            yield _contest(options, "batch", batch, config, batch, dtype)
        for grid in GRIDS:
            largest = crop_sizes(grid, 2 if grid > 20 else 1)[-config.num_spatial_tokens :]
            yield _contest(options, "grid", grid, replace(config, grid_size=(grid, grid), kernel_sizes=largest), 1, dtype)
        for channels in CHANNELS:
            yield _contest(options, "channels", channels, replace(config, vision_hidden_size=channels), 1, dtype)
        for count in NUM_TOKENS:
            if sizes := _sizes(config, count):
                yield _contest(options, "tokens", count, replace(config, kernel_sizes=sizes, variant="pooling"), 1, dtype)


def _sizes(config: SPProjectorConfig, count: int) -> tuple[int, ...]:
    """As many sizes as equal steps up to the grid give; pooled, as a step of one cannot be cropped."""
    side = min(config.grid_size)
    return tuple(round(side * (i + 1) / count) for i in range(count)) if count <= side else ()


def _contest(options: Options, swept: str, value: int, config: SPProjectorConfig, batch: int, dtype: str) -> Contest:
    itemsize = DTYPES[dtype].itemsize
    areas = _areas(config)
    weights = sum(areas) * config.vision_hidden_size * config.spatial_hidden_size * itemsize
    features = batch * config.num_patches * config.vision_hidden_size * itemsize
    return Contest(
        "scaling",
        swept,
        {"pass": PASSES[0], "dtype": dtype, swept: value},
        {"SP": partial(_entry, options, config, batch, DTYPES[dtype])},
        memory=weights + 4 * features + 2**28,
    )


def _areas(config: SPProjectorConfig) -> Iterable[int]:
    sizes = [as_size(size, "kernel size") for size in config.kernel_sizes]
    return [height * width for height, width in sizes]


def _entry(options: Options, config: SPProjectorConfig, batch: int, dtype: torch.dtype) -> Entry:
    extractor = SpatialFeatureExtractor(
        config.vision_hidden_size, config.spatial_hidden_size, grid_size=config.grid_size, kernel_sizes=config.kernel_sizes,
        variant=config.variant, device=options.device, dtype=dtype,
    )  # fmt: skip
    features = replace(options, config=config).features(batch, dtype)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            tokens: torch.Tensor = extractor(features)
            return tokens

    verified(run, extractor, TOLERANCE[str(dtype).removeprefix("torch.")])
    return Entry(run)
