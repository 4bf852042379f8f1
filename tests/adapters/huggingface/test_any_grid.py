"""A projector of factorized kernels in models whose pictures have patch grids of their own."""

import pytest
import torch

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.api import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen
from tests.tolerances import assert_close

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = ((48, 32), (32, 48), (40, 40), (16, 16))
SMALL = {"rank": 8, **FIELDS}


def inputs_of(processor, sizes):
    images = [pictures(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    return processor(images=images, text=[IMAGE * len(sizes) + "What is this?"], return_tensors="pt")


def spatial_tokens(model, inputs):
    """What the language model is given at the placeholders, and what the projector was given."""
    seen, given = [], []
    hooks = [
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
        model.spatial_tokens.register_forward_pre_hook(lambda _, args: given.append(args)),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen[0][inputs["input_ids"] == attachment_of(model).token_id].unflatten(0, (-1, 6)), given


def test_pictures_of_several_sizes_in_one_batch():
    """Each picture's tokens are those of its own patches on its own grid, whatever is beside it."""
    model, processor = attach(*qwen(), "factorized-cropping", **FIELDS)
    assert model.spatial_tokens.config.grid_size == (24, 24)
    assert model.spatial_tokens.config.rank == 4, "an eighth of the channels, as in the preset"
    together, (given,) = spatial_tokens(model, inputs_of(processor, SIZES))
    assert given[1] == [(height // 4, width // 4) for width, height in SIZES]
    for i, size in enumerate(SIZES):
        image = pictures(1, size, seed=i)
        alone, (given,) = spatial_tokens(model, processor(images=image, text=[IMAGE], return_tensors="pt"))
        assert given[1] == (size[1] // 4, size[0] // 4)
        assert_close(together[i], alone[0])


def test_a_model_of_another_grid():
    """24 x 24 patches are read by a projector whose windows are given on 12 x 12."""
    config = SPProjectorConfig(
        vision_hidden_size=64,
        text_hidden_size=64,
        grid_size=12,
        kernel_sizes=(4, 12),
        detail_kernel_size=8,
        patch_head=None,
        **SMALL,
    )
    projector = SPProjector.from_config(config)
    model, processor = attach(*llava(), projector)
    features = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    seen = []
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model(**inputs)
    hook.remove()
    assert_close(seen[0][inputs["input_ids"] == attachment_of(model).token_id], projector(features[0], (24, 24))[0])


def test_resize_still_brings_all_to_the_projectors_grid():
    model, processor = attach(*qwen(), "factorized-cropping", resize="pool", **FIELDS)
    _, (given,) = spatial_tokens(model, inputs_of(processor, SIZES[:2]))
    assert len(given) == 1
    assert given[0].shape == (2, 576, 32)


def test_saved_and_loaded(tmp_path):
    base, plain = qwen()
    model, processor = attach(base, plain, "factorized-pooling", **FIELDS)
    inputs = inputs_of(processor, SIZES)
    with torch.no_grad():
        expected = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    save_adapter(model, tmp_path)
    detach(model)
    loaded, _ = load_adapter(base, tmp_path, plain)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3, do_sample=False), generated)


def test_training_with_and_without_pictures():
    model, processor = attach(*qwen(), "factorized-cropping", **FIELDS)
    model.train()
    inputs = inputs_of(processor, SIZES)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.spatial_tokens.parameters())
    assert model.spatial_tokens.extractor.kernels.channel_projection.weight.grad.any()
    model.zero_grad()
    text = processor(text=["What is this?"], return_tensors="pt")
    model(**text, labels=text["input_ids"]).loss.backward()
    assert not any(each.grad.any() for each in model.spatial_tokens.parameters())


def test_dense_kernels_say_what_they_need():
    with pytest.raises(SpatialTokensError, match="give rank=128, for factorized kernels, which read any grid, or resize='pool'"):
        attach(*qwen(), "llava-sp-cropping", **FIELDS)
