"""The nanoVLM adapter in a small model laid out as VisionLanguageModel is, patched as docs/codebases.md says."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.nanovlm import add_spatial_tokens
from spatial_tokens.adapters.prepend import PrependSpatialTokens
from tests import reference
from tests.adapters.codebases import load, spatial_tokens
from tests.modules.checks import assert_equals_reference
from tests.tolerances import FLOAT64, assert_close, rounding

FILES = {
    "models/config.py": """
from dataclasses import dataclass, field


@dataclass
class VLMConfig:
    vit_hidden_dim: int = 3
    vit_patch_size: int = 2
    vit_img_size: int = 64
    lm_hidden_dim: int = 5

    mp_pixel_shuffle_factor: int = 4
    mp_image_token_length: int = 64
""",
    "models/modality_projector.py": """
from torch import nn


class ModalityProjector(nn.Module):

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.scale_factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.scale_factor**2, cfg.lm_hidden_dim, bias=False)

    def pixel_shuffle(self, x):
        bsz, seq, embed_dim = x.size()
        root, f = int(seq**0.5), self.scale_factor
        x = x.reshape(bsz, root // f, f, root // f, f, embed_dim).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(bsz, (root // f) ** 2, embed_dim * f**2)

    def forward(self, x):
        return self.proj(self.pixel_shuffle(x))
""",
    "models/vision_language_model.py": """
import json
import os
from dataclasses import asdict

import torch
from torch import nn
from safetensors.torch import load_model, save_model

from models.modality_projector import ModalityProjector
from models.config import VLMConfig

IMAGE_TOKEN_ID = 8


class VisionLanguageModel(nn.Module):

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.cfg = cfg
        self.vision_encoder = nn.Conv2d(1, cfg.vit_hidden_dim, cfg.vit_patch_size, stride=cfg.vit_patch_size)
        self.decoder = nn.Embedding(9, cfg.lm_hidden_dim)
        self.MP = ModalityProjector(cfg)

    def forward(self, input_ids, images):
        image_embd = self.MP(self.vision_encoder(images).flatten(2).transpose(1, 2))
        token_embd = self.decoder(input_ids).clone()
        token_embd[input_ids == IMAGE_TOKEN_ID] = image_embd.view(-1, image_embd.size(-1)).to(token_embd.dtype)
        return token_embd

    @classmethod
    def from_pretrained(cls, path):
        with open(os.path.join(path, "config.json"), "r") as f:
            model = cls(VLMConfig(**json.load(f)))
        load_model(model, os.path.join(path, "model.safetensors"))
        return model

    def save_pretrained(self, save_directory):
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "config.json"), "w") as f:
            f.write(json.dumps(asdict(self.cfg), indent=4))
        save_model(self, os.path.join(save_directory, "model.safetensors"))
""",
    "data/processors.py": """
def get_image_string(tokenizer, splitted_image_counts, mp_image_token_length):
    image_string = ""
    for n_h, n_w in splitted_image_counts:
        image_string += tokenizer.global_image_token + tokenizer.image_token * mp_image_token_length
        for i in range(n_h):
            for j in range(n_w):
                image_string += f"<row_{i + 1}_col_{j + 1}>" + tokenizer.image_token * mp_image_token_length
    return image_string
""",
    "train.py": """
import models.config as config
from data.processors import get_image_string
from models.vision_language_model import VisionLanguageModel


def train(vlm_cfg, tokenizer):
    text = get_image_string(tokenizer, [(2, 1)], vlm_cfg.mp_image_token_length)
    return text, VisionLanguageModel(vlm_cfg)


def main(tokenizer):
    vlm_cfg = config.VLMConfig()
    return train(vlm_cfg, tokenizer)
""",
}
NAMES = "models.config", "models.vision_language_model", "train"
TOKENIZER = SimpleNamespace(image_token="@", global_image_token="<global>")
SMALL = {"spatial_hidden_size": 2, "detail_kernel_size": 28}


def host(directory, *, patched):
    config, model, train = load(directory, FILES, *NAMES, patched=patched)
    return SimpleNamespace(VLMConfig=config.VLMConfig, Model=model.VisionLanguageModel, main=train.main)


@pytest.fixture
def nanovlm(tmp_path):
    return host(tmp_path / "patched", patched=True)


@pytest.fixture
def original(tmp_path):
    return host(tmp_path / "original", patched=False)


def pictures(tiles):
    return torch.randn(tiles, 1, 64, 64)


def ids(*counts):
    return torch.tensor([[1, *[8] * count, 2] for count in counts])


def test_its_own_tokens_stay_and_spatial_tokens_come_first(nanovlm):
    model, patches = nanovlm.Model(nanovlm.VLMConfig()), torch.randn(3, 1024, 3)
    own = model.MP(patches)
    projector = add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    tokens = model.MP(patches)
    assert model.MP is projector
    assert (projector.num_spatial_tokens, model.cfg.mp_image_token_length) == (6, 70)
    assert tokens.shape == (3, 70, 5)
    assert torch.equal(tokens[:, 6:], own)
    assert torch.equal(tokens[:, :6], projector.spatial_projector(patches))


def test_equals_the_reference(nanovlm):
    model = nanovlm.Model(nanovlm.VLMConfig(vit_img_size=16)).double()
    projector = add_spatial_tokens(model, "internvit-300m-448", **{**SMALL, "kernel_sizes": [2, 8], "detail_kernel_size": 4})

    def expected(parameters, patches):
        spatial = spatial_tokens(
            reference.part(parameters, "spatial_projector."),
            patches,
            grid_size=8,
            kernel_sizes=(2, 8),
            detail_kernel_size=4,
        )
        merged = [
            patches.reshape(-1, 8, 8, 3)[:, row : row + 4, column : column + 4].flatten(1) for row in (0, 4) for column in (0, 4)
        ]
        own = reference.linear(reference.part(parameters, "projector.proj."), torch.stack(merged, dim=1))
        return torch.cat([spatial, own], dim=1)

    assert_equals_reference(projector, expected, torch.randn(2, 64, 3, dtype=torch.float64), tolerance=FLOAT64)


def test_image_tokens_take_the_images_place(nanovlm):
    model, images = nanovlm.Model(nanovlm.VLMConfig()), pictures(3)
    add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    embeds = model(ids(3 * model.cfg.mp_image_token_length), images)
    tokens = model.MP(model.vision_encoder(images).flatten(2).transpose(1, 2))
    assert torch.equal(embeds[0, 1:-1], tokens.flatten(0, 1))
    embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in model.MP.parameters())


def test_the_loaders_count_what_the_model_gives(nanovlm, original):
    text, model = nanovlm.main(TOKENIZER)
    assert isinstance(model.MP, PrependSpatialTokens)
    assert text.count("@") == 3 * 70
    assert model(ids(text.count("@")), pictures(3)).shape == (1, 212, 5)
    text, model = original.main(TOKENIZER)
    assert text.count("@") == 3 * 64
    assert model(ids(text.count("@")), pictures(3)).shape == (1, 194, 5)


def test_a_count_that_was_not_raised_is_seen(nanovlm):
    model = nanovlm.Model(nanovlm.VLMConfig())
    add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        model(ids(64), pictures(1))


def test_saved_and_loaded(nanovlm, tmp_path):
    model, images = nanovlm.Model(nanovlm.VLMConfig()), pictures(2)
    add_spatial_tokens(model, "internvit-300m-448", **{**SMALL, "kernel_sizes": (4, 32)})
    model.save_pretrained(tmp_path / "model")
    again = nanovlm.Model.from_pretrained(tmp_path / "model")
    assert again.cfg.mp_image_token_length == model.cfg.mp_image_token_length == 66
    assert again.MP.spatial_projector.config == model.MP.spatial_projector.config
    text = ids(2 * 66)
    assert torch.equal(again(text, images), model(text, images))
    again.save_pretrained(tmp_path / "again")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again")]
    assert saved[0] == saved[1]


def test_an_old_model(nanovlm, original, tmp_path):
    old, images = original.Model(original.VLMConfig()), pictures(2)
    old.save_pretrained(tmp_path)
    model = nanovlm.Model.from_pretrained(tmp_path)
    assert torch.equal(model(ids(128), images), old(ids(128), images))
    add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    tokens = model(ids(140), images)[:, 1:-1].reshape(2, 70, 5)
    assert torch.equal(tokens[:, 6:].flatten(0, 1), old(ids(128), images)[0, 1:-1])


def test_bfloat16(nanovlm):
    model = nanovlm.Model(nanovlm.VLMConfig()).to(torch.bfloat16)
    projector = add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    patches = torch.randn(2, 1024, 3).to(torch.bfloat16)
    tokens = projector(patches)
    assert tokens.dtype == torch.bfloat16
    assert_close(tokens, projector.double()(patches.double()), rounding(torch.bfloat16, 8))


def test_a_config_that_could_not_remember(original):
    model = original.Model(original.VLMConfig())
    with pytest.raises(SpatialTokensError, match=r"has no cfg\.mp_spatial_tokens; expected .* added to its VLMConfig"):
        add_spatial_tokens(model, "internvit-300m-448")


def test_twice(nanovlm):
    model = nanovlm.Model(nanovlm.VLMConfig())
    add_spatial_tokens(model, "internvit-300m-448", **SMALL)
    with pytest.raises(SpatialTokensError, match="has spatial tokens already"):
        add_spatial_tokens(model, "internvit-300m-448", **SMALL)


def test_what_does_not_fit_leaves_the_model_alone(nanovlm):
    model = nanovlm.Model(nanovlm.VLMConfig())
    with pytest.raises(SpatialTokensError, match="text_hidden_size is 896, but the model's is 5; leave it out"):
        add_spatial_tokens(model, "internvit-300m-448", text_hidden_size=896)
    assert not isinstance(model.MP, PrependSpatialTokens)
    assert (model.cfg.mp_image_token_length, model.cfg.mp_spatial_tokens) == (64, None)


def test_another_model():
    with pytest.raises(SpatialTokensError, match="this Linear has no MP; expected nanoVLM's VisionLanguageModel"):
        add_spatial_tokens(nn.Linear(1, 1), "internvit-300m-448")
