import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spatial_tokens import DetailFeatureIntegrator, SpatialFeatureExtractor, SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.modules import LinearHead, MLPHead
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

GRID = {"grid_size": (4, 6)}
TINY = {"vision_hidden_size": 4, "text_hidden_size": 5, **GRID, "kernel_sizes": (2, 4), "detail_kernel_size": None}


class Mean(nn.Module):
    """An extractor of the user's own: the mean patch, `count` times."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, patches):
        return patches.mean(1, keepdim=True).expand(-1, self.count, -1)


class CountedMean(Mean):
    @property
    def num_spatial_tokens(self):
        return self.count


@pytest.mark.parametrize(
    "extractor",
    [
        SpatialFeatureExtractor(4, 4, kernel_sizes=(2, 4), variant="pooling", **GRID),
        SlidingWindowExtractor(4, 4, kernel_size=2, **GRID),
        TransformerExtractor(4, kernel_sizes=(2, 4), num_heads=2, num_layers=1, **GRID),
        CountedMean(3),
    ],
    ids=lambda extractor: type(extractor).__name__,
)
def test_the_number_of_spatial_tokens_is_what_the_projector_makes(extractor):
    projector = SPProjector(extractor, None, LinearHead(4, 5), None)
    assert projector.num_spatial_tokens == projector(torch.zeros(1, 24, 4)).shape[1]


@pytest.mark.parametrize(("extractor", "found"), [(Mean(3), "None"), (CountedMean(0), "0"), (CountedMean("3"), "'3'")])
def test_an_extractor_that_does_not_say_its_number_of_tokens(extractor, found):
    projector = SPProjector(extractor, None, LinearHead(4, 5), None)
    message = f"Mean.num_spatial_tokens must be a positive integer, got {found}; give the extractor an attribute"
    with pytest.raises(SpatialTokensError, match=message):
        projector.num_spatial_tokens


@pytest.mark.parametrize("name", ["extractor", "integrator", "spatial_head", "patch_head"])
@pytest.mark.parametrize("value", ["MLP", LinearHead])
def test_parts_are_modules(name, value):
    parts = {"extractor": Mean(3), "integrator": None, "spatial_head": LinearHead(4, 5), "patch_head": None}
    with pytest.raises(SpatialTokensError, match=f"{name} must be an nn.Module, got "):
        SPProjector(**{**parts, name: value})


@pytest.mark.parametrize("value", [None, 3, b"folder", ["folder"], ""])
def test_folders_are_paths(value):
    projector = SPProjector.from_config(SPProjectorConfig(**TINY))
    with pytest.raises(SpatialTokensError, match="directory must be a path, got "):
        projector.save_pretrained(value)
    with pytest.raises(SpatialTokensError, match="directory must be a path, got "):
        SPProjector.from_pretrained(value)


@pytest.mark.parametrize("arguments", [{"device": "gpu9"}, {"dtype": torch.int8}])
def test_loading_into_a_device_or_dtype_that_is_none(tmp_path, arguments):
    SPProjector.from_config(SPProjectorConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(SpatialTokensError, match=r"cannot use the device 'gpu9'|dtype must be one of .*, got torch.int8"):
        SPProjector.from_pretrained(tmp_path, **arguments)


@st.composite
def configs(draw):
    """All fields of a valid config."""
    grid, variant = draw(grids), draw(variants)
    detail = draw(st.none() | kernels(grid))
    head = draw(st.sampled_from(["mlp", "linear"]))
    return {
        "vision_hidden_size": draw(widths),
        "text_hidden_size": draw(widths),
        "grid_size": grid,
        "variant": variant,
        "kernel_sizes": draw(scales(grid, variant)),
        "spatial_hidden_size": draw(st.integers(3, 6)),
        "detail_kernel_size": detail,
        "detail_stride": None if detail is None else draw(strides(grid)),
        "spatial_head": head,
        "spatial_head_bias": head == "mlp" or draw(st.booleans()),
    }


@given(data=st.data(), fields=configs(), batch=batches)
def test_any_valid_config_equals_the_reference(data, fields, batch):
    config = SPProjectorConfig(**fields)
    projector = SPProjector.from_config(config, dtype=torch.float64)
    patches = data.draw(features(batch, config.num_patches, config.vision_hidden_size))
    options = {"return_attention": True} if config.detail_kernel_size else {}
    expected = partial(reference.projector, **fields)
    assert_equals_reference(projector, expected, patches, tolerance=FLOAT64, **options)
    assert projector(patches).shape == (batch, config.num_tokens, config.text_hidden_size)
    assert projector.config == config
    assert sum(parameter.numel() for parameter in projector.parameters()) == config.num_parameters


def compose(extractor=None, integrator=None, spatial_head=None, patch_head=None):
    extractor = extractor or SpatialFeatureExtractor(4, 6, **GRID, kernel_sizes=(2, 4))
    spatial = integrator.out_features if integrator else extractor.spatial_hidden_size
    return SPProjector(extractor, integrator, spatial_head or MLPHead(spatial, 5), patch_head or MLPHead(4, 5))


def test_spatial_tokens_come_first_and_attention_only_when_asked():
    projector = compose(integrator=DetailFeatureIntegrator(4, 6, **GRID, kernel_size=2))
    patches = torch.randn(2, 24, 4)
    tokens = projector(patches)
    again, attention = projector(patches, return_attention=True)
    assert torch.equal(again, tokens)
    assert attention.shape == (2, 2, 6)
    assert torch.equal(tokens[:, 2:], projector.patch_head(patches))


def heads(parameters, tokens, patches):
    spatial, patch = (reference.part(parameters, f"{name}_head.") for name in ("spatial", "patch"))
    return torch.cat([reference.head(spatial, tokens), reference.head(patch, patches)], dim=1)


def test_it_takes_the_transformer_extractor_in_the_place_of_its_own():
    sizes = {**GRID, "kernel_sizes": ((2, 4), (4, 6))}
    extractor = TransformerExtractor(8, **sizes, num_layers=1, num_heads=2, feedforward_size=8)
    projector = SPProjector(extractor, None, LinearHead(8, 5, bias=False), MLPHead(8, 5)).double().eval()

    def expected(parameters, patches):
        tokens = reference.transformer(reference.part(parameters, "extractor."), patches, **sizes, num_layers=1, num_heads=2)
        return heads(parameters, tokens, patches)

    assert_equals_reference(projector, expected, torch.randn(2, 24, 8).double(), tolerance=FLOAT64)
    with pytest.raises(SpatialTokensError, match="no SPProjectorConfig describes a projector with a TransformerExtractor"):
        projector.config


def test_it_takes_the_sliding_window_extractor_before_an_integrator():
    sizes = {**GRID, "kernel_size": (4, 3)}
    projector = compose(SlidingWindowExtractor(4, 6, **sizes), DetailFeatureIntegrator(4, 6, **GRID, kernel_size=2)).double()

    def expected(parameters, patches):
        tokens = reference.sliding_window(reference.part(parameters, "extractor."), patches, **sizes)
        integrator = reference.part(parameters, "integrator.")
        tokens, attention = reference.integrator(integrator, tokens, patches, **GRID, kernel_size=2, stride=2)
        return heads(parameters, tokens, patches), attention

    assert_equals_reference(projector, expected, torch.randn(2, 24, 4).double(), tolerance=FLOAT64, return_attention=True)
    with pytest.raises(SpatialTokensError, match="no SPProjectorConfig describes a projector with a SlidingWindowExtractor"):
        projector.config


@pytest.mark.parametrize("place", ["spatial_head", "patch_head"])
def test_a_head_of_the_users_own_works_but_no_config_describes_it(place):
    own = nn.Sequential(nn.Linear(6 if place == "spatial_head" else 4, 5), nn.Tanh())
    projector = compose(**{place: own})
    assert projector(torch.randn(2, 24, 4)).shape == (2, 26, 5)
    with pytest.raises(SpatialTokensError, match="no SPProjectorConfig describes a projector with a Sequential; to_dict"):
        projector.config


class FirstPatches(nn.Module):
    """An extractor of the user's own, which names no widths."""

    def forward(self, patches):
        return patches[:, :3]


@pytest.mark.parametrize("integrator", [None, DetailFeatureIntegrator(4, 4, **GRID, kernel_size=2)], ids=["no DFI", "DFI"])
def test_an_extractor_of_the_users_own_needs_no_more_than_its_forward(integrator):
    projector = SPProjector(FirstPatches(), integrator, MLPHead(8 if integrator else 4, 5), MLPHead(4, 5))
    assert projector(torch.randn(2, 24, 4)).shape == (2, 27, 5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"spatial_head": MLPHead(7, 5)},
            "spatial_head.in_features is 7, but spatial_hidden_size of the SpatialFeatureExtractor is 6; build them for each other",
        ),
        (
            {"spatial_head": LinearHead(6, 5), "integrator": (4, 6, (4, 6))},
            "spatial_head.in_features is 6, but out_features of the DetailFeatureIntegrator is 12",
        ),
        ({"patch_head": MLPHead(3, 5)}, "patch_head.in_features is 3, but vision_hidden_size of the SpatialFeatureExtractor is 4"),
        ({"patch_head": MLPHead(4, 3)}, "patch_head.out_features is 3, but out_features of the MLPHead is 5"),
        ({"integrator": (3, 6, (4, 6))}, "integrator.vision_hidden_size is 3, but vision_hidden_size of the Spatial"),
        ({"integrator": (4, 5, (4, 6))}, "integrator.spatial_hidden_size is 5, but spatial_hidden_size of the Spatial"),
        ({"integrator": (4, 6, (6, 4))}, "integrator.grid_size is (6, 4), but grid_size of the SpatialFeatureExtractor is (4, 6)"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    if "integrator" in parts:
        c, s, grid = parts["integrator"]
        parts = {**parts, "integrator": DetailFeatureIntegrator(c, s, grid_size=grid, kernel_size=2)}
    with pytest.raises(SpatialTokensError, match=re.escape(message)):
        compose(**parts)


def test_attention_without_an_integrator_is_refused():
    with pytest.raises(SpatialTokensError, match="there is no attention to return: this projector has no DetailFeatureIntegrator"):
        compose()(torch.randn(2, 24, 4), return_attention=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_patch_shows_in_its_own_token_and_in_the_spatial_tokens_that_contain_it(bad):
    patches = torch.randn(2, 4, 6, 4)
    patches[0, 0, 1] = bad  # outside of the window of 2 x 2, inside of that of 4 x 4
    tokens = compose()(patches.flatten(1, 2))
    assert tokens[0].isfinite().all(-1).tolist() == [True, False, True, False] + [True] * 22
    assert tokens[1].isfinite().all()


@pytest.mark.parametrize("config", ["llava-sp-cropping", None, {"vision_hidden_size": 4}])
def test_a_config_of_another_kind(config):
    with pytest.raises(SpatialTokensError, match="config must be an SPProjectorConfig, got"):
        SPProjector.from_config(config)
