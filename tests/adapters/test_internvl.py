"""The InternVL adapter in a small model laid out as InternVLChatModel is, patched as docs/codebases.md says."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.adapters.internvl import UndoPixelShuffle, add_spatial_tokens
from spatial_tokens.adapters.prepend import PrependSpatialTokens
from tests import reference
from tests.adapters.codebases import load, spatial_tokens
from tests.modules.checks import assert_equals_reference
from tests.tolerances import FLOAT64, assert_close, rounding

MODEL = "internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py"
SCRIPT = "internvl_chat/internvl/train/internvl_chat_finetune.py"
FILES = {
    "internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py": """
import torch
from torch import nn


class InternVisionModel(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.patches = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.hidden_size))

    def forward(self, pixel_values):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat((self.class_token.expand(len(patches), -1, -1), patches), dim=1)
""",
    MODEL: """
from torch import nn

from .modeling_intern_vit import InternVisionModel


class InternVLChatModel(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        image_size = config.force_image_size or config.vision_config.image_size
        self.num_image_token = int((image_size // config.vision_config.patch_size) ** 2 * (config.downsample_ratio ** 2))
        self.downsample_ratio = config.downsample_ratio
        self.ps_version = config.ps_version
        self.vision_model = InternVisionModel(config.vision_config)
        llm_hidden_size = config.llm_config.hidden_size
        self.embeddings = nn.Embedding(9, llm_hidden_size)
        merged = config.vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged),
            nn.Linear(merged, llm_hidden_size),
            nn.GELU(),
            nn.Linear(llm_hidden_size, llm_hidden_size)
        )
        self.img_context_token_id = 8

    def pixel_shuffle(self, x, scale_factor=0.5):
        n, w, h, c = x.size()
        x = x.view(n, w, int(h * scale_factor), int(c / scale_factor))
        x = x.permute(0, 2, 1, 3).contiguous()
        x = x.view(n, int(h * scale_factor), int(w * scale_factor), int(c / (scale_factor * scale_factor)))
        if self.ps_version != 'v1':
            x = x.permute(0, 2, 1, 3).contiguous()
        return x

    def extract_feature(self, pixel_values):
        vit_embeds = self.vision_model(pixel_values)[:, 1:, :]
        h = w = int(vit_embeds.shape[1] ** 0.5)
        vit_embeds = vit_embeds.reshape(vit_embeds.shape[0], h, w, -1)
        vit_embeds = self.pixel_shuffle(vit_embeds, scale_factor=self.downsample_ratio)
        return self.mlp1(vit_embeds.reshape(vit_embeds.shape[0], -1, vit_embeds.shape[-1]))

    def forward(self, pixel_values, input_ids, image_flags):
        input_embeds = self.embeddings(input_ids).clone()
        vit_embeds = self.extract_feature(pixel_values)[image_flags == 1]
        B, N, C = input_embeds.shape
        input_embeds = input_embeds.reshape(B * N, C)
        selected = input_ids.reshape(B * N) == self.img_context_token_id
        try:
            input_embeds[selected] = input_embeds[selected] * 0.0 + vit_embeds.reshape(-1, C)
            ignore_flag = False
        except Exception:
            vit_embeds = vit_embeds.reshape(-1, C)
            input_embeds[selected] = input_embeds[selected] * 0.0 + vit_embeds[:selected.sum()]
            ignore_flag = True
        return input_embeds.reshape(B, N, C), ignore_flag
""",
    SCRIPT: """
def set_up(model, data_args):
    patch_size = model.config.vision_config.patch_size
    model.num_image_token = int((data_args.force_image_size // patch_size) ** 2 * (data_args.down_sample_ratio ** 2))
""",
}
NAMES = MODEL, SCRIPT
FIELDS = {"kernel_sizes": [2, 4, 8], "spatial_hidden_size": 2, "detail_kernel_size": 4}


def host(directory, *, patched):
    model, script = load(directory, FILES, *(path.removesuffix(".py").replace("/", ".") for path in NAMES), patched=patched)
    return SimpleNamespace(Model=model.InternVLChatModel, set_up=script.set_up)


@pytest.fixture
def internvl(tmp_path):
    return host(tmp_path / "patched", patched=True)


@pytest.fixture
def original(tmp_path):
    return host(tmp_path / "original", patched=False)


def namespace(values):
    return SimpleNamespace(**{name: namespace(value) if name.endswith("_config") else value for name, value in values.items()})


def config_of(version="v2", ratio=0.5, **fields):
    return namespace(
        {
            "vision_config": {"hidden_size": 3, "image_size": 28, "patch_size": 2},
            "llm_config": {"hidden_size": 5},
            "force_image_size": 16,
            "downsample_ratio": ratio,
            "ps_version": version,
            **fields,
        }
    )


def reread(config):
    """The config after a life as `config.json`."""
    return namespace(json.loads(json.dumps(vars(config), default=vars)))


def pixels(tiles):
    return torch.randn(tiles, 1, 16, 16)


def shuffled(model, patches):
    """Patches `(B, N, C)` as the model gives them to `mlp1`."""
    side = int(patches.shape[1] ** 0.5)
    merged = model.pixel_shuffle(patches.reshape(len(patches), side, side, -1), model.downsample_ratio)
    return merged.reshape(len(patches), -1, merged.shape[-1])


@pytest.fixture(scope="module")
def pixel_shuffle(tmp_path_factory):
    return host(tmp_path_factory.mktemp("host"), patched=False).Model.pixel_shuffle


@given(side=st.integers(1, 4), factor=st.sampled_from([1, 2, 4]), channels=st.integers(1, 3), version=st.sampled_from(["v1", "v2"]))
def test_undoing_the_pixel_shuffle_is_exact(pixel_shuffle, side, factor, channels, version):
    model = SimpleNamespace(ps_version=version, downsample_ratio=1 / factor)
    model.pixel_shuffle = partial(pixel_shuffle, model)
    patches = torch.randn(2, (side * factor) ** 2, channels)
    undo = UndoPixelShuffle((side * factor, side * factor), channels, factor, transposed=version == "v1")
    assert torch.equal(undo(shuffled(model, patches)), patches)


def test_undoing_on_a_grid_that_is_no_square():
    patches = torch.arange(4 * 6 * 2).reshape(1, 24, 2)
    merged = patches.reshape(1, 2, 2, 3, 2, 2).transpose(2, 3).reshape(1, 6, 8)  # rows, dy, columns, dx
    assert torch.equal(UndoPixelShuffle((4, 6), 2, 2, transposed=False)(merged), patches)
    by_columns = merged.reshape(1, 2, 3, 8).transpose(1, 2).reshape(1, 6, 8)
    assert torch.equal(UndoPixelShuffle((4, 6), 2, 2, transposed=True)(by_columns), patches)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 1.0])
def test_its_own_tokens_stay_and_spatial_tokens_come_first(internvl, version, ratio):
    model, images = internvl.Model(config_of(version, ratio)), pixels(3)
    own, count = model.extract_feature(images), model.num_image_token
    projector = add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    tokens = model.extract_feature(images)
    assert model.mlp1 is projector
    assert (projector.num_spatial_tokens, model.num_image_token) == (3, count + 3)
    assert tokens.shape == (3, model.num_image_token, 5)
    assert torch.equal(tokens[:, 3:], own)
    patches = model.vision_model(images)[:, 1:]
    assert torch.equal(tokens[:, :3], projector.spatial_projector(patches))


class OnPatches(nn.Module):
    """The model's `mlp1`, given patches as they were before the pixel shuffle."""

    def __init__(self, model):
        super().__init__()
        self.shuffled, self.mlp1 = partial(shuffled, model), model.mlp1

    def forward(self, patches):
        return self.mlp1(self.shuffled(patches))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_equals_the_reference(internvl, version):
    model = internvl.Model(config_of(version)).double()
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)

    def expected(parameters, patches):
        own = reference.part(parameters, "mlp1.projector.")
        hidden = reference.layer_norm(reference.part(own, "0."), shuffled(model, patches))
        hidden = reference.gelu(reference.linear(reference.part(own, "1."), hidden))
        spatial = spatial_tokens(
            reference.part(parameters, "mlp1.spatial_projector."),
            patches,
            grid_size=8,
            kernel_sizes=(2, 4, 8),
            detail_kernel_size=4,
        )
        return torch.cat([spatial, reference.linear(reference.part(own, "3."), hidden)], dim=1)

    patches = torch.randn(2, 64, 3, dtype=torch.float64)
    assert_equals_reference(OnPatches(model), expected, patches, tolerance=FLOAT64)


def test_the_grid_of_an_encoder_that_is_not_forced(internvl):
    model = internvl.Model(config_of(force_image_size=None))
    projector = add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    assert projector.spatial_projector.config.grid_size == (14, 14)
    assert model.extract_feature(torch.randn(1, 1, 28, 28)).shape == (1, 49 + 3, 5)


def test_forward_fills_the_context_tokens(internvl):
    model, images = internvl.Model(config_of()), pixels(3)
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    ids = torch.tensor([[1, *[8] * (2 * model.num_image_token), 2]])
    embeds, ignored = model(images, ids, torch.tensor([1, 0, 1]))
    assert not ignored
    assert torch.equal(embeds[0, 1:-1], model.extract_feature(images)[[0, 2]].flatten(0, 1))
    embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in model.mlp1.parameters())


def test_the_finetuning_script_counts_the_spatial_tokens(internvl, original):
    arguments = SimpleNamespace(force_image_size=16, down_sample_ratio=0.5)
    model, images, flags = internvl.Model(config_of()), pixels(1), torch.tensor([1])
    internvl.set_up(model, arguments)
    assert model.num_image_token == 16
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    internvl.set_up(model, arguments)
    assert model.num_image_token == 19
    assert model(images, torch.full((1, model.num_image_token), 8), flags)[1] is False
    original.set_up(model, arguments)  # forgets them, and the model drops the sample's loss
    assert model(images, torch.full((1, model.num_image_token), 8), flags)[1] is True


def test_a_model_is_rebuilt_from_its_config(internvl):
    model, images = internvl.Model(config_of()), pixels(2)
    add_spatial_tokens(model, "internvit-300m-448", **{**FIELDS, "kernel_sizes": (2, 4, 8)})
    again = internvl.Model(reread(model.config))
    again.load_state_dict(model.state_dict())
    assert again.num_image_token == model.num_image_token == 19
    assert again.mlp1.spatial_projector.config == model.mlp1.spatial_projector.config
    assert torch.equal(again.extract_feature(images), model.extract_feature(images))
    once_more = internvl.Model(reread(again.config))
    assert once_more.num_image_token == 19


def test_the_patched_model_is_its_old_self_without_spatial_tokens(internvl, original):
    outputs = []
    for each in (internvl, original):
        for fields in ({}, {"spatial_tokens": None}):
            torch.manual_seed(1)
            model = each.Model(config_of(**fields))
            outputs.append((model.state_dict(), model.num_image_token, model.extract_feature(torch.ones(1, 1, 16, 16))))
    first, *others = outputs
    for state, count, tokens in others:
        assert state.keys() == first[0].keys()
        assert count == first[1]
        assert torch.equal(tokens, first[2])


def test_old_weights(internvl, original):
    old, images = original.Model(config_of()), pixels(2)
    model = internvl.Model(config_of())
    model.load_state_dict(old.state_dict())
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    assert torch.equal(model.extract_feature(images)[:, 3:], old.extract_feature(images))

    fresh = internvl.Model(model.config)
    fresh.mlp1.projector.load_state_dict(old.mlp1.state_dict())  # --mlp_path
    features = torch.randn(2, 16, 12)
    assert torch.equal(fresh.mlp1(features)[:, 3:], old.mlp1(features))
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.mlp1.load_state_dict(old.mlp1.state_dict())


def test_made_as_the_own_projector_is(internvl):
    model = internvl.Model(config_of()).to(torch.bfloat16).eval().requires_grad_(False)
    projector = add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in projector.modules())
    assert all(parameter.requires_grad for parameter in projector.spatial_projector.parameters())
    assert not any(parameter.requires_grad for parameter in projector.projector.parameters())
    model = internvl.Model(config_of()).to("meta")
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with torch.device("meta"):
        model = internvl.Model(config_of(spatial_tokens={"preset": "internvit-300m-448", **FIELDS}))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_bfloat16(internvl):
    model = internvl.Model(config_of()).to(torch.bfloat16)
    projector = add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    features = torch.randn(2, 16, 12).to(torch.bfloat16)
    tokens = projector(features)
    assert tokens.dtype == torch.bfloat16
    assert_close(tokens, projector.double()(features.double()), rounding(torch.bfloat16, 8))


def test_compiles_as_one_graph(internvl):
    model = internvl.Model(config_of("v1"))
    projector, features = add_spatial_tokens(model, "internvit-300m-448", **FIELDS), torch.randn(2, 16, 12)
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    assert torch.equal(compiled(features), projector(features))


def test_shown_as_what_it_is():
    assert repr(UndoPixelShuffle((32, 32), 4, 2, transposed=True)) == "UndoPixelShuffle((256, 16), factor=2, transposed=True)"


def test_twice(internvl):
    model = internvl.Model(config_of())
    add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    with pytest.raises(SpatialTokensError, match="has spatial tokens already"):
        add_spatial_tokens(model, "internvit-300m-448", **FIELDS)
    assert model.num_image_token == 19


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("internvit", {}, "unknown preset 'internvit'"),
        ("internvit-300m-448", {}, r"kernel size 12 x 12 is larger than grid_size \(8, 8\)"),
        ("internvit-300m-448", {**FIELDS, "grid_size": [32, 32]}, r"grid_size is \(32, 32\), but the model's is \(8, 8\)"),
        ("internvit-300m-448", {**FIELDS, "patch_head": "mlp"}, "patch_head is 'mlp', but the model's is None"),
        ("internvit-300m-448", {**FIELDS, "vision_hidden_size": 12}, "vision_hidden_size is 12, but the model's is 3"),
        ("internvit-300m-448", {"kernels": [2]}, "unknown field 'kernels'"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(internvl, preset, fields, message):
    model = internvl.Model(config_of())
    with pytest.raises(SpatialTokensError, match=message):
        add_spatial_tokens(model, preset, **fields)
    assert type(model.mlp1) is nn.Sequential
    assert model.num_image_token == 16
    assert not hasattr(model.config, "spatial_tokens")


def test_another_model():
    with pytest.raises(SpatialTokensError, match="this Linear has no mlp1; expected an InternVLChatModel"):
        add_spatial_tokens(nn.Linear(1, 1), "internvit-300m-448")


def test_grids_that_do_not_merge(internvl):
    model = internvl.Model(config_of(force_image_size=18))
    with pytest.raises(SpatialTokensError, match="a grid of 9 x 9 patches cannot be merged 2 x 2; resize the picture"):
        add_spatial_tokens(model, "internvit-300m-448", **{**FIELDS, "kernel_sizes": [3]})


@pytest.mark.parametrize("shape", [(1, 64, 3), (1, 16, 3), (16, 12), (1, 17, 12), (1, 4, 4, 12)])
def test_features_of_another_shape(shape):
    with pytest.raises(SpatialTokensError, match=r"merged features must have shape \(B, 16, 12\), got \("):
        UndoPixelShuffle((8, 8), 3, 2, transposed=False)(torch.zeros(shape))


def test_a_patch_head_of_its_own():
    config = SPProjectorConfig(vision_hidden_size=3, text_hidden_size=5, grid_size=8, kernel_sizes=(4,), detail_kernel_size=None)
    with pytest.raises(SpatialTokensError, match="the model projects its patches itself; give patch_head=None"):
        PrependSpatialTokens(nn.Linear(3, 5), SPProjector.from_config(config))
    for parts in ((nn.Linear(3, 5), None), (None, SPProjector.from_config(config))):
        with pytest.raises(SpatialTokensError, match="a projector and an SPProjector are needed, got "):
            PrependSpatialTokens(*parts)
