"""Adapters on the Hugging Face Hub, both ways, and models that cannot be had: the real client and a Hub on this machine."""

import re

import pytest
import torch

from spatial_tokens.adapters.transformers import TransformersPatchEncoder
from spatial_tokens.checkpoint import llava_from_parts
from spatial_tokens.cli import main
from tests.fake_hub import fake_hub, no_connection
from tests.storage.test_hub import code_of, refused

pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, push_to_hub  # noqa: E402
from spatial_tokens.adapters.huggingface.api import attachment_of  # noqa: E402
from spatial_tokens.adapters.huggingface.ready import from_hub  # noqa: E402
from tests.adapters.huggingface.models import FIELDS, llava, pictures  # noqa: E402


@pytest.fixture
def there(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def pushed(there):
    """A base model, its processor, inputs and the logits with the spatial tokens that are on the Hub now."""
    base, plain = llava()
    base.config._name_or_path = "us/base"
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    push_to_hub(model, "me/mine", datasets=["us/pictures"], token="hf_mine")
    return detach(model), plain, inputs, logits


def test_there_and_back(pushed, there):
    base, plain, inputs, logits = pushed
    assert sorted(there.files("me/mine")[1]) == [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    model, processor = load_adapter(base, "me/mine", plain)
    assert torch.equal(model(**inputs).logits, logits)
    again = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])


def test_the_card_says_what_it_is_and_how_to_load_it(pushed, there, tmp_path):
    base, plain, inputs, logits = pushed
    card = there.files("me/mine")[1]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {name: metadata[name] for name in ("base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets")} == {
        "base_model": "us/base", "base_model_relation": "adapter", "library_name": "spatial-tokens",
        "pipeline_tag": "image-text-to-text", "datasets": ["us/pictures"],
    }  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    there.commit("us/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    names = {}
    exec(code_of(card), names)
    torch.testing.assert_close(names["model"].eval()(**inputs).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", [None, "", "/home/me/base", "./base"])
def test_paths_of_this_machine_are_not_on_the_card(there, name):
    base, _ = llava()
    base.config._name_or_path = name
    model, _ = attach(base, **FIELDS)
    attachment_of(model).modules_to_save += ["model.multi_modal_projector"]
    push_to_hub(model, "me/mine")
    card = there.files("me/mine")[1]["README.md"].decode()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "| base model | a `llava` model |" in card
    assert "| parts of the base that were trained too | `model.multi_modal_projector` |" in card
    assert not name or name not in card


def test_a_revision(pushed, there):
    base, plain, inputs, logits = pushed
    first = there.files("me/mine")[0]
    other, _ = attach(base, plain, **FIELDS)
    push_to_hub(other, "me/mine")
    detach(other)
    model, _ = load_adapter(base, "me/mine", plain, revision=first)
    assert torch.equal(model(**inputs).logits, logits)
    detach(model)
    model, _ = load_adapter(base, "me/mine", plain)
    assert not torch.equal(model(**inputs).logits, logits)


def test_a_repository_of_something_else(there):
    base, _ = llava()
    there.commit("us/base", {"config.json": b"{}"})
    refused("us/base on the Hugging Face Hub has no adapter_config.json", lambda: load_adapter(base, "us/base"))
    refused("us/nothing is neither a folder here nor a repository", lambda: load_adapter(base, "us/nothing"))
    assert not hasattr(base, "spatial_tokens")


def test_without_a_connection_one_line_says_so_at_once(monkeypatch, tmp_path, capsys):
    base, _ = llava()
    no_connection(monkeypatch, tmp_path)
    place = "is neither a folder here nor in Hugging Face's cache, and it could not be downloaded from the Hugging Face Hub: "
    refused(f"me/mine {place}", lambda: load_adapter(base, "me/mine"))
    assert not hasattr(base, "spatial_tokens")
    refused(f"cannot load the model 'us/base': us/base {place}", lambda: from_hub("us/base"))
    refused(f"cannot load the language model us/llama: us/llama {place}", lambda: llava_from_parts("us/llama", tmp_path))
    refused(
        f"cannot load the vision tower us/clip (vision= or --vision gives another): us/clip {place}",
        lambda: llava_from_parts(tmp_path, "us/clip"),
    )
    refused(f"transformers cannot load 'us/clip': us/clip {place}", lambda: TransformersPatchEncoder("us/clip"))
    assert main(["demo", "--model", "us/base"]) == 2
    assert re.fullmatch(
        rf"spatial-tokens demo: error: cannot load the model 'us/base': us/base {place}.*\n", capsys.readouterr().err
    )


def test_without_a_connection_the_cache_is_taken(monkeypatch, tmp_path):
    base, plain = llava()
    base.save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.commit("us/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
        from_hub("us/base")
    no_connection(monkeypatch, tmp_path / "cache")
    model, processor = from_hub("us/base")
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert model.name_or_path == "us/base"
    assert processor(text="<image>", images=pictures(1))["input_ids"]
