"""Dense or factorized kernels, side by side: the time of extractor and detail map, time and memory of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, product

import torch

from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.bench.suites import kernels
from spatial_tokens.bench.suites.kernels import AUTHORS, FACTORIZED, PASSES
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.modules import SPProjector

DENSE = "dense"
IN_CACHE = "factorized, in cache"


def comparisons(options: Options) -> Iterator[Comparison]:
    """The extractor's tokens, the detail map, a training step."""
    subjects = [kernels.cropping, *([kernels.detail] if options.config.detail_kernel_size is not None else [])]
    for subject in subjects:
        for dtype, batch in product(options.dtypes, options.batches_or(cpu=(1, 8), cuda=(1, 8, 32))):
            for direction in PASSES:
                yield _narrowed(subject(options, DTYPES[dtype], batch, direction))
    for dtype, batch in product(options.dtypes, options.batches_or(cpu=(8,), cuda=(32,))):
        yield training_step(options, dtype, batch)


def _narrowed(comparison: Comparison) -> Comparison:
    """The kernels suite's comparison with few candidates: the authors' forward alone, as their backward takes a minute on a CPU."""
    factorized = comparison.candidates[FACTORIZED]
    candidates = {
        DENSE: comparison.candidates["gemm"],
        FACTORIZED: factorized,
        IN_CACHE: lambda: replace(factorized(), in_cache=True),
    }
    if comparison.setting["pass"] == PASSES[0]:
        candidates[AUTHORS] = comparison.candidates[AUTHORS]
    return replace(comparison, suite="factorized", candidates=candidates, reference=DENSE, baseline=DENSE)


def training_step(options: Options, dtype: str, batch: int) -> Comparison:
    """Forward, backward and AdamW of a whole projector, on features that need no gradient: the encoder is frozen."""
    configs = {DENSE: options.config, FACTORIZED: options.factorized}
    numbers = sum(config.num_parameters for config in configs.values())
    return Comparison(
        "factorized", "training step", {"dtype": dtype, "batch": batch},
        {name: partial(_step, options, config, dtype, batch) for name, config in configs.items()},
        baseline=DENSE,
        memory=4 * numbers * DTYPES[dtype].itemsize + 2 * kernels.activations(options.config, batch, DTYPES[dtype]),
    )  # fmt: skip


def _step(options: Options, config: SPProjectorConfig, dtype: str, batch: int) -> Candidate:
    projector = SPProjector.from_config(config, device=options.device, dtype=DTYPES[dtype])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-4, weight_decay=0, fused=True)
    features = options.features(batch, DTYPES[dtype])
    size = (batch, config.num_tokens, config.text_hidden_size)
    grad = torch.randn(size, device=options.device).to(DTYPES[dtype])

    def run() -> torch.Tensor:
        tokens: torch.Tensor = projector(features)
        torch.autograd.backward(tokens, grad)
        optimizer.step()
        optimizer.zero_grad()
        return tokens.detach()

    def held(seconds: float) -> dict[str, float]:
        states = (state for each in optimizer.state.values() for state in each.values())
        return {"held_mib": sum(tensor.nbytes for tensor in chain(projector.parameters(), states)) / 2**20}

    return Candidate(run, values={"parameters": config.num_parameters}, finish=held)
