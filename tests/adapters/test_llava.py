"""The LLaVA adapter in a small model laid out as the original code is, patched as docs/codebases.md says."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.adapters.llava import PROJECTOR_TYPES, build_spatial_projector, split_spatial_tokens
from spatial_tokens.checkpoint import from_llava_sp, to_llava_sp
from spatial_tokens.modules.ablations import SlidingWindowExtractor
from spatial_tokens.presets import PRESETS
from tests import reference
from tests.adapters.codebases import added_lines, load
from tests.modules.checks import assert_equals_reference
from tests.tolerances import FLOAT64, assert_close, rounding

BUILDER = "llava/model/multimodal_projector/builder.py"
ARCH = "llava/model/llava_arch.py"
FILES = {
    BUILDER: """
import torch.nn as nn
import re


def build_vision_projector(config, delay_load=False, **kwargs):
    projector_type = getattr(config, 'mm_projector_type', 'linear')

    if projector_type == 'linear':
        return nn.Linear(config.mm_hidden_size, config.hidden_size)

    if re.match(r'^mlp2x_gelu$', projector_type):
        width = config.hidden_size
        return nn.Sequential(nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width))

    raise ValueError(f'Unknown projector type: {projector_type}')
""",
    "llava/model/multimodal_encoder/builder.py": """
import torch
import torch.nn as nn


class Tower(nn.Module):
    hidden_size, num_patches_per_side, num_patches = 3, 24, 576

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 3, 2, stride=2)

    def forward(self, images):
        return self.patches(images).flatten(2).transpose(1, 2)


def build_vision_tower(config, **kwargs):
    return Tower()
""",
    ARCH: """
import torch
import torch.nn as nn

from .multimodal_encoder.builder import build_vision_tower
from .multimodal_projector.builder import build_vision_projector

IGNORE_INDEX, IMAGE_TOKEN_INDEX = -100, -200


class LlavaMetaModel(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(9, config.hidden_size)
        if hasattr(config, 'mm_vision_tower'):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)

    def initialize_vision_modules(self, model_args):
        if getattr(self, 'vision_tower', None) is None:
            self.vision_tower = build_vision_tower(model_args)
        self.config.mm_vision_tower = model_args.vision_tower
        self.config.mm_projector_type = model_args.mm_projector_type
        self.config.mm_hidden_size = self.vision_tower.hidden_size
        if getattr(self, 'mm_projector', None) is None:
            self.mm_projector = build_vision_projector(self.config)
        else:
            for p in self.mm_projector.parameters():
                p.requires_grad = True
        if model_args.pretrain_mm_mlp_adapter is not None:
            weights = torch.load(model_args.pretrain_mm_mlp_adapter, map_location='cpu')
            self.mm_projector.load_state_dict({k.split('mm_projector.')[1]: v for k, v in weights.items() if 'mm_projector' in k})


class LlavaForCausalLM(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlavaMetaModel(config)

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.vision_tower

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_model().vision_tower(images))

    def prepare_inputs_labels_for_multimodal(self, input_ids, labels, images, image_sizes=None):
        if type(images) is list:
            image_features = self.encode_images(torch.cat(images, dim=0))
            image_features = torch.split(image_features, [image.shape[0] for image in images], dim=0)
            mm_patch_merge_type = getattr(self.config, 'mm_patch_merge_type', 'flat')
            if mm_patch_merge_type == 'flat':
                image_features = [x.flatten(0, 1) for x in image_features]
            elif mm_patch_merge_type.startswith('spatial'):
                new_image_features = []
                for image_idx, image_feature in enumerate(image_features):
                    if image_feature.shape[0] > 1:
                        base_image_feature, image_feature = image_feature[0], image_feature[1:]
                        height = width = self.get_vision_tower().num_patches_per_side
                        assert height * width == base_image_feature.shape[0]
                        across, down = image_sizes[image_idx]
                        image_feature = image_feature.view(down, across, height, width, -1).permute(0, 2, 1, 3, 4)
                        image_feature = torch.cat((base_image_feature, image_feature.flatten(0, 3)), dim=0)
                    else:
                        image_feature = image_feature[0]
                    new_image_features.append(image_feature)
                image_features = new_image_features
        else:
            image_features = self.encode_images(images)
        embeds, new_labels = [], []
        for ids, row_labels, features in zip(input_ids, labels, image_features):
            at = (ids == IMAGE_TOKEN_INDEX).nonzero()[0, 0].item()
            parts = self.get_model().embed_tokens(ids[:at]), features, self.get_model().embed_tokens(ids[at + 1:])
            embeds.append(torch.cat(parts))
            new_labels.append(torch.cat((row_labels[:at], torch.full((len(features),), IGNORE_INDEX), row_labels[at + 1:])))
        return torch.stack(embeds), torch.stack(new_labels)
""",
}
SMALL = {"spatial_hidden_size": 2, "detail_kernel_size": 20}
IDS = torch.tensor([[1, -200, 2, 3], [4, 5, -200, 6]])


def host(directory, *, patched):
    names = "llava.model.multimodal_projector.builder", "llava.model.llava_arch"
    builder, arch = load(directory, FILES, *names, patched=patched)
    return SimpleNamespace(build_vision_projector=builder.build_vision_projector, Model=arch.LlavaForCausalLM)


@pytest.fixture
def llava(tmp_path):
    return host(tmp_path / "patched", patched=True)


@pytest.fixture
def original(tmp_path):
    return host(tmp_path / "original", patched=False)


def config_of(projector_type="llava-sp-cropping", **fields):
    return SimpleNamespace(mm_projector_type=projector_type, mm_hidden_size=3, hidden_size=5, **fields)


def arguments(projector_type="llava-sp-cropping", adapter=None):
    return SimpleNamespace(vision_tower="tower", mm_projector_type=projector_type, pretrain_mm_mlp_adapter=adapter)


def reread(config):
    """The config after a life as `config.json`."""
    return SimpleNamespace(**json.loads(json.dumps(vars(config))))


def model_of(llava, projector_type="llava-sp-cropping", **fields):
    """A model that was given its projector as training gives it."""
    model = llava.Model(SimpleNamespace(hidden_size=5, **fields))
    model.get_model().initialize_vision_modules(arguments(projector_type))
    return model


def images(*shape):
    return torch.randn(*shape, 1, 48, 48)


def test_the_patch_of_the_builder_adds_five_lines():
    assert added_lines(BUILDER) == 5


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_types_of_the_host_are_what_they_were(llava, original, projector_type):
    torch.manual_seed(1)
    ours = llava.build_vision_projector(config_of(projector_type))
    torch.manual_seed(1)
    theirs = original.build_vision_projector(config_of(projector_type))
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("projector_type", ["llava-sp-croping", "mlp3"])
def test_unknown_types_are_refused_by_the_host(llava, original, projector_type):
    for each in (llava, original):
        with pytest.raises(ValueError, match=f"Unknown projector type: {projector_type}"):
            each.build_vision_projector(config_of(projector_type))


def test_our_types_are_the_presets(llava):
    assert set(PROJECTOR_TYPES) == set(PRESETS)
    for name in PROJECTOR_TYPES:
        with torch.device("meta"):
            projector = llava.build_vision_projector(config_of(name))
        assert projector.config == SPProjectorConfig.from_preset(name, vision_hidden_size=3, text_hidden_size=5)


@pytest.mark.parametrize("projector_type", ["llava-sp-cropping", "llava-sp-pooling", "llava-sp-3-tokens"])
def test_equals_the_reference(llava, projector_type):
    fields = {**PRESETS[projector_type], "spatial_hidden_size": 2}
    projector = llava.build_vision_projector(config_of(projector_type, mm_spatial_tokens={"spatial_hidden_size": 2})).double()
    patches = torch.randn(2, 576, 3, dtype=torch.float64)
    assert projector(patches).shape == (2, len(fields["kernel_sizes"]) + 576, 5)
    assert_equals_reference(
        projector, lambda parameters, x: reference.projector(parameters, x, **fields)[0], patches, tolerance=FLOAT64
    )


def test_fields_of_the_config_replace_the_presets(llava):
    ours = {"grid_size": (16, 24), "kernel_sizes": (4, (8, 12)), "variant": "pooling", "detail_kernel_size": None}
    projector = llava.build_vision_projector(reread(config_of(mm_spatial_tokens=ours)))
    expected = SPProjectorConfig(vision_hidden_size=3, text_hidden_size=5, spatial_hidden_size=512, spatial_head="linear", **ours)
    assert projector.config == expected
    assert projector(torch.randn(1, 384, 3)).shape == (1, 386, 5)


def test_no_fields_are_the_preset(llava):
    for nothing in ({}, None):
        with torch.device("meta"):
            projector = llava.build_vision_projector(config_of(mm_spatial_tokens=nothing))
        assert projector.config.kernel_sizes == (4, 8, 12, 16, 20, 24)


def test_stage_one_saves_what_stage_two_loads(llava, tmp_path):
    model = model_of(llava, mm_spatial_tokens=SMALL)
    model.requires_grad_(False)
    for parameter in model.get_model().mm_projector.parameters():
        parameter.requires_grad = True
    model.encode_images(images(2)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    saved = {name: parameter for name, parameter in model.named_parameters() if "mm_projector" in name}
    assert trained == saved.keys()
    assert {name for name in model.state_dict() if "mm_projector" in name} == saved.keys()
    torch.save(saved, tmp_path / "mm_projector.bin")

    second = llava.Model(SimpleNamespace(hidden_size=5, mm_spatial_tokens=SMALL))
    second.get_model().initialize_vision_modules(arguments(adapter=tmp_path / "mm_projector.bin"))
    patches = torch.randn(2, 576, 3)
    assert torch.equal(second.get_model().mm_projector(patches), model.get_model().mm_projector(patches))


def test_a_model_is_rebuilt_from_its_config(llava, tmp_path):
    model = model_of(llava, mm_spatial_tokens=SMALL)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    again = llava.Model(reread(model.config))
    again.load_state_dict(torch.load(tmp_path / "model.bin"))
    pixels = images(2)
    assert torch.equal(again.encode_images(pixels), model.encode_images(pixels))


def test_image_tokens_take_the_images_place(llava):
    model, pixels = model_of(llava, mm_spatial_tokens=SMALL), images(2)
    embeds, labels = model.prepare_inputs_labels_for_multimodal(IDS, IDS, pixels)
    tokens = model.encode_images(pixels)
    assert tokens.shape == (2, 582, 5)
    assert embeds.shape == (2, 3 + 582, 5)
    for row, at in enumerate((1, 2)):
        assert torch.equal(embeds[row, at : at + 582], tokens[row])
        assert (labels[row, at : at + 582] == -100).all()
        assert labels[row].tolist().count(-100) == 582
    embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in model.get_model().mm_projector.parameters())


def test_flat_tiles_each_keep_their_spatial_tokens(llava):
    model, tiles = model_of(llava, mm_spatial_tokens=SMALL), [images(3), images(3)]
    embeds, _ = model.prepare_inputs_labels_for_multimodal(IDS, IDS, tiles)
    assert torch.equal(embeds[0, 1 : 1 + 3 * 582], model.encode_images(torch.cat(tiles))[:3].flatten(0, 1))


@pytest.mark.parametrize(("tiles", "size"), [(7, (3, 2)), (7, (2, 3)), (1, None)])
def test_spatial_tiles_put_the_spatial_tokens_first(llava, original, tiles, size):
    model, pixels = model_of(llava, mm_spatial_tokens=SMALL, mm_patch_merge_type="spatial"), images(tiles)
    embeds, _ = model.prepare_inputs_labels_for_multimodal(IDS[:1], IDS[:1], [pixels], [size])
    tokens = model.encode_images(pixels)
    assert embeds.shape == (1, 3 + tiles * 582, 5)
    assert torch.equal(embeds[0, 1 : 1 + 6 * tiles], tokens[:, :6].reshape(-1, 5))

    theirs = model_of(original, "mlp2x_gelu", mm_patch_merge_type="spatial")  # as it lays out patch tokens alone
    theirs.get_model().embed_tokens = model.get_model().embed_tokens
    theirs.get_model().vision_tower = model.get_model().vision_tower
    theirs.get_model().mm_projector = model.get_model().mm_projector.patch_head
    expected, _ = theirs.prepare_inputs_labels_for_multimodal(IDS[:1], IDS[:1], [pixels], [size])
    assert torch.equal(torch.cat((embeds[:, :1], embeds[:, 1 + 6 * tiles :]), dim=1), expected)


def test_spatial_tiles_of_the_hosts_types_are_what_they_were(llava, original):
    pixels, outputs = images(5), []
    for each in (llava, original):
        torch.manual_seed(1)
        model = model_of(each, "mlp2x_gelu", mm_patch_merge_type="spatial")
        outputs.append(model.prepare_inputs_labels_for_multimodal(IDS[:1], IDS[:1], [pixels], [(2, 2)]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_split_spatial_tokens():
    projector = build_spatial_projector(config_of("llava-sp-3-tokens", mm_spatial_tokens={"spatial_hidden_size": 2}))
    tokens = projector(torch.randn(2, 576, 3))
    spatial, patches = split_spatial_tokens(projector, tokens)
    assert torch.equal(torch.cat((spatial, patches), dim=1), tokens)
    assert spatial.shape == (2, 3, 5)
    spatial, patches = split_spatial_tokens(nn.Linear(3, 5), tokens)
    assert spatial.shape == (2, 0, 5)
    assert torch.equal(patches, tokens)
    sliding = SPProjector(SlidingWindowExtractor(3, 2, grid_size=24, kernel_size=(12, 8)), None, nn.Linear(2, 5), nn.Linear(3, 5))
    for six in (sliding, torch.compile(sliding, backend="eager")):  # of parts that no config describes, and wrapped
        assert split_spatial_tokens(six, tokens)[0].shape == (2, 6, 5)


def test_weights_of_a_plain_llava_keep_its_patch_tokens(llava):
    old = model_of(llava, "mlp2x_gelu")
    weights = {name: parameter for name, parameter in old.named_parameters() if "mm_projector" in name}
    projector = llava.build_vision_projector(config_of(mm_spatial_tokens=SMALL))
    names = {"fc1.weight": "0.weight", "fc1.bias": "0.bias", "fc2.weight": "2.weight", "fc2.bias": "2.bias"}
    projector.patch_head.load_state_dict({ours: weights[f"model.mm_projector.{theirs}"] for ours, theirs in names.items()})
    patches = torch.randn(2, 576, 3)
    assert torch.equal(projector(patches)[:, 6:], old.get_model().mm_projector(patches))


def test_weights_of_llava_sp(llava):
    trained = build_spatial_projector(config_of(mm_spatial_tokens={"spatial_hidden_size": 2}))
    released = to_llava_sp(trained, prefix="model.")
    model = model_of(llava, mm_spatial_tokens={"spatial_hidden_size": 2})
    model.get_model().mm_projector.load_state_dict(from_llava_sp(released).state_dict())
    patches = torch.randn(1, 576, 3)
    assert torch.equal(model.get_model().mm_projector(patches), trained(patches))


def test_bfloat16(llava):
    model = model_of(llava, mm_spatial_tokens=SMALL)
    patches = torch.randn(2, 576, 3).to(torch.bfloat16)
    projector = model.get_model().mm_projector.to(torch.bfloat16)
    tokens = projector(patches)
    assert tokens.dtype == torch.bfloat16
    assert_close(tokens, projector.double()(patches.double()), rounding(torch.bfloat16, 8))


def test_built_in_the_default_dtype(llava):
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained(torch_dtype=...) does
    try:
        projector = llava.build_vision_projector(config_of(mm_spatial_tokens=SMALL))
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(projector, SPProjector)
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_spatial_tokens": {"text_hidden_size": 4}}, "text_hidden_size is 4, but the model's is 5; leave it out"),
        ({"mm_spatial_tokens": {"kernel_size": [4]}}, r"unknown field 'kernel_size' \(did you mean 'kernel_sizes'\?\)"),
        ({"mm_spatial_tokens": {"kernel_sizes": [5]}}, "cannot be cropped to a centered 5 x 5 window"),
        ({"mm_spatial_tokens": {"name": 1}}, "unknown field 'name'"),
        ({"mm_spatial_tokens": "pooling"}, "fields of an SPProjectorConfig are given as a dict, got 'pooling'"),
        ({"mm_hidden_size": 0}, "vision_hidden_size must be a positive integer"),
        ({"mm_projector_type": "mlp2x_gelu"}, "unknown preset 'mlp2x_gelu'"),
    ],
)
def test_configs_that_describe_no_projector(changes, message):
    config = config_of()
    vars(config).update(changes)
    with pytest.raises(SpatialTokensError, match=message):
        build_spatial_projector(config)


@pytest.mark.parametrize("name", ["mm_projector_type", "mm_hidden_size", "hidden_size"])
def test_configs_of_something_else(name):
    config = config_of()
    delattr(config, name)
    with pytest.raises(SpatialTokensError, match=f"this SimpleNamespace has no {name}; expected the config of a LLaVA model"):
        build_spatial_projector(config)


def test_class_token_is_named(llava):
    projector = llava.build_vision_projector(config_of(mm_spatial_tokens=SMALL))
    with pytest.raises(SpatialTokensError, match="looks like the class token"):
        projector(torch.randn(1, 577, 3))
