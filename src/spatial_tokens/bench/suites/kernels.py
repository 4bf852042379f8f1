"""Each operator and backend, and factorized kernels, against the authors' convolutions, forward and backward.

Where factorized kernels take part, the dense ones are those that they stand for, so that all compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.bench.reference_conv import ConvDetail, ConvExtractor
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Variant, as_size
from spatial_tokens.modules import DetailFeatureIntegrator, FactorizedFeatureExtractor, SpatialFeatureExtractor, SPProjector
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.ops.backends import TRITON, using

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
AUTHORS = "Conv2d (authors)"
FACTORIZED = "factorized"
PASSES = ("forward", "forward + backward")


def comparisons(options: Options) -> Iterator[Comparison]:
    """Tokens of crops, whole projector, detail map, integrator, tokens of poolings."""
    of_detail = [detail, integration] if options.config.detail_kernel_size is not None else []
    for subject in (cropping, projection, *of_detail, pooling):
        for dtype, batch in product(options.dtypes, options.batches_or(cpu=(1, 8), cuda=(1, 8, 32, 256, 512))):
            for direction in PASSES:
                yield subject(options, DTYPES[dtype], batch, direction)


def cropping(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    """The extractor on centered crops."""
    return _tokens(options, "cropping", dtype, batch, direction)


def pooling(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    """The extractor on adaptive poolings."""
    return _tokens(options, "pooling", dtype, batch, direction)


def detail(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    """The integrator's strided convolution."""
    pair = _FactorizedPair(partial(_detail, options.factorized), partial(_dense_detail, options.config))
    return _comparison(options, "detail map", partial(_detail, options.config), ConvDetail, dtype, batch, direction, pair)


def projection(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    """The whole projector, against itself with the authors' convolutions in the place of its kernels."""
    return _comparison(options, "projector", partial(_projector, options), _AuthorsProjector, dtype, batch, direction)


def integration(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    """LayerNorms, projections and attention, on a detail map that is there."""

    @cache
    def shared() -> tuple[nn.Module, torch.Tensor]:
        integrator = _integrator(options.config, options.device, dtype)
        size = (batch, prod(integrator.detail_grid_size), integrator.spatial_hidden_size)
        attention = _Attention(integrator, options.config.num_spatial_tokens)
        return attention, torch.randn(size, device=options.device).to(dtype)

    candidates = {name: partial(_own, shared, name, direction) for name in ("naive", "gemm")}
    return Comparison("kernels", "integrator", _setting(batch, dtype, direction), candidates, "naive", _tolerance(dtype), "naive")


@dataclass(frozen=True)
class _FactorizedPair:
    """How factorized kernels are made, and the dense ones that they stand for."""

    make: Callable[[torch.device, torch.dtype], nn.Module]
    to_dense: Callable[[Any], nn.Module]


def _tokens(options: Options, variant: Variant, dtype: torch.dtype, batch: int, direction: str) -> Comparison:
    dense, small = (replace(config, variant=variant) for config in (options.config, options.factorized))
    pair = _FactorizedPair(partial(extractor_of, small), FactorizedFeatureExtractor.to_dense)
    return _comparison(options, f"tokens, {variant}", partial(extractor_of, dense), ConvExtractor, dtype, batch, direction, pair)


def extractor_of(
    config: SPProjectorConfig, device: torch.device, dtype: torch.dtype
) -> SpatialFeatureExtractor | FactorizedFeatureExtractor:
    """The extractor that a config describes, and nothing else of its projector."""
    sizes: dict[str, Any] = {
        "grid_size": config.grid_size, "kernel_sizes": config.kernel_sizes, "variant": config.variant,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    if config.rank is None:
        return SpatialFeatureExtractor(config.vision_hidden_size, config.spatial_hidden_size, **sizes)
    factors: dict[str, Any] = {"frequencies": config.frequencies, "rank": config.rank, "spatial_basis": config.spatial_basis}
    return FactorizedFeatureExtractor(config.vision_hidden_size, config.spatial_hidden_size, **factors, **sizes)


def _integrator(config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> DetailFeatureIntegrator:
    if config.detail_kernel_size is None or config.detail_stride is None:
        raise SpatialTokensError("the integrator is timed with a config that has one; detail_kernel_size is None")
    return DetailFeatureIntegrator(
        config.vision_hidden_size, config.spatial_hidden_size, grid_size=config.grid_size,
        kernel_size=config.detail_kernel_size, stride=config.detail_stride, rank=config.rank,
        frequencies=config.detail_frequencies, spatial_basis=config.spatial_basis, device=device, dtype=dtype,
    )  # fmt: skip


def _detail(config: SPProjectorConfig, device: torch.device, dtype: torch.dtype) -> _Detail:
    return _Detail(_integrator(config, device, dtype))


def _dense_detail(config: SPProjectorConfig, factorized: _Detail) -> _Detail:
    (weight,) = cast(FactorizedKernels, factorized.detail_kernel).to_dense()
    dense = _detail(config, torch.device("meta"), weight.dtype)
    dense.load_state_dict({"detail_kernel.weight": weight.detach()}, assign=True)
    return dense


def _projector(options: Options, device: torch.device, dtype: torch.dtype) -> SPProjector:
    return SPProjector.from_config(options.config, device=device, dtype=dtype)


class _Detail(nn.Module):
    """The integrator's detail map alone, with what the authors' needs to know of it."""

    def __init__(self, integrator: DetailFeatureIntegrator) -> None:
        super().__init__()
        self.detail_kernel, self.detail_map = integrator.detail_kernel, integrator.detail_map
        self.grid_size, self.kernel_size, self.stride = integrator.grid_size, integrator.kernel_size, integrator.stride

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.detail_map(patches)


class _Attention(nn.Module):
    """The integrator without its detail map, on spatial tokens that are the map's first positions."""

    def __init__(self, integrator: DetailFeatureIntegrator, num_tokens: int) -> None:
        super().__init__()
        self.query_projector, self.key_projector = integrator.query_projector, integrator.key_projector
        self.value_projector, self.look_up = integrator.value_projector, integrator.look_up
        self.num_tokens = num_tokens

    def forward(self, detail_map: torch.Tensor) -> torch.Tensor:
        return self.look_up(detail_map[:, : self.num_tokens], detail_map)[0]


class _AuthorsProjector(nn.Module):
    def __init__(self, projector: SPProjector, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.extractor = ConvExtractor(projector.extractor, memory_format)  # type: ignore[arg-type]
        integrator = projector.integrator
        self.detail = ConvDetail(integrator, memory_format) if integrator is not None else None
        self.attention = _Attention(integrator, projector.num_spatial_tokens) if integrator is not None else None
        if projector.patch_head is None:
            raise SpatialTokensError("the authors' projector has a head for the patches; patch_head is None")
        self.spatial_head, self.patch_head = projector.spatial_head, projector.patch_head

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        tokens = self.extractor(patches)
        if self.detail is not None and self.attention is not None:
            tokens = self.attention.look_up(tokens, self.detail(patches))[0]
        return torch.cat([self.spatial_head(tokens), self.patch_head(patches)], dim=1)


def _comparison(
    options: Options,
    subject: str,
    build: Callable[[torch.device, torch.dtype], nn.Module],
    authors: Callable[[Any, torch.memory_format], nn.Module],
    dtype: torch.dtype,
    batch: int,
    direction: str,
    pair: _FactorizedPair | None = None,
) -> Comparison:
    @cache
    def small() -> nn.Module | None:
        return None if pair is None else pair.make(options.device, dtype)

    @cache  # gigabytes: made when the first candidate is, gone with the comparison
    def shared() -> tuple[nn.Module, torch.Tensor]:
        module = build(options.device, dtype) if pair is None else pair.to_dense(small())
        return module, options.features(batch, dtype)

    meta = torch.device("meta")
    shapes = replace(options, device=meta).features(batch, dtype)

    def factorized(pair: _FactorizedPair) -> Candidate:
        module, (_, features) = cast(nn.Module, small()), shared()
        candidate = replace(_candidate(module, features, module, direction), work=work(pair.make(meta, dtype), shapes, direction))
        if direction == PASSES[0]:
            return candidate
        return replace(candidate, result=lambda found: found[:2], num_compared=2)  # the gradients of factors are its own

    def convolution(compiled: bool = False, memory_format: torch.memory_format = torch.contiguous_format) -> Candidate:
        module, features = shared()
        other = authors(module, memory_format)
        if compiled:
            torch._dynamo.reset()  # beyond a few shapes it would run what it compiles for others, or nothing compiled
        run = torch.compile(other, dynamic=False) if compiled else other
        return _candidate(run, features, other, direction)

    candidates: dict[str, Callable[[], Candidate]] = {
        name: partial(_own, shared, name, direction) for name in _backends(options.device)
    }
    if pair is not None:
        candidates[FACTORIZED] = partial(factorized, pair)
    candidates[AUTHORS] = convolution
    # On a CPU the backward pass took 36 s a run channels last, and over eight minutes to compile: there they run forward only.
    if direction == PASSES[0] or options.device.type == "cuda":
        candidates["Conv2d, channels last"] = partial(convolution, memory_format=torch.channels_last)
        if subject == "tokens, cropping" and batch <= 32:  # each batch is compiled again
            candidates["Conv2d, torch.compile"] = partial(convolution, compiled=True)

    module = build(meta, dtype)
    num_bytes, num_flops = work(module, shapes, direction)
    return Comparison(
        "kernels", subject, _setting(batch, dtype, direction), candidates, "naive", _tolerance(dtype), AUTHORS,
        num_bytes=num_bytes, num_flops=num_flops,
        weights=lambda: [weight.detach() for weight in shared()[0].parameters() if weight.ndim == 2],
        memory=4 * sum(weight.nbytes for weight in module.parameters()) + 2 * activations(options.config, batch, dtype),
    )  # fmt: skip


def activations(config: SPProjectorConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes, about, that a forward pass of a whole projector holds at once, the specification's unfolded windows included."""
    unfolded = (
        prod(config.detail_grid_size) * prod(as_size(config.detail_kernel_size or 1, "kernel size")) * config.vision_hidden_size
    )
    tokens = config.num_patches * max(config.vision_hidden_size, config.text_hidden_size)
    return batch * dtype.itemsize * (2 * unfolded + 6 * tokens)


def work(module: nn.Module, features: torch.Tensor, direction: str = PASSES[0]) -> tuple[int, int]:
    """The fewest bytes to move and the operations to do; both arguments are on the meta device."""
    factor = 1 if direction == PASSES[0] else 3  # backward reads the weights again and writes their gradients
    num_bytes = sum(weight.nbytes for weight in module.parameters()) + features.nbytes
    return factor * num_bytes, flops_of(module, features, direction)


def flops_of(module: nn.Module, features: torch.Tensor, direction: str = PASSES[0]) -> int:
    """The operations of one pass, counted on shapes alone: both are on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    import spatial_tokens.ops.window_linear.flops  # noqa: F401 - registers the operators' counts

    backward = direction != PASSES[0]
    module.requires_grad_(backward)
    features = features.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), using("gemm"):
        module(features)  # makes the cosines of factorized kernels, which are no work of the pass
        with FlopCounterMode(display=False) as counter:
            tokens = module(features)
            if backward:
                tokens.sum().backward()
    return int(counter.get_total_flops())


def _backends(device: torch.device) -> Sequence[str]:
    return ("naive", "gemm", "triton") if device.type == "cuda" and TRITON is not None else ("naive", "gemm")


def _own(shared: Callable[[], tuple[nn.Module, torch.Tensor]], backend: Any, direction: str) -> Candidate:
    module, features = shared()

    def run(patches: torch.Tensor) -> torch.Tensor:
        with using(backend):
            result: torch.Tensor = module(patches)
        return result

    return _candidate(run, features, module, direction)


def _candidate(
    function: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, owner: nn.Module, direction: str
) -> Candidate:
    """Forward alone, or with the gradients of the features and of every parameter."""
    if direction == PASSES[0]:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function(features)

        return Candidate(forward)

    # A bias of the keys moves all scores of a query alike, and softmax does not see it: its gradient is rounding, and no figure.
    unseen = ("key_projector.0.bias", "key_projector.1.bias")
    parameters = [parameter for name, parameter in owner.named_parameters() if not name.endswith(unseen)]
    leaf = features.detach().requires_grad_()
    generator = torch.Generator(features.device).manual_seed(0)
    grad: torch.Tensor | None = None

    def both() -> list[torch.Tensor]:
        nonlocal grad
        tokens = function(leaf)
        if grad is None:
            grad = torch.randn(tokens.shape, device=tokens.device, generator=generator).to(tokens.dtype)
        return [tokens.detach(), *torch.autograd.grad(tokens, [leaf, *parameters], grad)]

    return Candidate(both, lambda found: [*found[:2], *map(_as_linear, found[2:])])


def _as_linear(grad: torch.Tensor) -> torch.Tensor:
    """A convolution's gradient `(S, C, h, w)` in a Linear's layout; others as they are."""
    return grad.permute(0, 2, 3, 1).flatten(1) if grad.ndim == 4 else grad


def _setting(batch: int, dtype: torch.dtype, direction: str) -> Mapping[str, str | int]:
    return {"pass": direction, "dtype": str(dtype).removeprefix("torch."), "batch": batch}


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[str(dtype).removeprefix("torch.")]


def verified(run: Callable[[], torch.Tensor], module: nn.Module, tolerance: float) -> torch.Tensor:
    """A module's tokens, once they are sure to be those of the operators' specification."""
    tokens = run()
    if isinstance(module, (SPProjector, SpatialFeatureExtractor)):
        with using("naive"):
            expected = run()
        error = ((tokens - expected).float().norm() / expected.float().norm()).item()
        if not error <= tolerance:
            raise SpatialTokensError(f"wrong: off by {error:.1e} of the specification's norm")
    return tokens
