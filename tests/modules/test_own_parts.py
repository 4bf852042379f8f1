"""Projectors of the caller's own parts: saved, loaded, attached, and refused where they cannot be described."""

import json

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError, SPProjector
from spatial_tokens.modules import DetailFeatureIntegrator, LinearHead, MLPHead
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor

PATCHES = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))


class Quadrants(nn.Module):
    """A token from each quarter of the grid: a linear map of its mean."""

    num_spatial_tokens = 4

    def __init__(self, vision_hidden_size, spatial_hidden_size, *, grid_size, options=None):
        super().__init__()
        self.vision_hidden_size, self.spatial_hidden_size = vision_hidden_size, spatial_hidden_size
        self.grid_size, self.options = grid_size, options
        self.linear = nn.Linear(vision_hidden_size, spatial_hidden_size)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, patches):
        height, width = self.grid_size
        quarters = patches.reshape(patches.shape[0], 2, height // 2, 2, width // 2, -1).mean((2, 4)).flatten(1, 2)
        return self.linear(quarters) * self.scale


def with_quadrants(**options):
    return SPProjector(Quadrants(6, 8, grid_size=(4, 4), **options), None, MLPHead(8, 10), MLPHead(6, 10))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: with_quadrants(options={"sizes": (1, (2, 3)), "name": "a", "bias": True, "rate": 0.5, "none": None}), [Quadrants]),
        (
            lambda: SPProjector(
                SlidingWindowExtractor(6, 8, grid_size=4, kernel_size=2),
                DetailFeatureIntegrator(6, 8, grid_size=4, kernel_size=2), LinearHead(16, 10, bias=False), None,
            ),
            [],
        ),
        (
            lambda: SPProjector(
                TransformerExtractor(6, grid_size=4, kernel_sizes=(2, 4), num_layers=1, num_heads=2, feedforward_size=8),
                None, LinearHead(6, 10), MLPHead(6, 10),
            ),
            [],
        ),
    ],
    ids=["own", "sliding window, integrator", "transformer"],
)  # fmt: skip
def test_what_was_saved_is_loaded(tmp_path, make, parts):
    projector = make().eval()
    projector.save_pretrained(tmp_path)
    loaded = SPProjector.from_pretrained(tmp_path, parts=parts).eval()
    assert torch.equal(loaded(PATCHES), projector(PATCHES))
    assert loaded.to_dict() == projector.to_dict()
    assert {type(part) for part in loaded.children()} == {type(part) for part in projector.children()}
    assert json.loads((tmp_path / "config.json").read_text())["library"].startswith("spatial-tokens ")


def test_a_class_is_never_imported_because_a_file_names_it(tmp_path):
    with_quadrants().save_pretrained(tmp_path)
    with pytest.raises(SpatialTokensError, match=r"the extractor is a Quadrants.*give the class: parts=\[Quadrants\]"):
        SPProjector.from_pretrained(tmp_path)
    other = type("Quadrants", (nn.Module,), {})
    with pytest.raises(SpatialTokensError, match="two classes are called Quadrants"):
        SPProjector.from_pretrained(tmp_path, parts=[Quadrants, other])
    with pytest.raises(SpatialTokensError, match=r"parts must be a list of nn.Module classes, got"):
        SPProjector.from_pretrained(tmp_path, parts=[with_quadrants()])
    with pytest.raises(SpatialTokensError, match=r"the extractor cannot be built: Quadrants: .*unexpected keyword"):
        SPProjector.from_pretrained(tmp_path, parts=[other])


def test_a_part_must_have_its_arguments_as_attributes(tmp_path):
    for extractor, why in (
        (nn.Sequential(nn.Linear(6, 8)), r"a Sequential, and its constructor takes any number of arguments \(\*args"),
        (nn.Linear(6, 8), "a Linear, and it has no attribute 'bias' with the plain value"),
        (torch.compile(Quadrants(6, 8, grid_size=(4, 4))), "an? OptimizedModule, and .*merge or unload it first"),
    ):
        projector = SPProjector(extractor, None, MLPHead(8, 10), None)
        with pytest.raises(SpatialTokensError, match=f"no SPProjectorConfig describes a projector with {why}"):
            projector.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
    wrapped = with_quadrants()
    wrapped.extractor.linear = nn.Sequential(wrapped.extractor.linear)
    with pytest.raises(SpatialTokensError, match=r"missing: extractor.linear.weight.*unexpected: extractor.linear.0"):
        wrapped.save_pretrained(tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("patch_head"), "a description of parts has extractor, integrator, spatial_head"),
        (lambda parts: parts.update(extractor="Quadrants"), "the extractor must have a class and arguments, got 'Quadrants'"),
        (
            lambda parts: parts["spatial_head"]["arguments"].update(out_features=-1),
            "spatial_head: out_features must be a",
        ),
    ],
)
def test_edited_descriptions(change, message):
    values = with_quadrants().to_dict()
    change(values["parts"])
    with pytest.raises(SpatialTokensError, match=message):
        SPProjector.from_dict(values, [Quadrants])


def test_attached_saved_and_loaded(tmp_path):
    pytest.importorskip("transformers")
    from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
    from spatial_tokens.adapters.huggingface.ready import tiny_llava
    from spatial_tokens.visualize import sample_picture

    base, plain = tiny_llava()
    projector = SPProjector(Quadrants(64, 8, grid_size=(24, 24)), None, MLPHead(8, 64), None)
    model, processor = attach(base.eval(), plain, projector)
    inputs = processor(images=sample_picture(), text="<image> What?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|spatial|>")).sum() == 4
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    with pytest.raises(SpatialTokensError, match="the extractor is a Quadrants"):
        load_adapter(base, tmp_path, plain)
    model, _ = load_adapter(base, tmp_path, plain, parts=[Quadrants])
    assert torch.equal(model(**inputs).logits, logits)
