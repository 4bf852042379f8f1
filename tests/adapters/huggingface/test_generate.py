"""generate() of attached models: caches, beams, samples, several turns; what is left behind, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache, GenerationConfig, InfNanRemoveLogitsProcessor, LogitsProcessorList

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach, insert_placeholders
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.processing import without_placeholders
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
    images, texts = pictures(2), [f"{place} a?", f"a? {place}"]
    batch = inputs_of(processor, texts, images)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    if options["do_sample"]:
        torch.manual_seed(0)
        made = model.generate(**batch, **options)
        torch.manual_seed(0)
        assert torch.equal(made, model.generate(**batch, **options))
        assert made.shape[0] == 6
        return
    alone = [model.generate(**inputs_of(processor, [text], [image]), **options) for text, image in zip(texts, images, strict=True)]
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


SAMPLED = GenerationConfig(max_new_tokens=8, do_sample=True, eos_token_id=None, pad_token_id=0, suppress_tokens=[5])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"generation_config": SAMPLED}, {"suppress_tokens": [5]}, {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4}, {"logits_processor": LogitsProcessorList([InfNanRemoveLogitsProcessor()])},
    ],
)  # fmt: skip
def test_the_reserved_token_is_never_made(options):
    """A tokenizer's next id may be that of a row that the base has, and its head a column."""
    base, plain = llava()
    base.resize_token_embeddings(128, mean_resizing=False)
    model, processor = attach(base, plain, **FIELDS)
    token = attachment_of(model).token_id
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([token]), 1e3))
    inputs = inputs_of(processor, ["<image> a"], pictures(1))
    assert (model(**inputs).logits.argmax(-1) == token).all(), "it would be, in a loop of one's own"
    made = model.generate(**inputs, **{"max_new_tokens": 8, **options})
    assert made.shape[1] > inputs["input_ids"].shape[1]
    assert not (made[:, inputs["input_ids"].shape[1] :] == token).any()


def test_logits_processors_of_the_callers(ready):
    """They are asked, as well as ours."""
    model, processor, place = ready

    def only(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([5]), 0)

    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    made = model.generate(**inputs, **TURN, logits_processor=LogitsProcessorList([only]))
    assert made[0, inputs["input_ids"].shape[1] :].tolist() == [5] * TURN["max_new_tokens"]


def test_a_generate_of_the_models_own():
    """A method that somebody has set on the model is the one that is called, and is there again after detach."""
    base, plain = llava()
    base.generate = own = lambda input_ids, **options: input_ids
    model, processor = attach(base, plain, **FIELDS)
    inputs = inputs_of(processor, ["<image> a?"], pictures(1))
    assert torch.equal(model.generate(inputs["input_ids"]), inputs["input_ids"])
    assert detach(model).generate is own


def test_ids_without_their_name(ready):
    model, processor, place = ready
    inputs = dict(inputs_of(processor, [f"{place} a?"], pictures(1)))
    expected = model.base_model(**inputs).last_hidden_state
    assert torch.equal(model.base_model(inputs.pop("input_ids"), **inputs).last_hidden_state, expected)


def test_images_encoded_by_the_caller(ready):
    model, processor, place = ready
    inputs = dict(inputs_of(processor, [f"{place} a?"], pictures(1)))
    expected = model(**inputs).logits
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in inputs}
    encoded = {"image": model.get_image_features(**pixels)}
    grid = {name: each for name, each in pixels.items() if name != "pixel_values"}
    assert torch.equal(model(**inputs, **grid, mm_encoder_outputs=encoded).logits, expected)


def test_embedded_by_the_caller():
    """Padding is no place, though its row of the embeddings is of zeros."""
    model, processor = attach(*llava(), **FIELDS)
    inputs = dict(inputs_of(processor, ["<image> a?", "<image> a b c"], pictures(2)))
    with torch.no_grad():
        model.get_input_embeddings().weight[inputs["input_ids"][0, 0]] = 0
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


TURN = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def test_turn_after_turn_with_generate():
    """Each turn is given the whole text, its own image and the cache of the turns before; without the cache it says the same."""
    model, processor = attach(*llava(), **FIELDS)
    options = {**TURN, "suppress_tokens": list(range(WORDS, model.get_input_embeddings().weight.shape[0]))}
    images, cache = pictures(3), DynamicCache(config=model.config.get_text_config())
    ids = torch.empty(1, 0, dtype=torch.long)
    for turn, image in enumerate(images):
        new = inputs_of(processor, [f" b <image> {turn}?"], [image])
        ids = torch.cat([ids, new["input_ids"]], dim=1)
        mask, pixels = torch.ones_like(ids), inputs_of(processor, ["<image>" * (turn + 1)], images[: turn + 1])["pixel_values"]
        whole = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)
        made = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=new["pixel_values"], past_key_values=cache, **options
        )
        assert torch.equal(made, whole)
        ids = made


def test_a_second_turn_of_qwen():
    """Its positions are those of the whole conversation, which the caller gives."""
    model, processor = attach(*qwen(), resize="pool", **FIELDS)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    first, second = pictures(1, (48, 32)), pictures(1, (32, 64), seed=1)
    whole = inputs_of(processor, [f"What {place} is this {place} ?"], first + second)
    before, after = inputs_of(processor, [f"What {place}"], first), inputs_of(processor, [f" is this {place} ?"], second)
    assert torch.equal(torch.cat([before["input_ids"], after["input_ids"]], dim=1), whole["input_ids"])
    length = before["input_ids"].shape[1]
    types = {"mm_token_type_ids": (whole["input_ids"] == model.config.image_token_id).long()}
    positions, _ = model.model.get_rope_index(whole["input_ids"], image_grid_thw=whole["image_grid_thw"], **types)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        expected = model(**{**whole, **types}).logits[:, length:]
        for inputs, part in ((before, slice(None, length)), (after, slice(length, None))):
            given = {name: inputs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
            found = model(**given, position_ids=positions[..., part], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_samples_are_those_of_their_seed(ready):
    """Of any cache, with two, one and no images; and what the model says is not the reserved token, nor certain."""
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a {place}", f"is {place}", "is this"], pictures(3))
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2, "eos_token_id": None}
    made = []
    for cache, seed in (("dynamic", 0), ("static", 0), ("dynamic", 1)):
        torch.manual_seed(seed)
        made.append(model.generate(**inputs, cache_implementation=cache, **options))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].shape[0] == 6


def test_generated_from_embeddings(ready):
    model, processor, place = ready
    inputs = dict(inputs_of(processor, [f"{place} a?"], pictures(1)))
    expected = model.generate(**inputs, **TURN)[:, inputs["input_ids"].shape[1] :]
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs.pop("mm_token_type_ids", None)
    assert torch.equal(model.generate(**inputs, inputs_embeds=embeddings, **TURN), expected)


def test_a_cache_and_the_new_words_alone():
    """generate() takes the whole conversation, or what is new in it."""
    model, processor = attach(*llava(), **FIELDS)
    first, second = pictures(2)
    before, new = inputs_of(processor, ["<image> a?"], [first]), inputs_of(processor, [" b <image> c?"], [second])
    ids = torch.cat([before["input_ids"], new["input_ids"]], dim=1)
    made = []
    for given in (ids, new["input_ids"]):
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**before, past_key_values=cache, use_cache=True)
        made.append(model.generate(
            input_ids=given, attention_mask=torch.ones_like(ids), pixel_values=new["pixel_values"], past_key_values=cache, **TURN
        )[0, -3:])  # fmt: skip
    assert torch.equal(*made)


def test_ids_beside_embeddings(ready):
    """The ids are for penalties; the embeddings are what is read."""
    model, processor, place = ready
    if model.config.model_type.startswith("qwen"):
        pytest.skip("this model makes its positions of the ids")
    inputs = dict(inputs_of(processor, [f"{place} a?"], pictures(1)))
    seen = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    ids = inputs["input_ids"]
    expected = model.generate(**inputs, **TURN)
    found = model.generate(input_ids=ids, inputs_embeds=seen[0], attention_mask=inputs["attention_mask"], **TURN)
    assert torch.equal(found[:, -3:], expected[:, -3:])


def test_the_stand_in_takes_no_share_of_penalties(ready):
    """It is a token that no answer has, so a penalty of what the prompt has changes no other score than without it."""
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    stand_in = attachment_of(model).token.stand_in
    assert stand_in == (1 if model.config.model_type == "llava" else stand_in)
    options = {**TURN, "output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    made = model.generate(**inputs, **options, repetition_penalty=2.0)
    scores, logits = made.scores[0][0], made.logits[0][0]
    changed = set((scores != logits).nonzero().flatten().tolist())
    assert changed <= {*inputs["input_ids"][0].tolist(), stand_in}


def test_without_gradients_and_without_names(ready):
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    expected = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"output_scores": True}])
def test_generate_sees_the_vocabulary_of_the_base(ready, options):
    """Penalties are of the ids in the prompt; what comes back has the prompt as it was given."""
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    made = model.generate(**inputs, **TURN, output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(made.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert {each.shape[-1] for each in (*made.logits, *(made.scores or ()))} == {model.config.get_text_config().vocab_size}


@pytest.mark.parametrize("attached", [False, True])
def test_an_assistant(ready, attached):
    """Of the same vocabulary, without or with spatial tokens: it drafts from the text alone; the answer is the model's own."""
    model, processor, place = ready
    assistant = copy.deepcopy(model) if attached else detach(copy.deepcopy(model))
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    options = {**TURN, "max_new_tokens": 6, "suppress_tokens": list(range(WORDS, model.config.get_text_config().vocab_size))}
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), model.generate(**inputs, **options))


def test_a_streamer_is_given_the_prompt(ready):
    model, processor, place = ready
    inputs, seen = inputs_of(processor, [f"{place} a?"], pictures(1)), []

    class Streamer:
        def put(self, value):
            seen.append(value.flatten())

        def end(self):
            seen.append(torch.empty(0, dtype=torch.long))

    made = model.generate(**inputs, **TURN, streamer=Streamer())
    assert torch.equal(torch.cat(seen), made[0])


@pytest.mark.parametrize("length", [4, 6, 10, 20])
def test_drafts_from_the_prompt(length):
    """The words after the last one's like are drafted: the slots of the image. The model rejects them."""
    model, processor = attach(*llava(), **FIELDS)
    word = processor.tokenizer.convert_tokens_to_ids("a")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([word]), 1e3))
    inputs = inputs_of(processor, ["a<image> b"], pictures(1))
    made = model.generate(**inputs, **{**TURN, "max_new_tokens": 6}, prompt_lookup_num_tokens=length)
    assert made[0, inputs["input_ids"].shape[1] :].tolist() == [word] * 6


# What is refused, and what is left behind


@pytest.mark.parametrize("size", [64, 700])
def test_chunks_of_a_prefill(size):
    """The first chunk holds the placeholders: the answer is that of a prefill at once."""
    model, processor = attach(*llava(), **FIELDS)
    inputs = inputs_of(processor, ["<image> a?"], pictures(1))
    options = {**TURN, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (
        torch.stack(model.generate(**inputs, **options, prefill_chunk_size=each).logits) for each in (None, size)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_of_a_prefill_that_separate_placeholders(ready):
    """Refused; nothing is left."""
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a {place}"], pictures(2))
    expected = model.generate(**inputs, **TURN)
    with pytest.raises((SpatialTokensError, ValueError), match=r"prefill|places for the spatial tokens of \[1\] images"):
        model.generate(**inputs, prefill_chunk_size=16, **TURN)
    assert torch.equal(model.generate(**inputs, **TURN), expected)


def test_generate_with_slots_but_no_image(ready):
    model, processor, place = ready
    inputs = inputs_of(processor, ["a b", f"{place} a"], pictures(1))
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == attachment_of(model).parts.image_token_id, 5)
    with pytest.raises(SpatialTokensError, match="row 1 has 6 places for spatial tokens, but no image was encoded"):
        model.generate(input_ids=ids, attention_mask=inputs["attention_mask"], **TURN)


def test_one_image_of_a_row_without_slots(ready):
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a", f"{place} a {place}"], pictures(3))
    slots = (inputs["input_ids"][1] == attachment_of(model).token_id).nonzero().flatten()
    ids = inputs["input_ids"].clone()
    ids[1, slots[6:]] = 5
    with pytest.raises(SpatialTokensError, match=r"places for the spatial tokens of \[1, 1\] images, but 3 were encoded"):
        model(**{**inputs, "input_ids": ids})


def test_a_processor_without_slots(ready):
    """What the model's own processor makes: refused, and not answered as if there were no spatial tokens."""
    model, processor, place = ready
    plain = without_placeholders(copy.copy(processor))
    inputs = inputs_of(plain, ["a b", f"{place} a"], pictures(1))
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, **TURN)):
        with pytest.raises(SpatialTokensError, match="row 1 has an image without places for spatial tokens before it"):
            call()


def test_images_that_were_encoded_for_nothing(ready):
    """The caller looks at features, and then asks something without an image."""
    model, processor, place = ready
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    text = inputs_of(processor, ["is this"], [])
    expected = model(**text).logits
    model.get_image_features(**pixels)
    assert torch.equal(model(**text).logits, expected)
    model.get_image_features(**pixels)
    with pytest.raises(SpatialTokensError, match="no image was encoded in this call"):
        model(input_ids=inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, 5))


def test_slots_without_images_and_images_without_slots(ready):
    model, processor, place = ready
    good = inputs_of(processor, ["a b", f"{place} a"], pictures(1))
    ids = {"input_ids": good["input_ids"], "attention_mask": good["attention_mask"]}
    slots = good["input_ids"] == attachment_of(model).token_id
    with pytest.raises(SpatialTokensError, match="row 1 has 6 places for spatial tokens, but no image was encoded"):
        model(input_ids=good["input_ids"].masked_fill(good["input_ids"] == attachment_of(model).parts.image_token_id, 5))
    with pytest.raises(SpatialTokensError, match="row 1 has an image without places for spatial tokens before it"):
        model(**{**good, "input_ids": good["input_ids"].masked_fill(slots, 5)})
    one_less = good["input_ids"].clone()
    one_less[slots.nonzero()[0][0], slots.nonzero()[0][1]] = 5
    with pytest.raises(SpatialTokensError, match="row 1 has 5 places for spatial tokens, which is no multiple of 6"):
        model(**{**good, "input_ids": one_less})
    model(**good)
    assert ids["input_ids"].shape == good["input_ids"].shape


def test_interrupted_while_it_generates(ready):
    """After the image's tokens were made, and in the third step."""
    model, processor, place = ready
    inputs, text = inputs_of(processor, [f"{place} a?"], pictures(1)), inputs_of(processor, ["is this"], [])
    expected, of_text = model.generate(**inputs, **TURN), model.generate(**text, **TURN)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) in (1, 4):
            raise RuntimeError("interrupted")

    hook = model.get_decoder().layers[0].register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="interrupted"):
            model.generate(**inputs, **TURN)
    hook.remove()
    assert torch.equal(model.generate(**text, **TURN), of_text)
    assert torch.equal(model.generate(**inputs, **TURN), expected)


@pytest.mark.parametrize("place_of_fault", ["language model", "vision tower"])
def test_an_interrupted_call_leaves_nothing(place_of_fault):
    model, processor = attach(*llava(), **FIELDS)
    inputs = inputs_of(processor, ["<image> a?"], pictures(1))
    text = processor(text="a b c", return_tensors="pt")
    expected, of_text = model(**inputs).logits, model(**text).logits

    def fail(*_):
        raise RuntimeError("interrupted")

    part = model.get_decoder().layers[0] if place_of_fault == "language model" else attachment_of(model).parts.projector
    hook = part.register_forward_hook(fail)
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="interrupted"):
            call()
    hook.remove()
    assert torch.equal(model(**text).logits, of_text)
    with pytest.raises(SpatialTokensError, match="no image was encoded in this call"):
        model(input_ids=inputs["input_ids"].masked_fill(inputs["input_ids"] == attachment_of(model).parts.image_token_id, 5))
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


def test_two_models_that_generate_in_two_threads(ready):
    model, processor, place = ready
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in other.spatial_tokens.parameters():
            each.mul_(3)
    inputs = inputs_of(processor, [f"{place} a?"], pictures(1))

    def logits(each):
        made = each.generate(**inputs, **TURN, output_logits=True, return_dict_in_generate=True)
        return torch.stack(made.logits)

    expected = [logits(each) for each in (model, other)]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda each: [logits(each) for _ in range(4)], (model, other)))
    assert all(torch.equal(each, expected[number]) for number in range(2) for each in found[number])


def test_the_processor_does_what_insert_placeholders_does():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    texts, images = ["<image> a?", "b", "<image> c <image>"], pictures(3)
    theirs = inputs_of(processor, texts, images)
    ours = insert_placeholders(
        model, inputs_of(plain, texts, images), tokens_per_image=576, pad_token_id=plain.tokenizer.pad_token_id
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
