import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from spatial_tokens.cli import main
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.serving import hf_overrides, serve_export
from spatial_tokens.storage.files import read_safetensors

transformers = pytest.importorskip("transformers")
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter  # noqa: E402
from spatial_tokens.adapters.huggingface.ready import tiny_llava  # noqa: E402
from tests.adapters.huggingface.tiny import MODELS, needs_known_transformers  # noqa: E402

OURS = "SpatialTokensForConditionalGeneration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, with a second chat template, and its adapter."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    model.save_pretrained(folder / "base")
    processor.chat_template = {"default": "{{ messages }}", "other": "other {{ messages }}"}
    processor.save_pretrained(folder / "base")
    attach(model, None, "llava-sp-cropping", spatial_hidden_size=16)
    save_adapter(model, folder / "adapter")
    detach(model)
    return folder


def content(path):
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("link", [False, True])
def test_one_folder(folder, tmp_path, link):
    out = tmp_path / "out"
    serve_export(folder / "base", folder / "adapter", out, link=link)
    made, base, adapter = content(out), content(folder / "base"), content(folder / "adapter")
    config = json.loads(made.pop("config.json"))
    assert config == {**json.loads(base.pop("config.json")), "architectures": [OURS], "spatial_tokens": "spatial_tokens"}
    assert made == {**base, **{f"spatial_tokens/{name}": value for name, value in adapter.items()}}
    assert any("additional_chat_templates" in name for name in made)
    assert (out / "model.safetensors").is_symlink() == link


def test_transformers_loads_it(folder, tmp_path):
    serve_export(folder / "base", folder / "adapter", tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "moved")
    made = []
    for base, adapter in ((folder / "base", folder / "adapter"), (tmp_path / "moved", tmp_path / "moved" / "spatial_tokens")):
        model = transformers.AutoModelForImageTextToText.from_pretrained(base).eval()
        model, processor = load_adapter(model, adapter, transformers.AutoProcessor.from_pretrained(base))
        inputs = processor(text="<image> What?", images=torch.ones(3, 336, 336), return_tensors="pt")
        made.append(model(**inputs).logits)
    assert torch.equal(*made)


def test_overrides_say_where_the_adapter_is(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert hf_overrides("base", "adapter") == {"architectures": [OURS], "spatial_tokens": str(folder / "adapter")}


def test_a_model_with_experts_has_an_architecture_of_its_own(folder, tmp_path):
    values = json.loads((folder / "base" / "config.json").read_text())
    values["text_config"] |= {"model_type": "mixtral", "num_local_experts": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert hf_overrides(tmp_path, folder / "adapter")["architectures"] == ["SpatialTokensMoEForConditionalGeneration"]


def test_an_earlier_export_is_replaced_and_nothing_else(folder, tmp_path):
    out = tmp_path / "out"
    serve_export(folder / "base", folder / "adapter", out, link=True)
    serve_export(folder / "base", folder / "adapter", out)
    assert not (out / "model.safetensors").is_symlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(SpatialTokensError, match="is not replaced: it is not an export"):
        serve_export(folder / "base", folder / "adapter", other)
    assert content(other) == {"config.json": b"{}"}


def test_nothing_is_left_of_an_export_that_fails(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.copyfile", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SpatialTokensError, match=r"cannot write .*: No space left on device"):
        serve_export(folder / "base", folder / "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together(folder, tmp_path):
    base, adapter, out = folder / "base", folder / "adapter", tmp_path / "out"
    for arguments, message in {
        (base, adapter, base): "is what is to be exported",
        (base, adapter, adapter): "is what is to be exported",
        (adapter, adapter, out): "has no config.json; give a model's local folder",
        ("llava-hf/llava-1.5-7b-hf", adapter, out): "has no config.json; give a model's local folder",
        (base, base, out): "cannot read .*adapter_config.json",
    }.items():
        with pytest.raises(SpatialTokensError, match=message):
            serve_export(*arguments)
    assert not out.exists()


def test_an_adapter_of_another_model(folder, tmp_path):
    for kind, width, message in (
        (transformers.LlavaConfig, 32, "have 64 channels, the language model has 32"),
        (transformers.LlavaNextConfig, 64, "is an adapter of a llava model, not of a llava_next"),
    ):
        kind(text_config={"model_type": "llama", "hidden_size": width}).save_pretrained(tmp_path)
        with pytest.raises(SpatialTokensError, match=message):
            hf_overrides(tmp_path, folder / "adapter")


def test_an_adapter_of_a_base_of_another_name(folder, tmp_path, recwarn):
    """It may be a renamed copy, so that is no error; nor is it asked of the export, which has a name of its own."""
    base, adapter, out = tmp_path / "llava", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(folder / "base", base)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    save_adapter(attach(model, None, "llava-sp-cropping", spatial_hidden_size=16)[0], adapter)
    assert serve_export(base, adapter, out)["architectures"] == [OURS]
    load_adapter(transformers.AutoModelForImageTextToText.from_pretrained(out), out / "spatial_tokens")
    assert not [each for each in recwarn if "was saved with" in str(each.message)]
    with pytest.warns(UserWarning, match=r"was saved with the base model '.*/llava', and this one is '.*/base'"):
        hf_overrides(folder / "base", adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"unrelated": torch.zeros(2)}, r"do not fit: missing: .*spatial_head\.fc\.weight.*unexpected: unrelated"),
        (lambda tensors: {**tensors, "spatial_head.fc.weight": torch.zeros(2, 3)}, r"spatial_head\.fc\.weight \(2, 3\) instead of"),
    ],
    ids=["other names", "another shape"],
)
def test_weights_that_are_not_the_projectors(change, message, folder, tmp_path):
    tensors, metadata = read_safetensors(folder / "adapter" / "adapter_model.safetensors")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    save_file(change(tensors), tmp_path / "adapter" / "adapter_model.safetensors", metadata)
    with pytest.raises(SpatialTokensError, match=message):
        serve_export(folder / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_modules_and_of_earlier_versions_are_no_fault(folder, tmp_path):
    tensors, metadata = read_safetensors(folder / "adapter" / "adapter_model.safetensors")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    more = {"module.model.multi_modal_projector.linear_1.bias": torch.zeros(64), "reserved_token.input": torch.zeros(64)}
    save_file(tensors | more, tmp_path / "adapter" / "adapter_model.safetensors", metadata)
    assert serve_export(folder / "base", tmp_path / "adapter", tmp_path / "out")["architectures"] == [OURS]


def attached(name, folder, **options):
    """A tiny model of another family, and an adapter of it."""
    model = MODELS[name].model()
    model.save_pretrained(folder / "base")
    attach(model, None, "llava-sp-cropping", **{**MODELS[name].attach, **options})
    save_adapter(model, folder / "adapter")
    return folder / "base", folder / "adapter"


@needs_known_transformers
@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma3", "attend to one another both ways"), ("qwen3_vl", "adds to several layers of the language model")],
)
def test_families_that_vllm_computes_otherwise_are_refused(name, reason, tmp_path):
    with pytest.raises(SpatialTokensError, match=f"{name} with spatial tokens is not served by vLLM: .*{reason}"):
        serve_export(*attached(name, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_known_transformers
def test_families_that_nobody_compared_are_served_with_a_warning(tmp_path):
    given = attached("vipllava", tmp_path)
    with pytest.warns(UserWarning, match="vLLM's answers of vipllava with spatial tokens have not been compared"):
        hf_overrides(*given)


@needs_known_transformers
@pytest.mark.parametrize("options", [{}, {"resize": None, "grid_size": (4, 4)}], ids=["resize", "one grid"])
def test_images_of_any_size_need_a_resize(options, tmp_path):
    given = attached("qwen2_5_vl", tmp_path, **options)
    if not options:
        assert hf_overrides(*given)["spatial_tokens"] == str(tmp_path / "adapter")
        return
    with pytest.raises(SpatialTokensError, match=r"takes images of any size, and .* has no resize"):
        hf_overrides(*given)


def test_an_export_is_not_a_base(folder, tmp_path):
    serve_export(folder / "base", folder / "adapter", tmp_path / "out", link=True)
    with pytest.raises(SpatialTokensError, match="is an export already; give the base model's folder"):
        serve_export(tmp_path / "out", folder / "adapter", tmp_path / "again")


def test_the_command(folder, tmp_path, capsys):
    words = ["serve-export", str(folder / "base"), str(folder / "adapter"), str(tmp_path / "out")]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'out'}: {OURS}",
        f"next, where vLLM and this library are installed: vllm serve {tmp_path / 'out'}",
    ]
    assert main([*words, "--json", "--link"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == {"architectures": [OURS], "spatial_tokens": "spatial_tokens"}
    assert main([*words[:2], str(tmp_path), *words[3:]]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_an_adapter_of_int8_weights(folder, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    load_adapter(model, folder / "adapter")
    torchao.quantize_(model.spatial_tokens, torchao.Int8WeightOnlyConfig())
    save_adapter(model, tmp_path / "int8")
    with pytest.raises(SpatialTokensError, match="has int8 weights, which vLLM would take for plain ones; save it before quant"):
        serve_export(folder / "base", tmp_path / "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
