"""Maps of a model that nothing is attached to, beside those that `attach` takes and those of the encoder's own hidden states."""

import pytest
import torch

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.encoder_maps import PROJECTOR, patch_maps
from spatial_tokens.adapters.huggingface.model_parts import find_parts
from tests.adapters.huggingface.tiny import MODELS, needs_known_transformers, prototype


def of(name, monkeypatch):
    """A model's maps, those that `attach` has of the same pictures, and the model."""
    from copy import deepcopy

    tiny, model = MODELS[name], deepcopy(prototype(name))
    inputs = tiny.inputs(tiny.pictures([2, 1]))
    with torch.no_grad():
        maps = patch_maps(find_parts(model), inputs)
    attach(model, None, **{"spatial_hidden_size": 8, **tiny.attach})
    taken = []
    attachment = attachment_of(model)
    monkeypatch.setattr(attachment, "tokens", lambda found: taken.extend(found) or torch.zeros(len(found), 6, 1))
    names = {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes"}
    with torch.no_grad():
        outputs = model.base_model.get_image_features(**{name: each for name, each in inputs.items() if name in names})
    return maps, outputs._spatial_features.maps, model


@needs_known_transformers
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "mistral3"])
def test_the_projectors_maps_are_those_that_attach_takes(name, monkeypatch):
    maps, taken, _ = of(name, monkeypatch)
    assert [each.shape for each in maps[PROJECTOR]] == [each.shape for each in taken]
    assert all(torch.equal(*each) for each in zip(maps[PROJECTOR], taken, strict=True))
    assert list(maps)[-1] == PROJECTOR
    assert list(maps)[:-1] == [str(number + 1) for number in range(len(maps) - 1)]
    assert len(maps) > 1
    for found in maps.values():
        assert [each.shape[0] % given.shape[0] for each, given in zip(found, taken, strict=True)] == [0] * len(taken)


@needs_known_transformers
@pytest.mark.parametrize(("name", "layer"), [("llava", -2), ("qwen2_vl", -1), ("qwen2_5_vl", -1)])
def test_the_block_whose_output_is_projected_has_the_same_map(name, layer, monkeypatch):
    maps, taken, _ = of(name, monkeypatch)
    block = list(maps.values())[:-1][layer]
    assert all(torch.equal(*each) for each in zip(block, taken, strict=True))


def test_a_projector_that_is_not_called_is_said():
    model = prototype("llava")
    parts = find_parts(model)
    parts.projector = torch.nn.Identity()
    with pytest.raises(SpatialTokensError, match="was not called"), torch.no_grad():
        patch_maps(parts, MODELS["llava"].inputs(MODELS["llava"].pictures([1])))
