"""vLLM with the plugin gives the tokens of transformers' `generate`, and their log-probabilities."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from spatial_tokens.serving import hf_overrides, serve_export
from spatial_tokens.serving.families import COMPARED
from spatial_tokens.storage.files import read_safetensors
from tests.serving.answers import by_transformers, by_vllm, picture, prompts
from tests.serving.bases import BASES, quantize, write, write_adapter
from tests.serving.refused import DIFFERENT, NOT_RUN

QWEN = "qwen2_5_vl"  # the model of the tests that take one
ADAPTERS = {
    "llava": {"own": {}, "image": {"mode": "image"}},
    "llava_mixtral": {"own": {}},
    "llava_next": {"own": {}, "tile": {"unit": "tile"}},
    "internvl": {"own": {}, "tile": {"unit": "tile", "mode": "image"}},
    "qwen2_vl": {"own": {}},
    "qwen2_5_vl": {
        "own": {},
        "image": {"mode": "image", "resize": "interpolate"},
        "any grid": {"preset": "factorized-cropping"},
    },
    "mistral3": {"own": {}},
    "idefics3": {"own": {}, "tile": {"unit": "tile"}},
}
CLOSE = 2e-5  # log-probabilities, of sums in another order
LESS_CLOSE = {"idefics3": 2e-4}  # as it is without spatial tokens: 3e-5
CASES = [(name, adapter) for name, adapters in ADAPTERS.items() for adapter in adapters]


def asked(name):
    return prompts(BASES[name].image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def references(folder, request):
    """Those of the selected tests' families, all of them before the first engine, which changes transformers' classes."""
    found = {}
    selected = {QWEN, *(each.callspec.params.get("name") for each in request.session.items if hasattr(each, "callspec"))}
    for name, adapters in ADAPTERS.items():
        if name not in selected:
            continue
        write(name, folder / name)
        found[name, None] = by_transformers(folder / name / "base", None, asked(name))
        for adapter, options in adapters.items():
            write_adapter(name, folder / name, adapter, **options)
            found[name, adapter] = by_transformers(folder / name / "base", folder / name / adapter, asked(name))
    for name in selected & set(DIFFERENT):
        write(name, folder / name)
        found[name, None] = by_transformers(folder / name / "base", None, asked(name))
    write("llava", folder / "int8")
    write_adapter("llava", folder / "int8", "own")
    quantize(folder / "int8" / "base")
    found["int8", None] = by_transformers(folder / "int8" / "base", None, asked("llava"))
    found["int8", "own"] = by_transformers(folder / "int8" / "base", folder / "int8" / "own", asked("llava"))
    write_lora(folder / QWEN / "base", folder / QWEN / "lora")
    write_adapter(QWEN, folder / QWEN, "trained", train="model.visual.merger")
    for what, options in {"lora": {"lora": folder / QWEN / "lora"}, "trained": {}}.items():
        adapter = folder / QWEN / ("own" if what == "lora" else what)
        found[QWEN, what] = by_transformers(folder / QWEN / "base", adapter, asked(QWEN), **options)
    return found


def write_lora(base, folder):
    """A LoRA of the language model, large enough to change answers."""
    import peft

    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False)
    torch.manual_seed(2)
    peft.get_peft_model(model, config).save_pretrained(folder)


@contextmanager
def engine(model, **options):
    """An engine, and nothing of it afterwards."""
    limits = {"max_model_len": 2048, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 2}}
    made = LLM(str(model), dtype="float32", **{"enforce_eager": True, **limits, **options})
    try:
        yield made
    finally:
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def check(made, references, close=CLOSE):
    for number, (ours, theirs) in enumerate(zip(made, references, strict=True)):
        assert ours.prompt == theirs.prompt, f"prompt {number}"
        assert ours.tokens == theirs.tokens, f"prompt {number}"
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=close)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_answers_are_those_of_transformers(name, adapter, folder, references, tmp_path):
    serve_export(folder / name / "base", folder / name / adapter, tmp_path / "served", link=True)
    with engine(tmp_path / "served") as llm:
        for _ in range(2):  # then from the caches of images and of prefixes
            check(by_vllm(llm, asked(name)), references[name, adapter], LESS_CLOSE.get(name, CLOSE))


@pytest.mark.parametrize("name", ADAPTERS)
def test_answers_depend_on_spatial_tokens(name, references):
    for (_, pictures), ours, plain in zip(asked(name), references[name, "own"], references[name, None], strict=True):
        change = (ours.logprobs - plain.logprobs).abs()
        assert change.max() > 10 * CLOSE if pictures else change[0] == 0


def test_every_family_said_to_be_compared_is():
    assert {BASES[name].build()[0].model_type for name in ADAPTERS} == set(COMPARED)


@pytest.mark.parametrize("name", DIFFERENT)
def test_refused_families_differ_without_spatial_tokens(name, folder, references):
    """Where there are pictures, and nowhere else."""
    with engine(folder / name / "base", model_impl="transformers") as llm:
        made = by_vllm(llm, asked(name))
    for (text, pictures), ours, theirs in zip(asked(name), made, references[name, None], strict=True):
        assert ours.prompt == theirs.prompt
        far = (ours.logprobs[0] - theirs.logprobs[0]).abs() > 100 * CLOSE or ours.tokens != theirs.tokens
        assert far == bool(pictures), f"{text!r}: vLLM now agrees with transformers: serve {name}" if pictures else text


@pytest.mark.parametrize(("name", "error"), NOT_RUN.items())
def test_refused_families_that_do_not_start_without_spatial_tokens(name, error, tmp_path):
    write(name, tmp_path)
    with pytest.raises(ValueError, match=error), engine(tmp_path / "base", model_impl="transformers"):
        pytest.fail(f"vLLM now starts {name}: compare its answers")


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"mm_processor_cache_gb": 0, "max_num_seqs": 1},
    ],
    ids=["compiled, prefill in chunks", "no cache, one at a time"],
)
def test_other_engines_give_the_same(options, folder, references):
    base, adapter = folder / QWEN / "base", folder / QWEN / "own"
    with engine(base, hf_overrides=hf_overrides(base, adapter), **options) as llm:
        check(by_vllm(llm, asked(QWEN)), references[QWEN, "own"])


def test_modules_of_the_base_that_trained_with_the_adapter(folder, references):
    base, adapter = folder / QWEN / "base", folder / QWEN / "trained"
    with engine(base, hf_overrides=hf_overrides(base, adapter)) as llm:
        check(by_vllm(llm, asked(QWEN)), references[QWEN, "trained"])
    assert [each.tokens for each in references[QWEN, "trained"]] != [each.tokens for each in references[QWEN, "own"]]


def test_lora_requests(folder, references):
    base, adapter = folder / QWEN / "base", folder / QWEN / "own"
    assert [each.tokens for each in references[QWEN, "lora"]] != [each.tokens for each in references[QWEN, "own"]]
    with engine(base, hf_overrides=hf_overrides(base, adapter), enable_lora=True, max_lora_rank=8) as llm:
        check(by_vllm(llm, asked(QWEN), LoRARequest("tuned", 1, str(folder / QWEN / "lora"))), references[QWEN, "lora"])
        check(by_vllm(llm, asked(QWEN)), references[QWEN, "own"])


def test_two_processes_share_a_model(folder, references):
    base, adapter = folder / QWEN / "base", folder / QWEN / "own"
    with engine(base, hf_overrides=hf_overrides(base, adapter), tensor_parallel_size=2) as llm:
        check(by_vllm(llm, asked(QWEN)), references[QWEN, "own"])


def test_a_quantized_base(folder, references):
    """Its activations are rounded to 8 bits, in another order: how far that leads is held against what spatial tokens change."""
    base, adapter = folder / "int8" / "base", folder / "int8" / "own"
    with engine(base, hf_overrides=hf_overrides(base, adapter)) as llm:
        made = by_vllm(llm, asked("llava"))
    assert [each.prompt for each in made] == [each.prompt for each in references["int8", "own"]]
    assert [each.tokens[0] for each in made] == [each.tokens[0] for each in references["int8", "own"]]
    first, own, plain = (
        torch.stack([each.logprobs[0] for each in answers])
        for answers in (made, references["int8", "own"], references["int8", None])
    )
    assert (first - own).abs().mean() < (own - plain).abs().mean() / 2


def test_requests(folder, references):
    base, adapter, image = folder / QWEN / "base", folder / QWEN / "own", BASES[QWEN].image
    how = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with engine(base, hf_overrides=hf_overrides(base, adapter)) as llm:
        for text, seeds in ((f"{image} one place", [90, 91]), ("no place", [92])):  # vLLM caches pictures of failed requests
            with pytest.raises((ValueError, AssertionError), match=r"Failed to apply prompt"):
                llm.generate({"prompt": text, "multi_modal_data": {"image": list(map(picture, seeds))}}, how, use_tqdm=False)
        more = {"prompt": f"{image}{image} two places", "multi_modal_data": {"image": [picture(93)]}}
        llm.generate(more, how, use_tqdm=False)  # the second is words, as it is to vLLM without spatial tokens
        (made,) = llm.generate("<|spatial|>", how, use_tqdm=False)
        assert len(made.prompt_token_ids) == len("<|spatial|>")  # letters, to the base's tokenizer
        check(by_vllm(llm, asked(QWEN)), references[QWEN, "own"])


def test_without_the_plugin_the_base_is_not_served(folder, references, tmp_path):
    serve_export(folder / QWEN / "base", folder / QWEN / "own", tmp_path / "served", link=True)
    command = [sys.executable, "-c", f"from vllm import LLM; LLM({str(tmp_path / 'served')!r}, max_model_len=256)"]
    run = subprocess.run(command, env={**os.environ, "VLLM_PLUGINS": ""}, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "SpatialTokensForConditionalGeneration" in run.stderr
    assert "not supported" in run.stderr


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("nowhere", "the adapter of .* is not there"), (None, "names no adapter")],
)
def test_an_adapter_that_is_not_there(adapter, message, folder, references):
    overrides = {"architectures": ["SpatialTokensForConditionalGeneration"], "spatial_tokens": adapter}
    with pytest.raises(Exception, match=message), engine(folder / QWEN / "base", hf_overrides=overrides):
        pass


def test_weights_that_are_not_the_adapters(folder, references, tmp_path):
    serve_export(folder / QWEN / "base", folder / QWEN / "own", tmp_path / "served", link=True)
    weights = tmp_path / "served" / "spatial_tokens" / "adapter_model.safetensors"
    tensors, metadata = read_safetensors(weights)
    missing = {name: each for name, each in tensors.items() if name != "spatial_head.fc.weight"}
    other = {**tensors, "spatial_head.fc9.weight": torch.zeros(2, 2)}
    for found, message in (
        (missing, r"the weights of .* lack spatial_head\.fc\.weight"),
        (other, r"has no spatial_head\.fc9\.weight"),
    ):
        save_file(found, weights, metadata)
        with pytest.raises(ValueError, match=message), engine(tmp_path / "served"):
            pass
