"""One small module of each kind, with the inputs that it takes."""

from typing import Any, NamedTuple

import pytest
import torch

from spatial_tokens import (
    DetailFeatureIntegrator,
    FactorizedFeatureExtractor,
    SpatialFeatureExtractor,
    SPProjector,
    SPProjectorConfig,
)
from spatial_tokens.modules import LinearHead, MLPHead
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor

GRID = (6, 8)
SIZES = (2, (4, 6), GRID)
PATCHES = (48, 4)


class Case(NamedTuple):
    build: Any
    shapes: tuple[tuple[int, int], ...] = (PATCHES,)
    options: dict[str, bool] = {}  # noqa: RUF012

    def inputs(self, batch=2, **kwargs):
        return [torch.randn(batch, *shape, **kwargs) for shape in self.shapes]

    def run(self, module, inputs):
        outputs = module(*inputs, **self.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def factorized(frequencies=2, **kwargs):
    return FactorizedFeatureExtractor(4, 6, grid_size=GRID, kernel_sizes=SIZES, frequencies=frequencies, rank=3, **kwargs)


def projector(detail, rank=None, frequencies=None, **kwargs):
    config = SPProjectorConfig(
        vision_hidden_size=4,
        spatial_hidden_size=6,
        text_hidden_size=5,
        grid_size=GRID,
        kernel_sizes=SIZES,
        detail_kernel_size=detail,
        rank=rank,
        frequencies=frequencies,
    )
    return SPProjector.from_config(config, **kwargs)


ATTENTION = {"return_attention": True}
CASES = {
    "cropping": Case(lambda **kw: SpatialFeatureExtractor(4, 6, grid_size=GRID, kernel_sizes=SIZES, **kw)),
    "pooling": Case(lambda **kw: SpatialFeatureExtractor(4, 6, grid_size=GRID, kernel_sizes=SIZES, variant="pooling", **kw)),
    "integrator": Case(
        lambda **kw: DetailFeatureIntegrator(4, 6, grid_size=GRID, kernel_size=(4, 2), **kw), ((3, 6), PATCHES), ATTENTION
    ),
    "factorized cropping": Case(lambda **kw: factorized(**kw)),
    "factorized pooling": Case(lambda **kw: factorized(variant="pooling", frequencies=(1, 3, 2), **kw)),
    "learned maps": Case(lambda **kw: factorized(spatial_basis="learned", **kw)),
    "factorized integrator": Case(
        lambda **kw: DetailFeatureIntegrator(4, 6, grid_size=GRID, kernel_size=(4, 2), rank=3, frequencies=2, **kw),
        ((3, 6), PATCHES),
        ATTENTION,
    ),
    "factorized projector": Case(lambda **kw: projector(4, rank=3, frequencies=2, **kw), options=ATTENTION),
    "mlp head": Case(lambda **kw: MLPHead(4, 5, **kw)),
    "linear head": Case(lambda **kw: LinearHead(4, 5, **kw)),
    "linear head without bias": Case(lambda **kw: LinearHead(4, 5, bias=False, **kw)),
    "projector": Case(lambda **kw: projector(4, **kw), options=ATTENTION),
    "projector, tokens alone": Case(lambda **kw: projector(4, **kw)),
    "projector without DFI": Case(lambda **kw: projector(None, **kw)),
    "sliding window": Case(lambda **kw: SlidingWindowExtractor(4, 6, grid_size=GRID, kernel_size=(3, 4), **kw)),
    "transformer": Case(
        lambda **kw: TransformerExtractor(4, grid_size=GRID, kernel_sizes=SIZES[:2], num_layers=1, num_heads=2, **kw).eval()
    ),
}
READERS = [name for name in CASES if "head" not in name]  # those that know their grid

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_reader = pytest.mark.parametrize("case", [CASES[name] for name in READERS], ids=READERS)
