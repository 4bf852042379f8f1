"""Each operator and backend against the authors' convolutions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_tokens.bench.authors import ConvDetail, ConvExtractor
from spatial_tokens.bench.contest import Contest, Entry
from spatial_tokens.bench.options import DTYPES, Options
from spatial_tokens.modules import DetailFeatureIntegrator, SpatialFeatureExtractor, SPProjector
from spatial_tokens.ops.backends import TRITON, using

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
AUTHORS = "Conv2d (authors)"
PASSES = ("forward", "forward + backward")


def contests(options: Options) -> Iterator[Contest]:
    """Tokens of crops, whole projector, detail map, integrator, tokens of poolings."""
    for subject in (cropping, projection, detail, integration, pooling):
        for dtype, batch in product(options.dtypes, options.batches_or(cpu=(1, 8), cuda=(1, 8, 32, 256, 512))):
            for direction in PASSES:
                try:
                    contest = subject(options, DTYPES[dtype], batch, direction)
                except (RuntimeError, MemoryError) as error:  # no memory for its module or features: a row that says so
                    contest = _impossible(subject.__name__, DTYPES[dtype], batch, direction, error)
                if contest is not None:
                    yield contest
                del contest  # its module and features are gigabytes: gone before the next one's are made


def _impossible(subject: str, dtype: torch.dtype, batch: int, direction: str, error: Exception) -> Contest:
    def fail() -> Entry:
        raise error

    return Contest("kernels", subject, _setting(batch, dtype, direction), {"all": fail})


def cropping(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Contest:
    """The extractor on centred crops."""
    return _extraction(options, dtype, batch, direction, "cropping")


def pooling(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Contest:
    """The extractor on adaptive poolings."""
    return _extraction(options, dtype, batch, direction, "pooling")


def _extraction(options: Options, dtype: torch.dtype, batch: int, direction: str, variant: Any) -> Contest:
    config = options.config
    extractor = SpatialFeatureExtractor(
        config.vision_hidden_size,
        config.spatial_hidden_size,
        grid_size=config.grid_size,
        kernel_sizes=config.kernel_sizes,
        variant=variant,
        device=options.device,
        dtype=dtype,
    )
    return _contest(options, f"tokens, {variant}", extractor, partial(ConvExtractor, extractor), dtype, batch, direction)


def detail(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Contest | None:
    """The integrator's strided convolution."""
    integrator = _integrator(options, dtype)
    if integrator is None:
        return None
    return _contest(
        options, "detail map", _Detail(integrator), partial(ConvDetail, integrator), dtype, batch, direction,
        positions=integrator.detail_grid_size[0] * integrator.detail_grid_size[1],
    )  # fmt: skip


def integration(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Contest | None:
    """LayerNorms, projections and attention, on a detail map that is there."""
    integrator = _integrator(options, dtype)
    if integrator is None:
        return None
    part = _Attention(integrator)
    size = (batch, integrator.detail_grid_size[0] * integrator.detail_grid_size[1], integrator.spatial_hidden_size)
    features = torch.randn(size, device=options.device).to(dtype)
    entries = {name: partial(_entry, _with_backend(part, name), features, part, direction) for name in ("naive", "gemm")}
    return Contest("kernels", "integrator", _setting(batch, dtype, direction), entries, "naive", _tolerance(dtype), "naive")


def projection(options: Options, dtype: torch.dtype, batch: int, direction: str) -> Contest:
    """The whole projector, against itself with the authors' convolutions in the place of its kernels."""
    projector = SPProjector.from_config(options.config, device=options.device, dtype=dtype)
    return _contest(options, "projector", projector, partial(_authors_projector, projector), dtype, batch, direction)


class _Detail(nn.Module):
    def __init__(self, integrator: DetailFeatureIntegrator) -> None:
        super().__init__()
        self.kernel, self._apply_kernel = integrator.detail_kernel, integrator.detail_map

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self._apply_kernel(patches)


class _Attention(nn.Module):
    """The integrator without its detail map, on spatial tokens that are the map's first positions."""

    def __init__(self, integrator: DetailFeatureIntegrator) -> None:
        super().__init__()
        self.query_projector, self.key_projector = integrator.query_projector, integrator.key_projector
        self.value_projector, self._look_up = integrator.value_projector, integrator.look_up

    def forward(self, detail_map: torch.Tensor) -> torch.Tensor:
        return self._look_up(detail_map[:, :6], detail_map)[0]


class _AuthorsProjector(nn.Module):
    def __init__(self, projector: SPProjector, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.extractor = ConvExtractor(projector.extractor, memory_format)  # type: ignore[arg-type]
        self.detail = ConvDetail(projector.integrator, memory_format) if projector.integrator is not None else None
        self.attention = _Attention(projector.integrator) if projector.integrator is not None else None
        self.spatial_head, self.patch_head = projector.spatial_head, projector.patch_head

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        tokens = self.extractor(patches)
        if self.detail is not None and self.attention is not None:
            tokens = self.attention._look_up(tokens, self.detail(patches))[0]
        return torch.cat([self.spatial_head(tokens), self.patch_head(patches)], dim=1)


def _authors_projector(projector: SPProjector, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    return _AuthorsProjector(projector, memory_format)


def _integrator(options: Options, dtype: torch.dtype) -> DetailFeatureIntegrator | None:
    config = options.config
    if config.detail_kernel_size is None or config.detail_stride is None:
        return None
    return DetailFeatureIntegrator(
        config.vision_hidden_size, config.spatial_hidden_size, grid_size=config.grid_size,
        kernel_size=config.detail_kernel_size, stride=config.detail_stride, device=options.device, dtype=dtype,
    )  # fmt: skip


def _contest(
    options: Options,
    subject: str,
    module: nn.Module,
    authors: Callable[..., nn.Module],
    dtype: torch.dtype,
    batch: int,
    direction: str,
    positions: int = 1,
) -> Contest:
    features = options.features(batch, dtype)
    entries: dict[str, Callable[[], Entry]] = {
        name: partial(_entry, _with_backend(module, name), features, module, direction) for name in _backends(options.device)
    }

    def convolution(compiled: bool = False, memory_format: torch.memory_format = torch.contiguous_format) -> Entry:
        other = authors(memory_format)
        run = torch.compile(other, dynamic=False) if compiled else other
        return _entry(run, features, other, direction)

    entries[AUTHORS] = convolution
    # On a CPU the backward pass took 36 s a run channels last, and over eight minutes to compile: there they run forward only.
    if direction == PASSES[0] or options.device.type == "cuda":
        entries["Conv2d, channels last"] = partial(convolution, memory_format=torch.channels_last)
        if subject == "tokens, cropping":
            entries["Conv2d, torch.compile"] = partial(convolution, compiled=True)

    weights = [weight for weight in module.parameters() if weight.ndim == 2]
    num_bytes, num_flops = work(module, features, positions)
    factor = 3 if direction != PASSES[0] else 1  # backward reads the weights again and writes their gradients
    return Contest(
        "kernels", subject, _setting(batch, dtype, direction), entries, "naive", _tolerance(dtype), AUTHORS,
        num_bytes=factor * num_bytes, num_flops=factor * num_flops, weights=[weight.detach() for weight in weights],
        memory=sum(4 * weight.numel() * weight.element_size() for weight in weights) + 6 * features.nbytes,
    )  # fmt: skip


def work(module: nn.Module, features: torch.Tensor, positions: int = 1) -> tuple[int, int]:
    """The fewest bytes to move and the operations to do, forward, of modules whose weights meet `positions` windows an image."""
    num_bytes = sum(p.numel() * p.element_size() for p in module.parameters()) + features.nbytes
    if not isinstance(module, SPProjector):
        return num_bytes, 2 * features.shape[0] * positions * sum(p.numel() for p in module.parameters())
    projector = SPProjector.from_config(module.config, device="meta", dtype=features.dtype)
    return num_bytes, flops_of(projector, features.to("meta"))


def flops_of(module: nn.Module, features: torch.Tensor) -> int:
    """The operations of one forward pass, counted on shapes alone: both are on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    import spatial_tokens.ops.window_linear.flops  # noqa: F401 - registers the operators' counts

    module.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(features)
    return int(counter.get_total_flops())


def _backends(device: torch.device) -> Sequence[str]:
    return ("naive", "gemm", "triton") if device.type == "cuda" and TRITON is not None else ("naive", "gemm")


def _with_backend(module: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(features: torch.Tensor) -> torch.Tensor:
        with using(backend):
            result: torch.Tensor = module(features)
        return result

    return run


def _entry(function: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, owner: nn.Module, direction: str) -> Entry:
    """Forward alone, or with the gradients of the features and of every parameter."""
    if direction == PASSES[0]:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function(features)

        return Entry(forward)

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

    return Entry(both, lambda found: [*found[:2], *map(_as_linear, found[2:])])


def _as_linear(grad: torch.Tensor) -> torch.Tensor:
    """A convolution's gradient `(S, C, h, w)` in a Linear's layout; others as they are."""
    return grad.permute(0, 2, 3, 1).flatten(1) if grad.ndim == 4 else grad


def _setting(batch: int, dtype: torch.dtype, direction: str) -> Mapping[str, str | int]:
    return {"pass": direction, "dtype": str(dtype).removeprefix("torch."), "batch": batch}


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[str(dtype).removeprefix("torch.")]
