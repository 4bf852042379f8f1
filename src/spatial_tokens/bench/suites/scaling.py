"""Time and memory of the extractor against batch, grid, channels and number of tokens, one at a time around the paper's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.options import DTYPES, Options, factorized
from spatial_tokens.bench.suites.kernels import PASSES, TOLERANCE, extractor_of, verified
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.grid import crop_sizes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GRIDS = (16, 20, 24, 32, 40, 48, 64)
CHANNELS = (768, 1024, 1536, 2048, 3072, 4096)
NUM_TOKENS = (1, 2, 3, 6, 12, 24)


def comparisons(options: Options) -> Iterator[Comparison]:
    """Four sweeps, each in each dtype: the subject names what is varied, the setting its value.

    Dense and factorized kernels are comparisons of their own, so that the one is measured where the other does not fit.
    """
    config = replace(options.config, detail_kernel_size=None, detail_stride=None)
    for dtype in options.dtypes:
        for swept, value, batch, varied in _sweeps(options, config):
            for name, each in (("SP", varied), ("SP, factorized", factorized(varied))):
                yield _comparison(options, name, swept, value, each, batch, dtype)


def _sweeps(options: Options, config: SPProjectorConfig) -> Iterator[tuple[str, int, int, SPProjectorConfig]]:
    """What is varied, its value, the batch, and the config."""
    for batch in options.batches or BATCHES:
        yield "batch", batch, batch, config
    for grid in GRIDS:
        largest = crop_sizes(grid, 2 if grid > 20 else 1)[-config.num_spatial_tokens :]
        yield "grid", grid, 1, replace(config, grid_size=(grid, grid), kernel_sizes=largest)
    for channels in CHANNELS:
        yield "channels", channels, 1, replace(config, vision_hidden_size=channels)
    for count in NUM_TOKENS:
        if sizes := _sizes(config, count):
            yield "tokens", count, 1, replace(config, kernel_sizes=sizes, variant="pooling")


def _sizes(config: SPProjectorConfig, count: int) -> tuple[int, ...]:
    """As many sizes as equal steps up to the grid give; pooled, as a step of one cannot be cropped."""
    side = min(config.grid_size)
    return tuple(round(side * (i + 1) / count) for i in range(count)) if count <= side else ()


def _comparison(
    options: Options, name: str, swept: str, value: int, config: SPProjectorConfig, batch: int, dtype: str
) -> Comparison:
    itemsize = DTYPES[dtype].itemsize
    weights = config.costs(bytes_per_parameter=itemsize)[0].bytes
    features = batch * config.num_patches * config.vision_hidden_size * itemsize
    return Comparison(
        "scaling",
        swept,
        {"pass": PASSES[0], "dtype": dtype, swept: value},
        {name: partial(_candidate, options, config, batch, DTYPES[dtype])},
        memory=weights + 4 * features + 2**28,
    )


def _candidate(options: Options, config: SPProjectorConfig, batch: int, dtype: torch.dtype) -> Candidate:
    extractor = extractor_of(config, options.device, dtype)
    features = replace(options, config=config).features(batch, dtype)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            tokens: torch.Tensor = extractor(features)
            return tokens

    verified(run, extractor, TOLERANCE[str(dtype).removeprefix("torch.")])
    return Candidate(run)
