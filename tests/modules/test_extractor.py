from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import SpatialFeatureExtractor
from tests import reference
from tests.modules.checks import assert_equals_reference, batches, features, grids, scales, variants, widths
from tests.tolerances import FLOAT64


@given(data=st.data(), grid=grids, variant=variants, channels=widths, width=widths, batch=batches)
def test_it_equals_convolutions_of_any_sizes(data, grid, variant, channels, width, batch):
    sizes = data.draw(scales(grid, variant))
    patches = data.draw(features(batch, grid[0] * grid[1], channels))
    module = SpatialFeatureExtractor(channels, width, grid_size=grid, kernel_sizes=sizes, variant=variant, dtype=torch.float64)
    expected = partial(reference.extractor, grid_size=grid, kernel_sizes=sizes, variant=variant)
    assert_equals_reference(module, expected, patches, tolerance=FLOAT64)
    assert module(patches).shape == (batch, module.num_spatial_tokens, width) == (batch, len(sizes), width)


def test_an_integer_is_a_square_grid():
    assert SpatialFeatureExtractor(3, 4, grid_size=6, kernel_sizes=[6]).grid_size == (6, 6)


def test_the_kernels_start_within_the_bound_of_a_convolution():
    module = SpatialFeatureExtractor(8, 64, grid_size=8, kernel_sizes=(2, 4, 8))
    for kernel, size in zip(module.kernels, module.kernel_sizes, strict=True):
        bound = (8 * size * size) ** -0.5
        assert 0.98 * bound < kernel.weight.abs().max() <= bound
        assert kernel.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("variant", "row", "column", "touched"),
    [
        ("cropping", 0, 5, [False, False, True]),  # at the border: only the window of the whole grid has it
        ("cropping", 1, 3, [False, True, True]),
        ("cropping", 2, 3, [True, True, True]),
        ("pooling", 0, 5, [True, True, True]),  # every scale has the whole grid
    ],
)
def test_a_bad_patch_shows_in_the_windows_that_contain_it(bad, variant, row, column, touched):
    module = SpatialFeatureExtractor(4, 5, grid_size=6, kernel_sizes=(2, 4, 6), variant=variant)
    patches = torch.randn(2, 6, 6, 4)
    patches[0, row, column] = bad
    tokens = module(patches.flatten(1, 2))
    assert tokens[0].isfinite().any(-1).tolist() == [not t for t in touched]
    assert tokens[0].isfinite().all(-1).tolist() == [not t for t in touched]
    assert tokens[1].isfinite().all()
