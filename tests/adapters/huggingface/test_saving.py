"""Adapters on disk, and base models that stay clean."""

import copy
import json
import logging
import os
import re
from typing import TypeVar, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers

from spatial_tokens import SpatialTokensError, SPProjectorConfig, __version__
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, replace_projector, save_adapter, saving
from spatial_tokens.adapters.huggingface.api import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A model, its processor, inputs and logits; its adapter in a folder; the model is plain again."""
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    return base, plain, inputs, logits, tmp_path / "adapter"


def test_files(saved):
    *_, folder = saved
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    values = json.loads((folder / CONFIG).read_text())
    assert {name: values[name] for name in ("peft_type", "base_model_type", "mode", "unit", "resize", "token")} == {
        "peft_type": saving.KIND, "base_model_type": "llava", "mode": "own", "unit": "image", "resize": None,
        "token": "<|spatial|>",
    }  # fmt: skip
    config = SPProjectorConfig.from_dict(values["projector"])
    tensors = load_file(folder / WEIGHTS)
    assert sum(each.numel() for each in tensors.values()) == config.num_parameters


def test_bit_equal_after_a_reload(saved):
    base, plain, inputs, logits, folder = saved
    model, processor = load_adapter(base, folder, plain)
    assert torch.equal(model(**inputs).logits, logits)
    again = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])


@pytest.fixture
def saved_with(tmp_path):
    """Saves an adapter of a base of this name, and gives the base another one."""

    def save(name, loaded_on):
        base, plain = llava()
        base.config._name_or_path = name
        save_adapter(attach(base, plain, **FIELDS)[0], tmp_path / "adapter")
        detach(base).config._name_or_path = loaded_on
        return base, tmp_path / "adapter"

    return save


@pytest.mark.parametrize(
    ("name", "loaded_on"),
    [("user/llava", "user/llava-med"), ("models/llava", "user/vip"), (r"C:\models\llava", "models/tiny"), ("here/a", "there/b/")],
)
def test_a_base_of_another_name_is_warned_about(saved_with, name, loaded_on):
    with pytest.warns(UserWarning, match="was saved with the base model .*, and this one is .*; unless that is the same") as caught:
        load_adapter(*saved_with(name, loaded_on))
    (message,) = [str(each.message) for each in caught if "was saved with" in str(each.message)]
    assert repr(name) in message
    assert repr(loaded_on) in message
    assert caught[-1].filename == __file__


@pytest.mark.parametrize(
    ("name", "loaded_on"),
    [
        ("user/llava", "user/llava"),
        ("user/llava", "/models/Llava/"),
        (r"C:\models\llava", "other/llava"),
        ("user/llava", "/cache/models--user--llava/snapshots/0123abcd"),
        ("", "user/llava"),
        ("user/llava", ""),
    ],
)
def test_a_copy_of_the_base_elsewhere_is_no_other(saved_with, recwarn, name, loaded_on):
    load_adapter(*saved_with(name, loaded_on))
    assert not [each for each in recwarn if "was saved with" in str(each.message)]


def test_an_adapter_in_its_bases_folder_belongs_to_it(saved_with, recwarn, tmp_path):
    load_adapter(*saved_with("user/llava", str(tmp_path)))
    assert not [each for each in recwarn if "was saved with" in str(each.message)]


@pytest.mark.parametrize("options", [{"resize": "pool"}, {"resize": "interpolate", "variant": "pooling"}])
def test_options_are_kept(tmp_path, options):
    base, plain = qwen()
    model, processor = attach(base, plain, **options, **FIELDS)
    inputs = processor(images=pictures(1, (48, 32)), text=["<|vision_start|><|image_pad|><|vision_end|>"], return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    model, _ = load_adapter(base, tmp_path, plain)
    assert attachment_of(model).resize == options["resize"]
    assert torch.equal(model(**inputs).logits, logits)


def test_in_bfloat16(tmp_path):
    base, plain = llava()
    base = base.to(torch.bfloat16)
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    logits = model(**inputs).logits
    assert {each.dtype for each in model.spatial_tokens.parameters()} == {torch.bfloat16}
    save_adapter(model, tmp_path)
    detach(model)
    model, _ = load_adapter(base, tmp_path, plain)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_token_that_has_a_row_already(tmp_path):
    """Real models have more rows than tokens."""
    base, plain = llava()
    base.resize_token_embeddings(128, mean_resizing=False)
    before = {name: each.clone() for name, each in base.state_dict().items()}
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())
    model, _ = load_adapter(base, tmp_path, plain)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_base_that_has_the_row_already_keeps_its_own(saved):
    base, plain, inputs, logits, folder = saved
    base.resize_token_embeddings(128, mean_resizing=False)
    before = {name: each.clone() for name, each in base.state_dict().items()}
    model, _ = load_adapter(base, folder, plain)
    torch.testing.assert_close(model(**inputs).logits[..., :100], logits[..., :100])
    detach(model)
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())


def test_tied_embeddings(tmp_path):
    base, plain = llava()
    base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
    base.tie_weights()
    model, processor = attach(base, plain, **FIELDS)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert len(base.lm_head.weight) == 100
    model, _ = load_adapter(base, tmp_path, plain)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(**inputs).logits, logits)


def test_image_mode(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, mode="image", **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    model, again = load_adapter(base, tmp_path, plain)
    assert torch.equal(again(images=pictures(1), text="a <image> b", return_tensors="pt")["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(("of_adapter", "of_base"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_an_adapter_of_another_dtype(tmp_path, of_adapter, of_base):
    """Its weights stay what they were saved as."""
    base, plain = llava()
    model, processor = attach(base.to(of_adapter), plain, **FIELDS)
    weights = {name: each.clone() for name, each in model.spatial_tokens.state_dict().items()}
    save_adapter(model, tmp_path)
    detach(model)
    model, _ = load_adapter(base.to(of_base), tmp_path, plain)
    assert all(torch.equal(each, weights[name]) for name, each in model.spatial_tokens.state_dict().items())
    assert {each.dtype for each in model.spatial_tokens.parameters()} == {of_adapter}
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(of_base)
    logits = model(**inputs).logits
    assert logits.dtype == of_base
    assert logits.isfinite().all()


def test_a_tokenizer_with_a_token_more(saved):
    """Only the reserved token's id differs; the model computes what it did."""
    base, plain, _, logits, folder = saved
    plain.tokenizer.add_tokens(["<more>"])
    model, processor = load_adapter(base, folder, plain)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert (inputs["input_ids"] == 101).sum() == 6
    assert torch.equal(model(**inputs).logits, logits)
    save_adapter(model, folder)
    assert json.loads((folder / CONFIG).read_text())["token_id"] == 101


def test_a_file_of_version_0_1(saved):
    """It has rows of the embeddings for the reserved token, which needs none any more, and PEFT is not told who reads it."""
    base, plain, inputs, logits, folder = saved
    values, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**values, "peft_type": "SPATIAL_TOKENS"}))
    row = {f"reserved_token.{name}.weight": torch.randn(64) for name in ("model.language_model.embed_tokens", "lm_head")}
    save_file(tensors | row, folder / WEIGHTS)
    model, _ = load_adapter(base, folder, plain)
    assert torch.equal(model(**inputs).logits, logits)


def test_saved_again(saved):
    """What was loaded writes the same files."""
    base, plain, _, _, folder = saved
    model, _ = load_adapter(base, folder, plain)
    save_adapter(model, folder.parent / "again")
    assert json.loads((folder.parent / "again" / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    before, after = load_file(folder / WEIGHTS), load_file(folder.parent / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())


# The base model's own files


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["", "with state_dict="])
def test_the_base_is_saved_as_it_was(tmp_path, tied, given):
    base, plain = llava()
    if tied:
        base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
        base.tie_weights()
    base.save_pretrained(tmp_path / "before")
    model, processor = attach(base, plain, **FIELDS)
    model.save_pretrained(tmp_path / "after", **({"state_dict": model.state_dict()} if given else {}))
    assert sorted(os.listdir(tmp_path / "after")) == sorted(os.listdir(tmp_path / "before"))
    for name in os.listdir(tmp_path / "before"):
        if name.endswith(".json"):
            assert json.loads((tmp_path / "after" / name).read_text()) == json.loads((tmp_path / "before" / name).read_text())
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()


def test_arguments_of_save_pretrained(tmp_path):
    """By position too, in shards too; as an untouched model takes them."""
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    model.save_pretrained(tmp_path / "nothing", True, None)
    model.save_pretrained(tmp_path / "tensors", True, model.state_dict())
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "not the first process", is_main_process=False)
    assert not (tmp_path / "not the first process" / "config.json").exists()
    for name in ("nothing", "tensors", "shards"):
        loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.get_input_embeddings().weight.shape[0] == 100
        assert all(torch.equal(each, before[name][: len(each)]) for name, each in loaded.state_dict().items())


def test_a_clean_base_is_loaded_without_a_word(tmp_path):
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    model.save_pretrained(tmp_path)
    words = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())
    logger, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    finally:
        transformers.logging.set_verbosity(level)
        logger.removeHandler(handler)
    assert words == []


def test_a_copy_saves_and_detaches_itself(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        for each in other.spatial_tokens.parameters():
            each.zero_()
    other.save_pretrained(tmp_path / "base")
    save_adapter(other, tmp_path / "adapter")
    assert not transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").lm_head.weight.any()
    assert not any(each.any() for each in load_file(tmp_path / "adapter" / WEIGHTS).values())
    detach(other)
    assert len(other.lm_head.weight) == 100
    assert torch.equal(model(**inputs).logits, logits)


def test_the_whole_model_goes_there_and_back(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with pytest.raises(SpatialTokensError, match="give a folder of its own"):
        save_adapter(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    model, _ = load_adapter(loaded, tmp_path / "adapter", transformers.AutoProcessor.from_pretrained(tmp_path / "base"))
    again = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    found = copy.deepcopy(model)(**inputs).logits  # in memory of its own: a mapped file's alignment changes the last bits
    assert torch.equal(found, logits)


def test_detach_restores_everything():
    base, plain = llava()
    before = {name: each.clone() for name, each in base.state_dict().items()}
    attributes, modules = set(vars(base)), [name for name, _ in base.named_modules()]
    config, generation = base.config.to_dict(), base.generation_config.to_dict()
    inputs = plain(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = base(**inputs).logits
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in base.modules()]
    attach(base, plain, **FIELDS)
    detach(base)
    assert set(vars(base)) == attributes
    assert [name for name, _ in base.named_modules()] == modules
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in base.modules()] == hooks
    assert "get_image_features" not in vars(base.base_model)
    assert base.config.to_dict() == config
    assert base.generation_config.to_dict() == generation
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())
    assert torch.equal(base(**inputs).logits, logits)


def test_rows_that_the_user_added_stay(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model.resize_token_embeddings(140, mean_resizing=False)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == 140
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == 140
    assert detach(model).get_input_embeddings().weight.shape[0] == 140


# Mistakes


def damaged(folder, kind):
    if kind == "no config":
        (folder / CONFIG).unlink()
    elif kind == "no weights":
        (folder / WEIGHTS).unlink()
    elif kind == "no json":
        (folder / CONFIG).write_text("{")
    elif kind == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    else:
        values = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        if kind == "peft":
            values["peft_type"] = "LORA"
        elif kind == "unit":
            values["unit"] = "page"
        elif kind == "model":
            values["base_model_type"] = "qwen2_vl"
        elif kind == "projector":
            values["projector"]["kernel_sizes"] = [3]
        elif kind == "width":
            values["projector"]["text_hidden_size"] = 32
        elif kind == "tensor":
            del tensors["extractor.kernels.0.weight"]
        elif kind == "another tensor":
            tensors["extractor.kernels.9.weight"] = torch.zeros(1)
        elif kind == "shape":
            tensors["extractor.kernels.0.weight"] = tensors["extractor.kernels.0.weight"][:1].contiguous()
        elif kind == "token":
            values["token"] = "a"
        elif kind == "id":
            values["token_id"] = "a"
        elif kind == "modules":
            values["modules_to_save"] = ["model.multi_modal_projector", "model.connector"]
        elif kind == "no tensors of a module":
            values["modules_to_save"] = ["model.multi_modal_projector"]
        elif kind == "tensors of no module":
            tensors["module.model.multi_modal_projector.linear_1.weight"] = torch.zeros(64, 64)
        elif kind == "a list":
            values = [values]
        elif kind == "no projector":
            values["projector"] = {}
        (folder / CONFIG).write_text(json.dumps(values))
        save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "cannot read"),
        ("no weights", "does not exist"),
        ("no json", "is not valid JSON"),
        ("cut", "is not a complete safetensors file"),
        ("peft", "is not of spatial tokens"),
        ("unit", "unit in .* must be one of"),
        ("model", "is an adapter of a qwen2_vl model, not of a llava"),
        ("projector", "kernel"),
        ("width", "do not fit|does not fit"),
        ("tensor", "missing: extractor.kernels.0.weight"),
        ("another tensor", "extractor.kernels.9.weight"),
        ("shape", "extractor.kernels.0.weight"),
        ("token", "'a' has a use of its own in the tokenizer"),
        ("id", "token_id in .* must be a int, got 'a'"),
        ("modules", "has weights of modules that the model does not have: .*connector"),
        ("no tensors of a module", "missing: model.multi_modal_projector.linear_1.weight"),
        ("tensors of no module", "unexpected: model.multi_modal_projector.linear_1.weight"),
        ("a list", "is not of spatial tokens"),
        ("no projector", "missing field"),
    ],
)
def test_a_damaged_adapter_leaves_the_model_as_it_was(saved, kind, message):
    base, plain, _, _, folder = saved
    damaged(folder, kind)
    before, attributes = {name: each.clone() for name, each in base.state_dict().items()}, set(vars(base))
    with pytest.raises(SpatialTokensError, match=message):
        load_adapter(base, folder, plain)
    assert set(vars(base)) == attributes
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())


def test_an_adapter_of_two_saves_is_that_of_its_weights(saved, monkeypatch):
    """A save interrupted between its files: the config of the old one, the weights of the new one, which hold a copy of theirs."""
    base, plain, _, _, folder = saved
    model, processor = attach(base, plain, variant="pooling", resize="pool", **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    replace, calls = os.replace, []

    def second_fails(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*args, **options)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(SpatialTokensError, match="No space left on device"):
        save_adapter(model, folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    detach(model)
    with pytest.warns(UserWarning, match=r"adapter_config\.json is not the config that adapter_model\.safetensors was saved with"):
        model, _ = load_adapter(base, folder, plain)
    assert attachment_of(model).resize == "pool"
    assert torch.equal(model(**inputs).logits, logits)
    save_adapter(model, folder)
    detach(model)
    load_adapter(base, folder, plain)  # without a warning


def test_what_is_no_path(saved):
    base, plain, *_ = saved
    with pytest.raises(SpatialTokensError, match=r"^a file or directory must be a path, got None"):
        load_adapter(base, None, plain)
    attach(base, plain, **FIELDS)
    with pytest.raises(SpatialTokensError, match=r"^a file or directory must be a path, got None"):
        save_adapter(base, None)


def test_loaded_onto_spatial_tokens(saved):
    base, plain, inputs, logits, folder = saved
    model, _ = load_adapter(base, folder, plain)
    with pytest.raises(SpatialTokensError, match="has spatial tokens already"):
        load_adapter(model, folder, plain)
    assert torch.equal(model(**inputs).logits, logits)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    base, plain, _, _, folder = saved
    model, _ = load_adapter(base, folder, plain)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        next(model.spatial_tokens.parameters()).add_(1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spatial_tokens.storage.files.save_file", fail)
    with pytest.raises(SpatialTokensError, match="No space left on device"):
        save_adapter(model, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_without_spatial_tokens(tmp_path):
    base, _ = llava()
    for call in (lambda: save_adapter(base, tmp_path), lambda: detach(base)):
        with pytest.raises(SpatialTokensError, match="the model has no spatial tokens"):
            call()


def test_a_processor_that_inserts_slots_already(saved):
    base, plain, inputs, logits, folder = saved
    model, processor = load_adapter(base, folder, plain)
    detach(model)
    model, again = load_adapter(base, folder, processor)
    assert torch.equal(again(images=pictures(1), text="a <image> b", return_tensors="pt")["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, logits)


def test_positional_arguments_of_save_pretrained(tmp_path):
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert not any("spatial" in name for name in load_file(tmp_path / "model.safetensors"))


def test_too_many_positional_arguments_are_refused_and_not_dropped():
    model, _ = attach(*llava(), **FIELDS)
    with pytest.raises(TypeError, match=r"get_image_features\(\) takes \d positional arguments at most, got 20"):
        model.model.get_image_features(*[None] * 20)


def test_twice():
    base, plain = llava()
    attach(base, plain, **FIELDS)
    with pytest.raises(SpatialTokensError, match="has spatial tokens already"):
        attach(base, plain, **FIELDS)


# Offloaded weights


@pytest.fixture
def offloaded(monkeypatch, tmp_path):
    """A tiny LLaVA of which parts are kept on the disk, and come to the CPU for their calls."""
    accelerate = pytest.importorskip("accelerate")

    def make(*parts):
        monkeypatch.setattr(logging.getLogger("accelerate.big_modeling"), "disabled", True)
        names = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
        where = {name: "disk" if name in parts else "cpu" for name in names}
        return accelerate.dispatch_model(llava()[0], where, main_device="cpu", offload_dir=tmp_path / "offloaded")

    return make


def test_offloaded_embeddings(saved, offloaded):
    """Calls, generation (which encodes first; accelerate copies what was encoded), training, the base's file."""
    base, plain, inputs, logits, folder = saved
    expected, _ = load_adapter(base, folder, plain)
    model, _ = load_adapter(offloaded("model.language_model", "model.multi_modal_projector"), folder, plain)
    assert model.get_input_embeddings().weight.is_meta
    assert torch.equal(model(**inputs).logits, logits)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **options), expected.generate(**inputs, **options))
    model.train().requires_grad_(False).spatial_tokens.requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(each.grad is not None for each in model.spatial_tokens.parameters())
    detach(model)
    new, _ = attach(model, plain, **FIELDS)
    assert {each.device.type for each in new.spatial_tokens.parameters()} == {"cpu"}
    assert new(**inputs).logits.isfinite().all()


def test_offloaded_modules_that_an_adapter_has_weights_for(tmp_path, offloaded):
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    attachment_of(model).modules_to_save.append("model.multi_modal_projector")
    save_adapter(model, tmp_path)
    other = offloaded("model.multi_modal_projector")
    attributes = set(vars(other))
    with pytest.raises(SpatialTokensError, match=r"multi_modal_projector.linear_1.weight, which is offloaded; give device_map"):
        load_adapter(other, tmp_path, plain)
    assert set(vars(other)) == attributes


# In place of the projector


def test_replace_projector():
    base, plain = llava()
    image = pictures(1)[0]
    inputs = plain(images=image, text="a <image> b", return_tensors="pt")
    patches = base.get_image_features(inputs["pixel_values"]).pooler_output[0]
    projector = replace_projector(base, **FIELDS)
    plain.num_additional_image_tokens += projector.config.num_spatial_tokens
    tokens = base.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert torch.equal(tokens[6:], patches)
    longer = plain(images=image, text="a <image> b", return_tensors="pt")
    assert longer["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 6
    assert base.generate(**longer, max_new_tokens=2).shape[1] == longer["input_ids"].shape[1] + 2


def test_replace_projector_where_there_is_none_like_it():
    base, _ = qwen()
    with pytest.raises(SpatialTokensError, match="has no multi_modal_projector of Linear, GELU, Linear"):
        replace_projector(base, **FIELDS)


@pytest.mark.parametrize(
    "changes", [{"mode": "both"}, {"resize": "fold"}, {"projector": {"rotation": 3}}, {"peft_type": "SPATIAL_TOKENS_2"}]
)
def test_an_adapter_of_a_newer_version_is_named_as_such(saved, changes):
    base, *_, folder = saved
    values = json.loads((folder / CONFIG).read_text())
    assert values["library"] == f"spatial-tokens {__version__}"
    values["projector"] |= changes.get("projector", {})
    (folder / CONFIG).write_text(
        json.dumps({**values, **changes, "projector": values["projector"], "library": "spatial-tokens 99.0"})
    )
    message = f"written by spatial-tokens 99.0, newer than this spatial-tokens {__version__}; upgrade the library: "
    with pytest.raises(SpatialTokensError, match=re.escape(message)):
        load_adapter(base, folder)
    assert not hasattr(base, "spatial_tokens")


def test_the_class_of_the_model_comes_back():
    """To a type checker: what goes in as a model is what comes out."""
    for function in (attach, detach, load_adapter):
        hints = get_type_hints(function)
        returned = hints["return"] if function is detach else get_args(hints["return"])[0]
        assert isinstance(hints["model"], TypeVar)
        assert returned is hints["model"]


def test_an_adapter_of_int8_kernels(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    torchao.quantize_(model.spatial_tokens, torchao.Int8WeightOnlyConfig())
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    logits = model(**inputs).logits
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["extractor.kernels.0.weight"].dtype == torch.int8
    detach(model)
    model, _ = load_adapter(base, tmp_path, plain)
    assert torch.equal(model(**inputs).logits, logits)
    detach(model)
    model, _ = attach(base, plain, **FIELDS)
    torchao.quantize_(model.spatial_tokens, torchao.Float8WeightOnlyConfig())
    with pytest.raises(SpatialTokensError, match=r"this projector cannot be saved: .* is quantized \(a Float8Tensor\)"):
        save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["extractor.kernels.0.weight"].dtype == torch.int8
