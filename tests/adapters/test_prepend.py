"""Factorized kernels beside a codebase's own projector, whose grid is not the preset's."""

import pytest
import torch
from torch import nn

from spatial_tokens.adapters.fit_config import fitted
from spatial_tokens.adapters.prepend import PrependSpatialTokens
from tests.tolerances import assert_close


@pytest.mark.parametrize("grid", [(5, 7), (24, 24), (32, 32)])
def test_they_are_told_the_grid_of_the_host(grid):
    config = fitted(
        "factorized-cropping",
        {"spatial_hidden_size": 6},
        vision_hidden_size=16,
        text_hidden_size=12,
        grid_size=grid,
        patch_head=None,
    )
    assert (config.grid_size, config.kernel_sizes, config.rank) == ((24, 24), (4, 8, 12, 16, 20, 24), 2)
    both = PrependSpatialTokens.from_config(nn.Linear(16, 12), config, grid_size=grid)
    patches = torch.randn(2, grid[0] * grid[1], 16)
    tokens = both(patches)
    assert_close(tokens[:, :6], both.spatial_projector(patches, grid))
    assert torch.equal(tokens[:, 6:], both.projector(patches))


def test_a_grid_of_ones_own():
    config = fitted("factorized-cropping", {"grid_size": (32, 32)}, vision_hidden_size=16, text_hidden_size=12, patch_head=None)
    assert config.grid_size == (32, 32)
