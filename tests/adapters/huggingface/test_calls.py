"""Calls of one attached model do not meet: several threads, interruptions, turns, copies for several devices, compiled code."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach
from spatial_tokens.adapters.huggingface.api import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen

GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=["llava-own", "llava-image", "qwen-own", "qwen-image"])
def ready(request):
    """An attached model, and the inputs of two requests: one image, and two."""
    family, mode = request.param.split("-")
    base, plain = llava() if family == "llava" else qwen()
    model, processor = attach(base, plain, mode=mode, resize=None if family == "llava" else "pool", **FIELDS)
    place = "<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [f"{place} is", f"What {place} is {place}", "is this"]
    images = pictures(3)
    given = [images[:1], images[1:], None]
    return model, [
        processor(images=each, text=[text], return_tensors="pt") for text, each in zip(texts, given, strict=True)
    ]  # fmt: skip


def alone(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_one_model_in_several_threads(ready):
    model, requests = ready
    expected = [alone(model, each) for each in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: alone(model, requests[i % 3]), range(24)))
    assert all(torch.equal(each, expected[i % 3]) for i, each in enumerate(found))


def test_one_model_that_generates_in_several_threads(ready):
    model, requests = ready
    expected = [model.generate(**each, **GREEDY) for each in requests]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: model.generate(**requests[i % 3], **GREEDY), range(9)))
    assert all(torch.equal(each, expected[i % 3]) for i, each in enumerate(found))


@pytest.mark.parametrize("call", [alone, lambda model, inputs: model.generate(**inputs, **GREEDY)], ids=["forward", "generate"])
def test_a_request_at_its_language_model_when_another_has_encoded(ready, call):
    """The first request waits before its language model until the second has encoded its image."""
    model, (first, second, _) = ready
    expected = [call(model, each) for each in (first, second)]
    arrived, encoded, names = threading.Event(), threading.Event(), {}

    def wait(*_):
        if names.get("first") == threading.get_ident() and not arrived.is_set():
            arrived.set()
            assert encoded.wait(20)

    def tell(*_):
        if names.get("second") == threading.get_ident():
            encoded.set()

    hooks = [
        model.get_decoder().register_forward_pre_hook(wait, prepend=True),
        attachment_of(model).parts.projector.register_forward_hook(tell),
    ]

    def run(name, inputs):
        names[name] = threading.get_ident()
        if name == "second":
            assert arrived.wait(20)
        return call(model, inputs)

    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, ("first", "second"), (first, second)))
    finally:
        for hook in hooks:
            hook.remove()
    assert arrived.is_set()
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("generating", [False, True])
def test_an_interrupted_call_keeps_no_features(ready, error, generating):
    model, (inputs, _, text) = ready
    expected = [alone(model, each) for each in (inputs, text)]
    seen = []

    def fail(*_):
        raise error

    hooks = [
        attachment_of(model).parts.projector.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0]))),
        model.get_decoder().layers[0].register_forward_hook(fail),
    ]
    try:
        with pytest.raises(error):
            model.generate(**inputs, **GREEDY) if generating else alone(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    gc.collect()
    assert seen
    assert not any(each() is not None for each in seen)
    assert all(torch.equal(alone(model, each), logits) for each, logits in zip((inputs, text), expected, strict=True))


@pytest.mark.parametrize("place", ["after the projector", "before the language model"])
def test_a_failed_call_is_over(place):
    """Nothing of it is kept, and the caller embeds ids as before it."""
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    expected = model.get_input_embeddings()(inputs["input_ids"])
    seen, tap = [], attachment_of(model).parts.projector

    def fail(*_):
        raise RuntimeError("failed")

    hooks = [
        tap.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0]))),
        tap.register_forward_hook(fail)
        if place == "after the projector"
        else model.get_decoder().register_forward_pre_hook(fail, prepend=True),
    ]
    with pytest.raises(RuntimeError, match="failed"):
        alone(model, inputs)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert [each() for each in seen] == [None]
    assert torch.equal(model.get_input_embeddings()(inputs["input_ids"]), expected)


def test_a_video_that_fails():
    """The images of the next call have their spatial tokens."""
    model, processor = attach(*qwen(), resize="pool", **FIELDS)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor(images=pictures(1), text=[place], return_tensors="pt")
    expected = alone(model, inputs)

    def fail(*_):
        raise RuntimeError("failed")

    hook = model.base_model.visual.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="failed"):
        model.base_model.get_video_features(torch.zeros(4, 8), torch.tensor([[1, 2, 2]]))
    hook.remove()
    assert torch.equal(alone(model, inputs), expected)


@pytest.mark.parametrize("generating", [False, True])
def test_interrupted_between_the_encoder_and_the_language_model(generating):
    """Ctrl-C there: the language model alone, and the embeddings, are then what they were."""
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    embeddings = torch.randn(1, inputs["input_ids"].shape[1], 64)
    with torch.no_grad():
        expected = model.get_decoder()(inputs_embeds=embeddings).last_hidden_state

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.get_decoder().register_forward_pre_hook(interrupt, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY) if generating else model(**inputs)
        hook.remove()
        assert attachment_of(model).threads.current.call is None
        assert torch.equal(model.get_decoder()(inputs_embeds=embeddings).last_hidden_state, expected)
        assert model.get_input_embeddings()(inputs["input_ids"]).isfinite().all()


@pytest.mark.parametrize("generating", [False, True])
def test_a_second_turn_with_a_literal_token(generating):
    """The cache holds the first turn. The words of the second hold the reserved token; there is no image to it."""
    model, processor = attach(*llava(), **FIELDS)
    first = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**first, past_key_values=cache)
    words = torch.full((1, 6), attachment_of(model).token_id)
    ids = torch.cat([first["input_ids"], words], dim=1) if generating else words
    call, options = (model.generate, GREEDY) if generating else (model, {})
    with pytest.raises(SpatialTokensError, match="row 0 has 6 places for spatial tokens, but no image was encoded"):
        call(input_ids=ids, past_key_values=cache, **options)


def test_the_language_model_alone():
    model, processor = attach(*llava(), **FIELDS)
    ids = processor(images=pictures(1), text="<image> is", return_tensors="pt")["input_ids"]
    with pytest.raises(SpatialTokensError, match="call the whole model, not its language model"):
        model.get_decoder()(input_ids=ids)
    with pytest.raises(SpatialTokensError, match="row 0 has 6 places"):
        model.get_decoder()(inputs_embeds=model.get_input_embeddings()(ids))
    assert model.get_decoder()(input_ids=ids[:, -2:]).last_hidden_state.shape == (1, 2, 64)


def replicated(model):
    """What nn.DataParallel makes for another device: modules copied without their hooks' objects."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = copies.get(child)
        for name, each in module._parameters.items():
            setattr(made, name, each)
    return copies[model]


def test_data_parallel_is_refused(ready):
    model, (inputs, _, _) = ready
    with pytest.raises(SpatialTokensError, match=r"nn\.DataParallel copies modules but not their hooks; use Distributed"):
        replicated(model)(**inputs)


# Parts that are copied or replaced


@pytest.mark.parametrize("part", ["language_model", "multi_modal_projector"])
def test_a_part_that_peft_copies(part):
    """`modules_to_save` copies a part alone, with its hooks; what it computes is what the part did."""
    peft = pytest.importorskip("peft")
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    expected = alone(model, inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[part])).eval()
    assert torch.equal(alone(wrapped, inputs), expected)
    assert torch.equal(wrapped.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        for each in copied.base_model.model.spatial_tokens.parameters():
            each.add_(1)
    assert torch.equal(alone(wrapped, inputs), expected)
    assert not torch.equal(alone(copied, inputs), expected)


@pytest.mark.parametrize("part", ["language_model", "multi_modal_projector"])
@pytest.mark.parametrize("how", ["copied", "made anew"])
def test_a_part_that_is_replaced(part, how):
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    expected = alone(model, inputs)
    if how == "copied":
        setattr(model.model, part, copy.deepcopy(getattr(model.model, part)))
        assert torch.equal(alone(model, inputs), expected)
        return
    other, _ = llava()
    setattr(model.model, part, getattr(other.model, part))
    with pytest.raises(SpatialTokensError, match=r"that attach\(\) found was not called: it was replaced; detach and attach again"):
        alone(model, inputs)


def test_prompt_tuning():
    """In forward the embeddings tell the places; generate() puts virtual tokens before a prompt that it knows by position."""
    peft = pytest.importorskip("peft")
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2, num_attention_heads=4, token_dim=64)
    wrapped = peft.get_peft_model(model, config).eval()
    assert alone(wrapped, inputs).shape[1] == inputs["input_ids"].shape[1] + 4
    with pytest.raises(SpatialTokensError, match=r"virtual tokens before the prompt \(prompt tuning\) is not supported"):
        wrapped.generate(**inputs, **GREEDY)


def test_a_call_of_the_model_while_it_generates(ready):
    """A logits processor or a reward that asks the same model about another image."""
    model, (inputs, other, _) = ready
    expected, of_other, seen = model.generate(**inputs, **GREEDY), alone(model, other), []

    def ask(ids, scores):
        seen.append(alone(model, other))
        return scores

    assert torch.equal(model.generate(**inputs, **GREEDY, logits_processor=[ask]), expected)
    assert all(torch.equal(each, of_other) for each in seen)
    assert seen


def test_an_interrupted_lookup_of_embeddings():
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    expected = alone(model, inputs)
    ids = inputs["input_ids"].flip(1)  # as long, with placeholders where the words of `inputs` are
    ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        model.get_input_embeddings()(ids)
    assert torch.equal(alone(model, inputs), expected)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_after_attach(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    text = processor(text="is", return_tensors="pt")
    expected = [alone(model, each) for each in (inputs, text)]
    getattr(accelerate, offload)(model, **({"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}))
    for each, logits in zip((inputs, text), expected, strict=True):
        torch.testing.assert_close(alone(model, each), logits, rtol=1e-4, atol=1e-5)


# Compiled code


def test_attached_to_a_model_that_runs_compiled():
    """torch.compile does not look whether a module has gained hooks: code of the plain model would run on without the tokens."""
    torch._dynamo.reset()
    attached, processor = attach(*llava(), **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    torch.compile(attached, backend="eager")(**inputs)
    base, plain = llava(1)
    before = plain(images=pictures(1), text="<image> is", return_tensors="pt")
    before["input_ids"] = torch.cat([torch.full((1, 6), 5), before["input_ids"]], dim=1)  # as long as with spatial tokens:
    before["attention_mask"] = torch.ones_like(before["input_ids"])  # or it would be compiled again for its length
    compiled = torch.compile(base, backend="eager")
    of_base = alone(compiled, before)
    attach(base, **FIELDS)
    expected, found = alone(base, inputs), alone(compiled, inputs)
    assert not torch.allclose(expected[:, 6:], of_base[:, 6:], atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    detach(base)
    torch.testing.assert_close(alone(compiled, before), of_base, rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):
        alone(compiled, inputs)
    torch._dynamo.reset()


def test_attached_to_what_torch_compile_returned():
    base, plain = llava()
    torch._dynamo.reset()
    compiled, processor = attach(torch.compile(base, backend="eager"), plain, **FIELDS)
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    torch.testing.assert_close(compiled(**inputs).logits, base(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
    assert not hasattr(detach(compiled)._orig_mod, "spatial_tokens")
    torch._dynamo.reset()


def test_a_compiled_model_in_several_threads():
    model, processor = attach(*llava(), **FIELDS)
    requests = [processor(images=pictures(1, seed=i), text="<image> is", return_tensors="pt") for i in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = [alone(compiled, each) for each in requests]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: alone(compiled, requests[i % 3]), range(12)))
    for i, each in enumerate(found):
        torch.testing.assert_close(each, expected[i % 3], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
