"""Factorized kernels: on their own grid, on any other, and what they promise beside the dense ones."""

import copy
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from spatial_tokens import (
    DetailFeatureIntegrator,
    FactorizedFeatureExtractor,
    SpatialFeatureExtractor,
    SpatialTokensError,
    SPProjector,
    SPProjectorConfig,
)
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor
from spatial_tokens.ops import window_basis
from tests import reference
from tests.modules.cases import factorized
from tests.modules.checks import assert_all_close, grids, outputs_and_gradients, scales, sides, variants, widths
from tests.tolerances import FLOAT64, assert_close, rounding

BASES = st.sampled_from(["cosine", "learned"])
PAPER = {"grid_size": 24, "kernel_sizes": (4, 8, 12, 16, 20, 24)}


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packed(grid_sizes, channels, seed=0):
    return randn(sum(h * w for h, w in grid_sizes), channels, seed=seed)


def windows_of(module):
    height, width = module.grid_size
    sizes = [reference.pair(size) for size in module.kernel_sizes]
    if module.variant == "pooling":
        return {"windows": [(0, 0, height, width)] * len(sizes), "bins": sizes}
    return {"windows": [((height - h) // 2, (width - w) // 2, h, w) for h, w in sizes]}


def assert_equals_equation(module, images, told, geometry, tolerance=FLOAT64):
    """Tokens and gradients of packed images, against the equation."""
    exact = {name: each.detach().double().requires_grad_() for name, each in module.named_parameters()}
    lengths = [h * w for h, w in told]
    given = outputs_and_gradients(lambda x: module(x, told), [images], dict(module.named_parameters()))
    expected = outputs_and_gradients(
        lambda x: reference.factorized(exact, x.split(lengths), told, grid_size=module.grid_size, **geometry),
        [images.double()],
        exact,
    )
    assert_all_close(given, expected, tolerance)


@settings(max_examples=60)
@given(data=st.data(), grid=grids, variant=variants, basis=BASES, channels=widths, width=widths)
def test_it_equals_the_equation_on_any_grids(data, grid, variant, basis, channels, width):
    sizes = data.draw(scales(grid, variant))
    most = [min(reference.pair(size)) for size in sizes]
    frequencies = [data.draw(st.integers(1, min(3, each))) for each in most]
    rank = data.draw(st.integers(1, channels))
    module = FactorizedFeatureExtractor(
        channels, width, grid_size=grid, kernel_sizes=sizes, variant=variant, frequencies=frequencies, rank=rank,
        spatial_basis=basis, dtype=torch.float64,
    )  # fmt: skip
    told = [grid, *data.draw(st.lists(st.tuples(sides, sides), max_size=3))]
    images = packed(told, channels)
    assert_equals_equation(module.kernels, images, told, {**windows_of(module), "frequencies": frequencies})
    batch = images[: grid[0] * grid[1]][None]
    assert_close(module(batch), module(images, told)[:1], FLOAT64)
    assert_close(module(batch, grid), module(batch), 0)


@settings(max_examples=30)
@given(data=st.data(), grid=grids, basis=BASES, channels=widths, width=widths)
def test_the_detail_map_equals_the_equation_on_any_grids(data, grid, basis, channels, width):
    kernel = [data.draw(st.integers(1, side)) for side in grid]
    stride = [data.draw(st.integers(1, side)) for side in grid]
    frequencies = data.draw(st.integers(1, min(3, *kernel)))
    module = DetailFeatureIntegrator(
        channels, width, grid_size=grid, kernel_size=kernel, stride=stride, rank=data.draw(st.integers(1, channels)),
        frequencies=frequencies, spatial_basis=basis, dtype=torch.float64,
    )  # fmt: skip
    windows = [
        (top, left, *kernel)
        for top in range(0, grid[0] - kernel[0] + 1, stride[0])
        for left in range(0, grid[1] - kernel[1] + 1, stride[1])
    ]
    told = [grid, *data.draw(st.lists(st.tuples(sides, sides), max_size=2))]
    kernels = module.detail_kernel
    exact = {name: each.detach() for name, each in kernels.named_parameters()}
    if basis == "learned":
        exact |= {f"maps.{i}": exact["maps.0"] for i in range(len(windows))}
    images = packed(told, channels)
    expected = reference.factorized(
        exact, images.split([h * w for h, w in told]), told, grid_size=grid, windows=windows,
        frequencies=[frequencies] * len(windows),
    )  # fmt: skip
    assert_close(module.detail_map(images, told), expected, FLOAT64)
    tokens, attention = module(randn(len(told), 2, width), images, told, return_attention=True)
    assert tokens.shape == (len(told), 2, 2 * width)
    assert attention.shape == (len(told), 2, len(windows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_three_grids_in_one_call_at_the_papers_geometry(variant, dtype):
    told = [(24, 24), (17, 31), (64, 64)]
    module = FactorizedFeatureExtractor(48, 16, **PAPER, variant=variant, rank=8, dtype=dtype)
    images = packed(told, 48).to(dtype)
    exact = {name: each.detach().double() for name, each in module.kernels.named_parameters()}
    expected = reference.factorized(
        exact, images.double().split([h * w for h, w in told]), told, grid_size=(24, 24), frequencies=[3] * 6, **windows_of(module)
    )
    assert_close(module(images, told), expected, 1e-5 if dtype == torch.float32 else rounding(dtype, 8))


@pytest.mark.parametrize("basis", ["cosine", "learned"])
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("times", [(2, 2), (3, 1), (1, 5)])
def test_a_map_of_repeated_patches_gives_the_same_tokens(basis, variant, times):
    module = FactorizedFeatureExtractor(
        6, 5, grid_size=(8, 10), kernel_sizes=(4, (6, 8), (8, 10)), variant=variant, frequencies=3, rank=4, spatial_basis=basis,
        dtype=torch.float64,
    )  # fmt: skip
    images = randn(2, 7, 11, 6)  # a grid on which no window ends between patches
    larger = images.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2)
    expected = module(images.flatten(1, 2), (7, 11))
    assert_close(module(larger.flatten(1, 2), (7 * times[0], 11 * times[1])), expected, 1e-12)


def waves(height, width, channels):
    """A smooth picture, of up to two waves a side, sampled at the middle of each patch: `(1, N, C)`."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    turns = randn(channels, 3, seed=3).tanh().float() * 2 * math.pi
    planes = [torch.sin(2 * a * y + 2 * b * x + c) for a, b, c in turns]
    return torch.stack(planes, -1).flatten(0, 1)[None].double()


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_a_smooth_picture_gives_nearly_the_same_tokens_at_every_resolution(variant):
    module = FactorizedFeatureExtractor(16, 32, **PAPER, variant=variant, rank=16, dtype=torch.float64)
    fine = module(waves(192, 192, 16), (192, 192))

    def error(side):
        return ((module(waves(side, side, 16), (side, side)) - fine).norm() / fine.norm()).item()

    assert error(12) < 0.045
    assert error(24) < 0.011
    assert error(48) < 0.003
    assert error(12) > 2 * error(24) > 4 * error(48) > 0


@pytest.mark.parametrize("alike", [(), (1,), (2,), (1, 2)], ids=["patches differ", "columns", "rows", "all patches alike"])
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_tokens_start_with_the_variance_of_dense_kernels(variant, alike):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(64, *(1 if side in alike else 24 for side in (1, 2)), 32, generator=generator)
    patches = patches.expand(-1, 24, 24, -1).flatten(1, 2)
    sizes = PAPER["kernel_sizes"] if variant == "cropping" else (4, 8, 12, 24)  # bins that overlap are not independent
    shape = {"grid_size": 24, "kernel_sizes": sizes, "variant": variant}
    spread = [
        made(patches).std((0, 2))
        for made in (SpatialFeatureExtractor(32, 128, **shape), FactorizedFeatureExtractor(32, 128, **shape, rank=16))
    ]
    torch.testing.assert_close(*spread, rtol=0.15, atol=0)


@pytest.mark.parametrize("basis", ["cosine", "learned"])
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_the_dense_kernels_are_these(variant, basis):
    module = FactorizedFeatureExtractor(
        8, 6, grid_size=(9, 12), kernel_sizes=((3, 4), (5, 8), (9, 12)), variant=variant, frequencies=(2, 3, 3), rank=5,
        spatial_basis=basis, dtype=torch.float64,
    )  # fmt: skip
    dense, patches = module.to_dense(), randn(2, 108, 8)
    assert type(dense) is SpatialFeatureExtractor
    assert (dense.grid_size, dense.kernel_sizes, dense.variant) == (module.grid_size, module.kernel_sizes, variant)
    assert_close(dense(patches), module(patches), 1e-12)
    assert all(each.requires_grad and each.is_leaf for each in dense.parameters())


@pytest.mark.parametrize("basis", ["cosine", "learned"])
@pytest.mark.parametrize("detail", [(3, 4), None])
def test_the_dense_projector_is_this(basis, detail):
    config = SPProjectorConfig(
        vision_hidden_size=8, text_hidden_size=10, grid_size=(6, 8), kernel_sizes=((2, 4), (6, 8)), spatial_hidden_size=6,
        detail_kernel_size=detail, rank=5, frequencies=2, spatial_basis=basis,
    )  # fmt: skip
    projector, patches = SPProjector.from_config(config, dtype=torch.float64).eval(), randn(2, 48, 8)
    for name, values in projector.named_parameters():
        if ".maps." in name:
            torch.nn.init.normal_(values)
    dense = projector.to_dense()
    assert dense.config == replace(config, rank=None, frequencies=None, spatial_basis="cosine")
    assert_close(dense(patches), projector(patches), 1e-12)
    assert not dense.training
    assert all(each.requires_grad and each.is_leaf for each in dense.parameters())
    own = {each.data_ptr() for each in projector.parameters()}
    assert not own & {each.data_ptr() for each in dense.parameters()}
    again = dense.to_dense()
    assert_close(again(patches), dense(patches), 0)
    assert again.spatial_head.fc1.weight is not dense.spatial_head.fc1.weight


def test_smaller_pooled_scales_are_nearly_linear_in_the_largest():
    extractor = FactorizedFeatureExtractor(1, 1, rank=1, variant="pooling", **PAPER).kernels
    *smaller, largest = (window_basis.weights(basis, extractor.grid_size, extractor.grid_size) for basis in extractor.bases)
    span = torch.linalg.qr(largest.T)[0]
    shares = [((maps @ span).square().sum() / maps.square().sum()).item() for maps in smaller]
    assert [round(share, 2) for share in shares] == [0.85, 0.96, 0.99, 0.79, 0.86]  # docs/modules.md


def test_dense_kernels_of_sixteen_bits_are_rounded_once():
    module = factorized(dtype=torch.bfloat16)
    exact = copy.deepcopy(module).double().to_dense()
    for own, expected in zip(module.to_dense().kernels, exact.kernels, strict=True):
        assert_close(own.weight, expected.weight, rounding(torch.bfloat16, 1))


def test_wrapped_factors_have_no_dense_kernels():
    config = SPProjectorConfig(
        vision_hidden_size=4, text_hidden_size=6, grid_size=(6, 8), kernel_sizes=((6, 8),), detail_kernel_size=None, rank=2
    )
    projector = SPProjector.from_config(config)
    projector.extractor.kernels.cores[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SpatialTokensError, match="a factor is wrapped, quantized or sharded; merge, unload or gather it first"):
        projector.to_dense()


def test_gradients_of_gradients():
    module = factorized(spatial_basis="learned", dtype=torch.float64)
    patches = randn(1, 48, 4).requires_grad_()
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (patches, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (patches, *parameters))


def test_one_compiled_program_for_all_grids():
    torch._dynamo.reset()
    module, counter = factorized(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for grid in ((6, 8), (5, 7), (12, 9), (30, 4)):
        patches = torch.randn(2, grid[0] * grid[1], 4)
        assert_close(compiled(patches, grid), module(patches, grid))
    assert counter.frame_count == 1
    for told in ([(6, 8), (5, 7)], [(4, 9), (12, 3)]):
        images = packed(told, 4).float()
        assert_close(compiled(images, told), module(images, told))
    assert counter.frame_count == 2


def test_weights_that_inference_made_serve_training():
    module = FactorizedFeatureExtractor(3, 2, grid_size=(7, 5), kernel_sizes=((3, 3), (7, 5)), rank=2)
    patches = torch.randn(1, 35, 3, requires_grad=True)
    with torch.inference_mode():
        expected = module(patches)
    tokens = module(patches)
    tokens.sum().backward()
    assert_close(tokens, expected, 0)
    assert patches.grad.any()


def test_no_images_among_several_grids():
    module = factorized()
    images = torch.zeros(0, 4, requires_grad=True)
    tokens = module(images, [])
    tokens.sum().backward()
    assert tokens.shape == (0, 3, 6)
    assert images.grad.shape == images.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_patch_shows_in_the_tokens_of_its_picture(bad):
    patches = torch.randn(2, 48, 4)
    patches[0, 0] = bad  # in the corner
    tokens = factorized()(patches)
    assert not tokens[0].isfinite().any()
    assert tokens[1].isfinite().all()


@pytest.mark.parametrize("patch_head", ["mlp", None])
def test_a_projector_reads_several_grids_at_once(patch_head):
    config = SPProjectorConfig(
        vision_hidden_size=4, text_hidden_size=5, grid_size=(6, 8), kernel_sizes=(2, (6, 8)), spatial_hidden_size=3,
        detail_kernel_size=4, rank=2, frequencies=2, patch_head=patch_head,
    )  # fmt: skip
    projector, told = SPProjector.from_config(config, dtype=torch.float64), [(6, 8), (3, 5), (6, 8)]
    images = packed(told, 4)
    tokens, attention = projector(images, told, return_attention=True)
    alone = [
        projector(each[None], grid, return_attention=True) for each, grid in zip(images.split([48, 15, 48]), told, strict=True)
    ]
    expected = [each for each, _ in alone]
    assert_close(tokens, torch.cat(expected) if patch_head is None else torch.cat(expected, dim=1)[0], FLOAT64)
    assert_close(attention, torch.cat([each for _, each in alone]), FLOAT64)
    assert attention.shape == (3, 2, 6)
    same = [(6, 8)] * 2
    assert_close(projector(randn(2, 48, 4), same), projector(randn(2, 48, 4)), FLOAT64)


def refused(message):
    return pytest.raises(SpatialTokensError, match=re.escape(message))


@pytest.mark.parametrize(
    ("shape", "told", "message"),
    [
        ((48, 4), None, "patch features must have shape (B, N, C), got (48, 4); images one after another, (sum of N, C), need the"),
        ((48, 4), (6, 8), "the grid of each: grid_sizes=[(height, width), ...], got (6, 8)"),
        ((2, 35, 4), None, "got 35 positions for a grid of 6 x 8 = 48 patches; resize the picture or build the module with its"),
        ((2, 35, 4), (6, 8), "got 35 patches, but grid_sizes=(6, 8) has 6 x 8 = 48; give the grid that the patches were made with"),
        ((2, 35, 4), (7, 0), "grid_sizes must be a positive integer or a (height, width) pair of them, got (7, 0)"),
        ((2, 35, 4), "7x5", "grid_sizes must be a positive integer or a (height, width) pair of them, got '7x5'"),
        ((35, 4), [(7, 6)], "patch features (35, 4) are not those of 1 images of [42] patches, as grid_sizes tell; give the grid"),
        ((2, 35, 4), [(7, 5)], "patch features (2, 35, 4) are not those of 1 images of [35] patches"),
        ((2, 35, 4), [(7, 5), (6, 8)], "patch features (2, 35, 4) are not those of 2 images"),
        ((35, 4), [(7, 5), None], "each of grid_sizes must be a positive integer or a (height, width) pair of them, got None"),
        ((35, 4), [], "patch features (35, 4) are not those of 0 images"),
    ],
)  # fmt: skip
def test_features_that_are_not_those_of_the_grids(shape, told, message):
    for module in (
        factorized(),
        partial(DetailFeatureIntegrator(4, 6, grid_size=(6, 8), kernel_size=3, rank=2), torch.zeros(1, 3, 6)),
    ):
        with refused(message):
            module(torch.zeros(*shape), told)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 5}, "rank 5 is larger than vision_hidden_size 4; use at most that"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": "all"}, "rank must be a positive integer, got 'all'"),
        ({"rank": 2, "frequencies": 3}, "3 frequencies a side are more than a kernel of 2 x 2 patches has; use frequencies=(2, 3)"),
        ({"rank": 2, "frequencies": (2, 9)}, "9 frequencies a side are more than a kernel of 6 x 8 patches has; use"),
        ({"rank": 2, "frequencies": 0}, "frequencies must be a positive integer, or one for each of 2 kernels, got 0"),
        ({"rank": 2, "frequencies": (2,)}, "frequencies must be a positive integer, or one for each of 2 kernels, got (2,)"),
        ({"rank": 2, "frequencies": 2, "spatial_basis": "sine"}, "spatial_basis must be 'cosine' or 'learned', got 'sine'"),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit(fields, message):
    shape = {"vision_hidden_size": 4, "spatial_hidden_size": 3, "grid_size": (6, 8), "kernel_sizes": (2, (6, 8))}
    with refused(message):
        SPProjectorConfig(**shape, text_hidden_size=5, detail_kernel_size=None, **fields)
    with refused(message):
        channels, width = shape.pop("vision_hidden_size"), shape.pop("spatial_hidden_size")
        FactorizedFeatureExtractor(channels, width, **shape, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frequencies": 3}, "frequencies 3 is for factorized kernels, but rank is None (dense kernels); give a rank too"),
        ({"spatial_basis": "learned"}, "spatial_basis 'learned' is for factorized kernels, but rank is None"),
    ],
)
def test_configs_whose_fields_do_not_go_together(fields, message):
    with refused(message):
        SPProjectorConfig(
            **{
                "vision_hidden_size": 4,
                "text_hidden_size": 5,
                "grid_size": 6,
                "kernel_sizes": (2, 6),
                "detail_kernel_size": 4,
                **fields,
            }
        )


@pytest.mark.parametrize(("frequencies", "detail", "expected"), [(2, 4, 2), (3, 2, 2), ((2, 4), (3, 5), 3), ((2, 3), None, None)])
def test_the_detail_kernel_has_as_many_frequencies_as_fit(frequencies, detail, expected):
    config = SPProjectorConfig(
        vision_hidden_size=4, text_hidden_size=5, grid_size=8, kernel_sizes=(4, 8), detail_kernel_size=detail, rank=2,
        frequencies=frequencies,
    )  # fmt: skip
    assert config.detail_frequencies == expected
    projector = SPProjector.from_config(config)
    assert projector.config == config
    assert expected == (None if detail is None else projector.integrator.frequencies)


def test_three_frequencies_unless_told_or_as_many_as_fit():
    module = FactorizedFeatureExtractor(4, 3, grid_size=8, kernel_sizes=(2, 4, 8), rank=2)
    assert module.frequencies == (2, 3, 3)
    assert SPProjectorConfig.from_preset("factorized-cropping").frequencies == 3
    assert SPProjectorConfig.from_preset("factorized-cropping", rank=None).frequencies is None


def test_an_integrator_of_other_factors_has_no_config():
    made = SPProjector.from_config(
        SPProjectorConfig(vision_hidden_size=4, text_hidden_size=5, grid_size=6, kernel_sizes=(4, 6), detail_kernel_size=4, rank=2)
    )
    made.integrator = DetailFeatureIntegrator(4, 512, grid_size=6, kernel_size=4, rank=2, spatial_basis="learned")
    with refused("no SPProjectorConfig describes an integrator of rank, frequencies and spatial_basis (2, 3, 'learned') with this"):
        made.config


def test_functorch_leaves_nothing_in_the_cache_and_tracing_finds_one_graph():
    module, patches = (
        FactorizedFeatureExtractor(3, 2, grid_size=(7, 9), kernel_sizes=((3, 5), (7, 9)), rank=2),
        torch.randn(2, 63, 3),
    )
    window_basis._cached.cache_clear()
    torch.func.grad(lambda x: module(x).sum())(patches)
    assert window_basis._cached.cache_info().currsize == 0
    traced = torch.jit.trace(module, patches)  # which traces twice, and fails where the graphs differ
    assert_close(traced(patches), module(patches))


def test_only_factorized_kernels_read_other_grids():
    projector = SPProjector.from_config(
        SPProjectorConfig(vision_hidden_size=4, text_hidden_size=5, grid_size=6, kernel_sizes=(2, 6), detail_kernel_size=None)
    )
    assert not projector.any_grid
    modules = [
        projector,
        projector.extractor,
        partial(DetailFeatureIntegrator(4, 3, grid_size=6, kernel_size=4), torch.zeros(1, 2, 3)),
        SlidingWindowExtractor(4, 3, grid_size=6, kernel_size=3),
        TransformerExtractor(4, grid_size=6, kernel_sizes=(2, 6), num_heads=2, num_layers=1),
    ]
    for module in modules:
        with refused("this module reads only the grid that it was built for, got grid_sizes=(3, 12); leave it out; factorized"):
            module(torch.zeros(1, 36, 4), (3, 12))


def test_grids_in_tensors_and_arrays():
    projector = SPProjector.from_config(
        SPProjectorConfig(
            vision_hidden_size=4, text_hidden_size=5, grid_size=(6, 8), kernel_sizes=(2, 6), detail_kernel_size=4, rank=2
        ),
        dtype=torch.float64,
    )
    batch, features = randn(2, 35, 4), randn(35 + 48, 4)
    for grid in (torch.tensor([7, 5]), np.array([7, 5]), (np.int64(7), torch.tensor(5))):
        assert torch.equal(projector(batch, grid), projector(batch, (7, 5)))
    grids = [(7, 5), (6, 8)]
    for images in (torch.tensor(grids), np.array(grids), list(torch.tensor(grids)), [tuple(each) for each in np.array(grids)]):
        assert torch.equal(projector(features, images), projector(features, grids))
    with refused("each of grid_sizes must be a positive integer or a (height, width) pair of them, got [1, 7, 5]"):
        projector(batch, torch.tensor([[1, 7, 5]] * 2))  # what Qwen-VL's processors give
    for empty in (torch.empty(2, 2, dtype=torch.long, device="meta"), [torch.empty(2, dtype=torch.long, device="meta")] * 2):
        with refused("grid_sizes must be integers, or hold them, got tensor(..., device='meta'"):
            projector(features, empty)
    with refused("each of grid_sizes must be a positive integer or a (height, width) pair of them, got [7.0, 5.0]"):
        projector(batch, torch.tensor([[7.0, 5.0]] * 2))


def test_default_rank_is_at_most_the_channels():
    shape = {"grid_size": 6, "kernel_sizes": (2, 6)}
    assert [FactorizedFeatureExtractor(channels, 3, **shape).rank for channels in (64, 128, 200)] == [64, 128, 128]


def test_configs_of_dense_kernels_are_written_as_before():
    values = SPProjectorConfig.from_preset("llava-sp-cropping").to_dict()
    assert not {"rank", "frequencies", "spatial_basis"} & values.keys()
    factorized = SPProjectorConfig.from_preset("llava-sp-cropping", rank=128)
    assert factorized.to_dict() == {**values, "rank": 128, "frequencies": 3}
    assert SPProjectorConfig.from_json(factorized.to_json()) == factorized


def test_the_papers_setting_in_six_million_parameters():
    dense, small = (SPProjectorConfig.from_preset("llava-sp-cropping", rank=rank).costs() for rank in (None, 128))
    assert small[0].parameters * 200 <= dense[0].parameters
    assert sum(cost.parameters for cost in small[:3]) <= 6e6
