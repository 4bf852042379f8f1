from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import DetailFeatureIntegrator
from tests import reference
from tests.modules.checks import assert_equals_reference, batches, features, grids, kernels, strides, widths
from tests.tolerances import FLOAT64

normal_widths = st.integers(3, 6)  # a LayerNorm of one or two channels has no gradient but rounding


@given(data=st.data(), grid=grids, channels=widths, width=normal_widths, batch=batches, count=st.integers(1, 4))
def test_it_equals_a_strided_convolution_and_attention_by_hand(data, grid, channels, width, batch, count):
    size = data.draw(kernels(grid))
    tokens = data.draw(features(batch, count, width))
    patches = data.draw(features(batch, grid[0] * grid[1], channels))
    sizes = {"grid_size": grid, "kernel_size": size, "stride": data.draw(strides(grid))}
    module = DetailFeatureIntegrator(channels, width, **sizes, dtype=torch.float64)
    assert_equals_reference(
        module, partial(reference.integrator, **sizes), tokens, patches, tolerance=FLOAT64, return_attention=True
    )

    out, attention = module(tokens, patches, return_attention=True)
    rows, columns = module.detail_grid_size
    assert out.shape == (batch, count, module.out_features)
    assert attention.shape == (batch, count, rows * columns)
    torch.testing.assert_close(attention.sum(-1), torch.ones(batch, count, dtype=torch.float64))
    assert torch.equal(module(tokens, patches), out)


@pytest.mark.parametrize("width", [1, 2])
def test_its_output_is_exact_for_the_fewest_channels(width):
    sizes = {"grid_size": 4, "kernel_size": 2, "stride": 2}
    module = DetailFeatureIntegrator(1, width, **sizes, dtype=torch.float64)
    inputs = torch.randn(2, 3, width).double(), torch.randn(2, 16, 1).double()
    given, expected = (
        module(*inputs, return_attention=True),
        reference.integrator(dict(module.named_parameters()), *inputs, **sizes),
    )
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("kernel_size", "detail"), [(4, 11), (8, 9), (12, 7), (16, 5)])
def test_the_detail_maps_of_table_6(kernel_size, detail):
    module = DetailFeatureIntegrator(2, 3, grid_size=24, kernel_size=kernel_size, device="meta")
    assert module.detail_grid_size == (detail, detail)


def test_the_spatial_tokens_pass_unchanged_in_the_first_half():
    module = DetailFeatureIntegrator(4, 6, grid_size=6, kernel_size=2)
    tokens = torch.randn(2, 3, 6)
    assert torch.equal(module(tokens, torch.randn(2, 36, 4))[..., :6], tokens)


def test_scores_beyond_the_range_of_float16_before_their_scaling_are_finite():
    module = DetailFeatureIntegrator(4, 16, grid_size=4, kernel_size=2, dtype=torch.float16)
    with torch.no_grad():
        for projector in (module.query_projector, module.key_projector):
            projector[1].weight.zero_()
            projector[1].bias.fill_(100)  # 16 * 100 * 100 is over 65504, a quarter of it is not
    out, attention = module(torch.randn(1, 2, 16).half(), torch.randn(1, 16, 4).half(), return_attention=True)
    assert out.isfinite().all()
    assert torch.equal(attention, torch.full_like(attention, 1 / 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_patch_shows_in_all_that_its_image_looked_up_and_in_no_other_image(bad):
    module = DetailFeatureIntegrator(4, 6, grid_size=4, kernel_size=2)
    tokens, patches = torch.randn(2, 3, 6), torch.randn(2, 16, 4)
    patches[0, 5] = bad
    out, attention = module(tokens, patches, return_attention=True)
    assert torch.equal(out[..., :6], tokens)
    assert attention[0].isnan().all()
    assert out[0, :, 6:].isnan().all()
    assert out[1].isfinite().all()
    assert attention[1].isfinite().all()


def test_a_patch_beyond_the_last_whole_window_is_not_seen():
    module = DetailFeatureIntegrator(4, 6, grid_size=5, kernel_size=2, stride=2)
    patches = torch.randn(1, 25, 4)
    patches[0, 24] = float("nan")
    assert module(torch.randn(1, 3, 6), patches).isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),  # as many parameters as norm and Linear
        lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.Identity()),
        lambda: torch.nn.Linear(4, 4),
    ],
)
def test_projectors_of_the_users_own(make):
    module = DetailFeatureIntegrator(3, 4, grid_size=4, kernel_size=2, stride=2)
    module.query_projector, module.key_projector = make(), make()
    tokens, patches = torch.randn(2, 3, 4), torch.randn(2, 16, 3)
    detail = module.detail_map(patches)
    scores = module.query_projector(tokens) @ module.key_projector(detail).mT / 4**0.5
    expected = torch.cat([tokens, scores.softmax(-1) @ module.value_projector(detail)], dim=-1)
    torch.testing.assert_close(module(tokens, patches), expected)
