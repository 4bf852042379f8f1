from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor
from tests import reference
from tests.modules.checks import (
    assert_equals_reference,
    batches,
    features,
    grids,
    kernels,
    scales,
    strides,
    variants,
    widths,
)
from tests.tolerances import FLOAT64


@given(data=st.data(), grid=grids, channels=widths, width=widths, batch=batches)
def test_sliding_windows_equal_a_convolution_each(data, grid, channels, width, batch):
    sizes = {"grid_size": grid, "kernel_size": data.draw(kernels(grid)), "stride": data.draw(st.none() | strides(grid))}
    patches = data.draw(features(batch, grid[0] * grid[1], channels))
    module = SlidingWindowExtractor(channels, width, **sizes, dtype=torch.float64)
    assert_equals_reference(module, partial(reference.sliding_window, **sizes), patches, tolerance=FLOAT64)
    assert module(patches).shape == (batch, module.num_spatial_tokens, width)


def test_sliding_windows_run_left_to_right_and_top_to_bottom():
    module = SlidingWindowExtractor(1, 1, grid_size=(4, 6), kernel_size=2)
    for kernel in module.kernels:
        torch.nn.init.constant_(kernel.weight, 1 / 4)
    corners = torch.tensor([0, 2, 4, 12, 14, 16.0])  # the first patch of each window
    assert module(torch.arange(24.0).view(1, 24, 1)).flatten().tolist() == (corners + 3.5).tolist()


@settings(max_examples=40)
@given(
    data=st.data(), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), variant=variants, batch=batches,
    heads=st.sampled_from([1, 2, 4]), layers=st.integers(1, 2), feedforward=st.integers(1, 9),
)  # fmt: skip
def test_transformers_equal_their_equations(data, grid, variant, batch, heads, layers, feedforward):
    sizes = {"grid_size": grid, "kernel_sizes": data.draw(scales(grid, variant)), "variant": variant}
    depth = {"num_layers": layers, "num_heads": heads}
    patches = data.draw(features(batch, grid[0] * grid[1], 8))
    module = TransformerExtractor(8, **sizes, **depth, feedforward_size=feedforward, dtype=torch.float64).eval()
    expected = partial(reference.transformer, **sizes, **depth)
    assert_equals_reference(module, expected, patches, tolerance=FLOAT64)
    with torch.no_grad():  # torch may take another path there
        torch.testing.assert_close(module(patches), expected(dict(module.named_parameters()), patches))


def test_the_transformer_of_the_paper_in_float32():
    sizes = {"grid_size": 8, "kernel_sizes": (4, 8)}
    module = TransformerExtractor(32, **sizes).eval()
    assert not any(query.any() for query in module.queries)
    for query in module.queries:
        torch.nn.init.normal_(query)
    assert_equals_reference(module, partial(reference.transformer, **sizes), torch.randn(2, 64, 32))


def test_dropout_is_for_training_alone():
    module, patches = TransformerExtractor(8, grid_size=4, kernel_sizes=(2, 4)), torch.randn(2, 16, 8)
    assert not torch.equal(module(patches), module(patches))
    module.eval()
    assert torch.equal(module(patches), module(patches))


def test_no_two_layers_start_alike():
    module = TransformerExtractor(8, grid_size=4, kernel_sizes=(2, 4), feedforward_size=12)
    for _ in range(2):
        matrices = [p for p in module.transformers.parameters() if p.ndim > 1]
        assert len(matrices) == 2 * 4 * (4 + 6)  # scales, layers, matrices of an encoder's and a decoder's
        assert len({matrix.sum().item() for matrix in matrices}) == len(matrices)
        for matrix in matrices:
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.8 * bound < matrix.abs().max() <= bound
        module.reset_parameters()


@pytest.mark.filterwarnings("error")  # as of torch's transformers about options that do not go together
def test_parameters_of_the_paper_size():
    module = TransformerExtractor(1024, grid_size=24, kernel_sizes=(4, 8, 12, 16, 20, 24), device="meta")
    attention, feedforward, norm = 4 * 1024**2, 2 * 1024**2, 1024
    encoder = 4 * (attention + feedforward + 2 * norm) + norm
    decoder = 4 * (2 * attention + feedforward + 3 * norm) + norm
    assert sum(p.numel() for p in module.parameters()) == 6 * (encoder + decoder + 1024) == 402_794_496
    assert not [name for name, _ in module.named_parameters() if "bias" in name]


@pytest.mark.parametrize(
    "module",
    [
        SlidingWindowExtractor(4, 5, grid_size=(4, 6), kernel_size=(4, 2)),
        TransformerExtractor(4, grid_size=(4, 6), kernel_sizes=((4, 2),), num_layers=1, num_heads=2),
    ],
    ids=["sliding window", "transformer"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_patch_shows_in_the_windows_that_contain_it(module, bad):
    patches = torch.randn(2, 4, 6, 4)
    patches[0, 1, 3] = bad
    tokens = module.eval()(patches.flatten(1, 2))
    touched = [False, True, False] if module.num_spatial_tokens == 3 else [True]
    assert tokens[0].isfinite().any(-1).tolist() == tokens[0].isfinite().all(-1).tolist() == [not t for t in touched]
    assert tokens[1].isfinite().all()
