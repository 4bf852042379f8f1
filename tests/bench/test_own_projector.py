"""A projector of the caller's own, measured."""

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError
from spatial_tokens.bench.own_projector import bench_projector

PATCHES = torch.randn(2, 16, 8)


def test_its_row_stands_beside_the_mlps():
    own = nn.Linear(8, 12).train()
    rows = bench_projector(own, PATCHES, name="mine", seconds=0.01)
    assert list(rows) == ["LLaVA MLP", "mine"]
    assert rows["mine"].values["parameters"] == 8 * 12 + 12
    assert rows["LLaVA MLP"].values["parameters"] == 8 * 12 + 12 + 12 * 12 + 12
    assert rows["mine"].values["tokens"] == 16
    ratio = rows["LLaVA MLP"].values["ms"] / rows["mine"].values["ms"]
    assert rows["mine"].values["ratio"] == pytest.approx(ratio)
    assert dict(rows["mine"].setting) == {"dtype": "float32", "batch": 2}
    assert own.training, "its mode is as it was"


def test_what_cannot_be_measured():
    with pytest.raises(SpatialTokensError, match=r"patches must be features \(B, N, C\) of float32 or"):
        bench_projector(nn.Linear(8, 12), PATCHES[0])
    with pytest.raises(SpatialTokensError, match=r"patches must be features \(B, N, C\) of float32 or"):
        bench_projector(nn.Linear(8, 12).double(), PATCHES.double())
    with pytest.raises(SpatialTokensError, match="'LLaVA MLP' is the baseline's name"):
        bench_projector(nn.Linear(8, 12), PATCHES, name="LLaVA MLP")
