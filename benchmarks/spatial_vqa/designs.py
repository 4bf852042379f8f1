"""The designs that are compared: what is added to LLaVA's MLP, or put in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.spatial_vqa.alternatives import PlaceEmbedding, PooledBins
from benchmarks.spatial_vqa.encoder import HIDDEN_SIZE as VISION
from benchmarks.spatial_vqa.layout import GRID
from spatial_tokens import SPProjector, SPProjectorConfig
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.modules import LinearHead, MLPHead
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor
from spatial_tokens.training import Parts

SPATIAL = VISION // 2  # the paper's ratio: 512 of 1024
KERNELS = (2, 4, 6, 8, 10, 12)  # half the paper's 4, 8, ..., 24, on half its grid
DETAIL_KERNELS = (2, 4, 6, 8)  # half the paper's; with stride 1 they give its maps of 11 x 11, 9 x 9, 7 x 7 and 5 x 5


class LearnedTokens(nn.Module):
    """In an extractor's place: tokens that are learned, the same for every picture."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features `(B, N, C)` to `(B, count, size)`, without a look at them."""
        return self.tokens.expand(len(patches), -1, -1)


@dataclass(frozen=True)
class Design:
    """A row of the comparison.

    Args:
        name: Its name.
        compares: What it is there for; the paper's table.
        fields: Of an SPProjectorConfig, in place of cropping without a DetailFeatureIntegrator; None: no spatial tokens.
        extractor: Makes what takes the place of the SpatialFeatureExtractor.
        head: Makes the spatial head that goes with it, of the language model's width.
        mlp_widths: Channels between the layers of the patches' MLP.
        scale: Of the projector's learning rates. Each main design has tried 1 and 0.25 on three seeds, and has what is better in
            their mean on validation.
        blind: Whether every picture is blanked.
        places: Whether an embedding of its place is added to each patch's token.
    """

    name: str
    compares: str
    fields: dict[str, Any] | None = None
    extractor: Callable[[], nn.Module] | None = None
    head: Callable[[int], nn.Module] = lambda width: MLPHead(SPATIAL, width)
    mlp_widths: tuple[int, ...] = (4 * VISION,)
    scale: float = 1.0
    blind: bool = False
    places: bool = False


def factors(frequencies: int, rank: int, spatial_basis: str = "cosine") -> dict[str, Any]:
    """Of a config: cosines of each side, as many as the smallest kernels have patches for, and channels that kernels see."""
    return {"frequencies": tuple(min(frequencies, side) for side in KERNELS), "rank": rank, "spatial_basis": spatial_basis}


def _factorized(variant: str, frequencies: int, rank: int, spatial_basis: str = "cosine", **fields: Any) -> Design:
    learned = ", learned maps" if spatial_basis == "learned" else ""
    detail = " + DFI 5 x 5" if fields else ""
    name = f"factorized {variant} {frequencies} x {frequencies}, rank {rank}{learned}{detail}"
    return Design(name, "dense or factorized", {"variant": variant, **factors(frequencies, rank, spatial_basis), **fields})


def _pooled_bins(bins: int, rank: int) -> Design:
    extractor = partial(PooledBins, VISION, SPATIAL, grid_size=GRID, kernel_sizes=KERNELS, bins=bins, rank=rank)
    return Design(f"crops pooled to {bins} x {bins} bins, rank {rank}", "is it the cosines?", {}, extractor)


def _transformers(variant: str) -> Callable[[], nn.Module]:
    return lambda: TransformerExtractor(VISION, grid_size=GRID, kernel_sizes=KERNELS, variant=variant, feedforward_size=VISION)


def _transformer_head(width: int) -> nn.Module:
    return LinearHead(VISION, width, bias=False)


def _sliding_windows() -> nn.Module:
    return SlidingWindowExtractor(VISION, SPATIAL, grid_size=GRID, kernel_size=(GRID // 2, GRID // 3))


CROPPING = Design("SFE cropping", "table 3 (C), 4, 5, 6", {})
POOLING = Design("SFE pooling", "table 3 (C), 6", {"variant": "pooling"})
MLP = Design("MLP", "the baseline, LLaVA-1.5's")
DEEP = Design("MLP of 3 layers, as many parameters", "is it size alone?", mlp_widths=(1647, 1647), scale=0.25)
LEARNED = Design("MLP + 6 learned tokens", "is it length alone?", {}, lambda: LearnedTokens(6, SPATIAL))
MAIN = (MLP, DEEP, LEARNED, CROPPING, POOLING)
DETAIL = tuple(
    Design(f"SFE {variant} + DFI {13 - kernel} x {13 - kernel}", "table 6", {"variant": variant, "detail_kernel_size": kernel})
    for kernel in reversed(DETAIL_KERNELS)
    for variant in ("cropping", "pooling")
)
WHOLE_MAP = Design("1 token", "table 4", {"kernel_sizes": (12,)})
SLIDING = Design("sliding window, 6 tokens", "table 5", {}, _sliding_windows)
TOKENS = (
    WHOLE_MAP,
    Design("3 tokens, cropping", "table 4", {"kernel_sizes": (4, 8, 12)}),
    Design("3 tokens, pooling", "table 4", {"variant": "pooling", "kernel_sizes": (4, 8, 12)}),
    Design("12 tokens, pooling", "table 4", {"variant": "pooling", "kernel_sizes": tuple(range(1, 13))}),
    SLIDING,
)
WITHOUT_A_PYRAMID = (WHOLE_MAP, SLIDING)
TRANSFORMERS = (
    Design("transformer blocks, cropping", "table 3 (T)", {}, _transformers("cropping"), _transformer_head),
    Design("transformer blocks, pooling", "table 3 (T)", {}, _transformers("pooling"), _transformer_head),
)
BLIND = Design("MLP, blind", "what can be told without a look", blind=True)
FACTORIZED = _factorized("cropping", 3, 16)  # the paper's ratio: 128 of 1024 channels
FACTORIZED_POOLING = _factorized("pooling", 3, 16)
WIDER = _factorized("cropping", 3, 32)
SIZES = (
    *(_factorized("cropping", frequencies, rank) for frequencies, rank in ((2, 8), (3, 8), (5, 16), (4, 32), (3, 128), (5, 64))),
    _factorized("cropping", 3, 16, "learned"),
)
FACTORIZED_DETAIL = _factorized("cropping", 3, 16, detail_kernel_size=8)
BINS = _pooled_bins(3, 16)
PLACES = Design("MLP + an embedding of each place", "does it take spatial tokens?", places=True)
FACTORS = (FACTORIZED, FACTORIZED_POOLING, WIDER, *SIZES, FACTORIZED_DETAIL, BINS, PLACES)
DESIGNS = {each.name: each for each in (*MAIN, BLIND, *DETAIL, *TOKENS, *TRANSFORMERS, *FACTORS)}


def install(design: Design, model: Any) -> Parts:
    """Gives a LLaVA a design's parts.

    Returns:
        The modules that train as its projector. Its kernels are what makes spatial tokens of patches, or knows their places.
    """
    mlp, width = model.model.multi_modal_projector, model.config.text_config.hidden_size
    first, *between, last = (nn.Linear(*sizes) for sizes in pairwise((VISION, *design.mlp_widths, width)))
    places = [PlaceEmbedding(GRID * GRID, width)] if design.places else []
    layers = (*chain.from_iterable((each, nn.GELU()) for each in between), last, *places)
    mlp.linear_1, mlp.linear_2 = first, nn.Sequential(*layers)
    mlp.to(model.device)
    if design.fields is None:
        return Parts([mlp], kernels=places)
    attach(model, None, _config(design, width))
    if design.extractor is not None:  # as many tokens as the config says, made in another way
        model.spatial_tokens = SPProjector(design.extractor(), None, design.head(width), None).to(model.device)
    spatial = model.spatial_tokens
    return Parts([mlp, spatial], kernels=_kernels(spatial.extractor, spatial.integrator))


def count_kernel_parameters(design: Design) -> int:
    """Parameters of what makes spatial tokens of patches; 0 where there are none."""
    if design.fields is None:
        return 0
    with torch.device("meta"):
        projector = SPProjector.from_config(_config(design, 1))
        extractor = projector.extractor if design.extractor is None else design.extractor()
    return sum(each.numel() for part in _kernels(extractor, projector.integrator) for each in part.parameters())


def _config(design: Design, width: int) -> SPProjectorConfig:
    fields = {"kernel_sizes": KERNELS, "detail_kernel_size": None, **(design.fields or {})}
    stride = {"detail_stride": 1} if fields["detail_kernel_size"] else {}
    return SPProjectorConfig(
        vision_hidden_size=VISION, text_hidden_size=width, grid_size=(GRID, GRID), spatial_hidden_size=SPATIAL, **fields, **stride
    )


def _kernels(extractor: nn.Module, integrator: Any) -> list[nn.Module]:
    return [extractor] if integrator is None else [extractor, integrator.detail_kernel]
