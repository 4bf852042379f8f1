"""generate() of attached models: caches, beams, samples, several turns; what is left behind, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache, GenerationConfig

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, insert_slots
from spatial_tokens.adapters.huggingface.attach import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen


@pytest.fixture(scope="module", params=["llava", "qwen"])
def ready(request):
    """An attached model, its processor, and the text of an image."""
    if request.param == "llava":
        return *attach(*llava(), **FIELDS), "<image>"
    return *attach(*qwen(), resize="pool", **FIELDS), "<|vision_start|><|image_pad|><|vision_end|>"


def inputs_of(processor, texts, images):
    return processor(text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="left")


WORDS = 8  # the tokens after these stand for images, which a model of random weights would make too


def without_cache(model, inputs, steps):
    """The next tokens, each from a whole new forward pass."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, WORDS:] = -torch.inf
        following = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(following)], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(following)], dim=1)
    return inputs["input_ids"]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_greedy_is_a_loop_without_cache(ready, options):
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} What is this?", f"{place} a {place} b"], pictures(3))
    others = list(range(WORDS, model.get_input_embeddings().weight.shape[0]))
    made = model.generate(**inputs, max_new_tokens=4, suppress_tokens=others, eos_token_id=None, do_sample=False, **options)
    assert torch.equal(made, without_cache(model, inputs, 4))


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_rows_of_a_batch_are_what_they_are_alone(ready, options):
    model, processor, place = ready
    images = pictures(2)
    batch = inputs_of(processor, [f"{place} a?", f"{place} a?"], images)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    if options["do_sample"]:
        torch.manual_seed(0)
        made = model.generate(**batch, **options)
        torch.manual_seed(0)
        assert torch.equal(made, model.generate(**batch, **options))
        assert made.shape[0] == 6
        return
    alone = [model.generate(**inputs_of(processor, [f"{place} a?"], [image]), **options) for image in images]
    assert torch.equal(model.generate(**batch, **options), torch.cat(alone))


def test_every_beam_sees_its_own_image(ready):
    """The scores differ between images, so a beam that was given another row's tokens would show."""
    model, processor, place = ready
    images = pictures(2)
    options = {
        "max_new_tokens": 2,
        "num_beams": 2,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    batch = model.generate(**inputs_of(processor, [f"{place} a?", f"{place} a?"], images), **options).scores[0]
    alone = [model.generate(**inputs_of(processor, [f"{place} a?"], [image]), **options).scores[0] for image in images]
    finite = torch.isfinite(batch)
    torch.testing.assert_close(batch[finite], torch.cat(alone)[finite], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0][0][finite[0]], alone[1][0][finite[0]], atol=1e-6)


def test_the_reserved_token_is_never_made(ready):
    model, processor, place = ready
    model = copy.deepcopy(model)
    token = attachment_of(model).token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[token] = 100 * model.get_output_embeddings().weight.mean(0)
        model.get_output_embeddings().weight[token] += 100
    inputs = inputs_of(processor, [f"{place} a"], pictures(1))
    config = GenerationConfig(max_new_tokens=8, do_sample=True, eos_token_id=None, pad_token_id=0, suppress_tokens=[5])
    for options in ({"max_new_tokens": 8}, {"generation_config": config}, {"max_new_tokens": 8, "suppress_tokens": [5]}):
        made = model.generate(**inputs, **options)
        assert not (made[:, inputs["input_ids"].shape[1] :] == token).any()


def test_embedded_by_the_caller(ready):
    model, processor, place = ready
    inputs = dict(inputs_of(processor, [f"{place} a?"], pictures(1)))
    if model.config.model_type.startswith("qwen"):
        pytest.skip("this model makes its positions of the ids")
    expected = model(**inputs).logits
    ids = inputs.pop("input_ids")
    found = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(found, expected)


def test_a_second_turn_with_a_new_image():
    """With the first turn's cache: only the new text and its image are given; it equals the whole conversation at once."""
    model, processor = attach(*llava(), **FIELDS)
    first, second = pictures(2)
    cache = DynamicCache(config=model.config.get_text_config())
    before = inputs_of(processor, ["<image> a?"], [first])
    after = inputs_of(processor, [" b <image> c?"], [second])
    whole = inputs_of(processor, ["<image> a? b <image> c?"], [first, second])
    assert torch.equal(torch.cat([before["input_ids"], after["input_ids"]], dim=1), whole["input_ids"])
    with torch.no_grad():
        expected = model(**whole).logits[:, -1]
        model(**before, past_key_values=cache, use_cache=True)
        found = model(input_ids=after["input_ids"], pixel_values=after["pixel_values"], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What is refused, and what is left behind


def test_chunked_prefill_is_refused():
    model, processor = attach(*llava(), **FIELDS)
    inputs = inputs_of(processor, ["<image> a?"], pictures(1))
    with pytest.raises((SpatialTokensError, ValueError), match="prefill"):
        model.generate(**inputs, prefill_chunk_size=64, max_new_tokens=2)


def test_slots_without_images_and_images_without_slots(ready):
    model, processor, place = ready
    good = inputs_of(processor, ["a b", f"{place} a"], pictures(1))
    ids = {"input_ids": good["input_ids"], "attention_mask": good["attention_mask"]}
    slots = good["input_ids"] == attachment_of(model).token_id
    with pytest.raises(SpatialTokensError, match="row 1 has 6 places for spatial tokens, but no image was encoded"):
        model(input_ids=good["input_ids"].masked_fill(good["input_ids"] == attachment_of(model).anatomy.image_token_id, 5))
    with pytest.raises(SpatialTokensError, match="row 1 has an image without places for spatial tokens before it"):
        model(**{**good, "input_ids": good["input_ids"].masked_fill(slots, 5)})
    one_less = good["input_ids"].clone()
    one_less[slots.nonzero()[0][0], slots.nonzero()[0][1]] = 5
    with pytest.raises(SpatialTokensError, match="row 1 has 5 places for spatial tokens, which is no multiple of 6"):
        model(**{**good, "input_ids": one_less})
    model(**good)
    assert ids["input_ids"].shape == good["input_ids"].shape


@pytest.mark.parametrize("place_of_fault", ["language model", "vision tower"])
def test_an_interrupted_call_leaves_nothing(place_of_fault):
    model, processor = attach(*llava(), **FIELDS)
    inputs = inputs_of(processor, ["<image> a?"], pictures(1))
    text = processor(text="a b c", return_tensors="pt")
    expected, of_text = model(**inputs).logits, model(**text).logits

    def fail(*_):
        raise RuntimeError("interrupted")

    part = model.get_decoder().layers[0] if place_of_fault == "language model" else attachment_of(model).anatomy.tap
    hook = part.register_forward_hook(fail)
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="interrupted"):
            call()
    hook.remove()
    assert torch.equal(model(**text).logits, of_text)
    with pytest.raises(SpatialTokensError, match="no image was encoded in this call"):
        model(input_ids=inputs["input_ids"].masked_fill(inputs["input_ids"] == attachment_of(model).anatomy.image_token_id, 5))
    assert torch.equal(model(**inputs).logits, expected)


def test_drafts_that_copy_a_part_of_the_slots():
    """Prompt lookup drafts whatever followed the last words before; the slots are among it, and never accepted."""
    model, processor = attach(*llava(), **FIELDS)
    inputs = inputs_of(processor, ["a<image> b"], pictures(1))
    wanted = processor.tokenizer.convert_tokens_to_ids("a")
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([wanted]), 1e3))
    made = model.generate(**inputs, prompt_lookup_num_tokens=4, max_new_tokens=6, do_sample=False)
    assert (made[0, -6:] == wanted).all()


def test_two_models_and_two_threads():
    pairs = [attach(*llava(seed), **FIELDS) for seed in (1, 2)]
    batches = [inputs_of(processor, ["<image> a?"], pictures(1, seed=seed)) for seed, (_, processor) in enumerate(pairs)]
    with torch.no_grad():
        expected = [model(**inputs).logits for (model, _), inputs in zip(pairs, batches, strict=True)]

        def run(number):
            with torch.no_grad():
                return [pairs[number][0](**batches[number]).logits for _ in range(4)]

        with ThreadPoolExecutor(2) as pool:
            for number, found in enumerate(pool.map(run, range(2))):
                assert all(torch.equal(each, expected[number]) for each in found)


def test_slots_of_the_processor_are_those_of_insert_slots():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    texts, images = ["<image> a?", "b", "<image> c <image>"], pictures(3)
    theirs = inputs_of(processor, texts, images)
    ours = insert_slots(model, inputs_of(plain, texts, images), tokens_per_image=576, pad_token_id=plain.tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
