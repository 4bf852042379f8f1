"""Whole projectors on the same features: LLaVA's MLP, this library's in its variants and ablations, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from spatial_tokens.bench import baselines
from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.options import DTYPES, Options, factorized
from spatial_tokens.bench.suites.kernels import TOLERANCE, activations, flops_of, verified
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.grid import crop_sizes
from spatial_tokens.modules import LinearHead, MLPHead, SPProjector
from spatial_tokens.modules.ablations import TransformerExtractor

BASELINE = "LLaVA MLP"
Builder = Callable[[torch.device, torch.dtype], nn.Module]


def comparisons(options: Options) -> Iterator[Comparison]:
    """Each projector beside LLaVA's MLP, so that its ratio is of one moment."""
    config = options.config
    baseline = partial(_baseline, baselines.LlavaMLP, config)
    for name, build in builders(config).items():
        for dtype in options.dtypes:
            for batch in options.batches_or(cpu=(1,), cuda=(1, 32)):
                candidates = {
                    each: partial(_candidate, make, options, dtype, batch) for each, make in ((BASELINE, baseline), (name, build))
                }
                yield Comparison(
                    "projectors", name, {"dtype": dtype, "batch": batch}, candidates, baseline=BASELINE,
                    memory=3 * config.num_parameters * DTYPES[dtype].itemsize + activations(config, batch, DTYPES[dtype]),
                )  # fmt: skip


def builders(config: SPProjectorConfig) -> dict[str, Builder]:
    """How each projector is made, by name."""
    bare = replace(config, detail_kernel_size=None, detail_stride=None)
    fewer = {
        f"SP, {len(sizes)} token{'s' if len(sizes) > 1 else ''}": partial(_projector, replace(bare, kernel_sizes=sizes))
        for sizes in _token_ablations(config)
    }
    dense = {
        "SP cropping": replace(bare, variant="cropping"),
        "SP pooling": replace(bare, variant="pooling"),
        "SP cropping + DFI": replace(config, variant="cropping"),
        "SP pooling + DFI": replace(config, variant="pooling"),
    }
    return {
        **{name: partial(_projector, each) for name, each in dense.items()},
        **{f"{name}, factorized": partial(_projector, factorized(each)) for name, each in dense.items()},
        **fewer,
        "SP, transformer blocks": partial(_transformer_projector, config),
        "DeCo": partial(_baseline, baselines.DecoProjector, config),
        "C-Abstractor": partial(_baseline, baselines.CAbstractor, config),
        "Perceiver resampler": partial(_baseline, baselines.PerceiverResampler, config),
        "Q-Former": partial(_baseline, baselines.QFormer, config),
    }


def _token_ablations(config: SPProjectorConfig) -> list[tuple[int | tuple[int, int], ...]]:
    """Table 4: one, three and twelve tokens, on this grid."""
    six = config.kernel_sizes
    return [six[-1:], six[1::2], crop_sizes(config.grid_size, 1)]


def _projector(config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return SPProjector.from_config(config, device=device, dtype=dtype)


def _transformer_projector(config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    c, d = config.vision_hidden_size, config.text_hidden_size
    extractor = TransformerExtractor(
        c, grid_size=config.grid_size, kernel_sizes=config.kernel_sizes, variant=config.variant, device=device, dtype=dtype
    )
    head = LinearHead(c, d, bias=False, device=device, dtype=dtype)
    return SPProjector(extractor, None, head, MLPHead(c, d, device=device, dtype=dtype))


def _baseline(kind: type[nn.Module], config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    c, d = config.vision_hidden_size, config.text_hidden_size
    return kind(c, d, grid_size=config.grid_size, device=device, dtype=dtype)


def _candidate(build: Builder, options: Options, dtype: str, batch: int) -> Candidate:
    projector = build(options.device, DTYPES[dtype]).eval()
    features = options.features(batch, DTYPES[dtype])

    def run() -> torch.Tensor:
        with torch.inference_mode():
            tokens: torch.Tensor = projector(features)
            return tokens

    num_tokens = verified(run, projector, TOLERANCE[dtype]).shape[1]
    values = {
        "tokens": num_tokens,
        "parameters": sum(parameter.numel() for parameter in projector.parameters()),
        "gflop_per_image": _flops(build, options) / 1e9,
    }
    return Candidate(run, values=values, finish=lambda seconds: {"tokens_per_s": batch * num_tokens / seconds})


def _flops(build: Builder, options: Options) -> int:
    """Of one image."""
    size = (1, options.config.num_patches, options.config.vision_hidden_size)
    return flops_of(build(torch.device("meta"), torch.float32).eval(), torch.empty(size, device="meta"))
