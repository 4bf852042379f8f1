"""PEFT around attached models: which files hold the spatial tokens, and warnings where training would be for nothing."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import PEFT_EXCLUDE_MODULES, attach, detach, load_adapter, save_adapter, trainer_callback
from spatial_tokens.adapters.huggingface.training_warnings import FROZEN, WRAPPED
from tests.adapters.huggingface.models import FIELDS, llava, pictures


def batch_of(processor, with_image=True):
    images, text = (pictures(1), "<image> a b") if with_image else (None, "a b c")
    made = dict(processor(images=images, text=text, return_tensors="pt"))
    return {**made, "labels": made["input_ids"].masked_fill(made["input_ids"] > 98, -100)}


@pytest.mark.parametrize("order", ["attach first", "peft first", "modules_to_save"])
def test_lora_of_the_language_model(order):
    base, plain = llava()
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    if order == "peft first":
        model = peft.get_peft_model(base, config)
        model, processor = attach(model, plain, **FIELDS)
    else:
        model, processor = attach(base, plain, **FIELDS)
        config.modules_to_save = ["spatial_tokens"] if order == "modules_to_save" else None
        model = peft.get_peft_model(model, config)
        if order == "attach first":
            base.spatial_tokens.requires_grad_(True)
    model.train()
    model(**batch_of(processor)).loss.backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert any("lora" in name for name in trained)
    of_ours = [name for name in trained if "spatial_tokens" in name]
    assert len(of_ours) == len(list(base.spatial_tokens.parameters())) // (2 if order == "modules_to_save" else 1)
    assert not any("original_module" in name for name in of_ours)
    assert model.eval().generate(**{k: v for k, v in batch_of(processor).items() if k != "labels"}, max_new_tokens=2).shape[0] == 1


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False, **options)


def test_lora_and_adapter_in_two_folders(tmp_path):
    """Loaded one after the other, in either order."""
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model = peft.get_peft_model(model, lora()).eval()
    batch = batch_of(processor)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "lora")
    save_adapter(model, tmp_path / "ours")
    assert all("lora" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    base, plain = llava()
    first, _ = load_adapter(base, tmp_path / "ours", plain)
    assert torch.equal(peft.PeftModel.from_pretrained(first, tmp_path / "lora").eval()(**batch).logits, logits)
    base, plain = llava()
    second, _ = load_adapter(peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval(), tmp_path / "ours", plain)
    assert torch.equal(second(**batch).logits, logits)
    merged = second.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert not hasattr(detach(merged), "spatial_tokens")


@pytest.mark.parametrize("saved_by", ["peft", "us"])
def test_modules_to_save(tmp_path, saved_by):
    """PEFT's copy of the spatial tokens is the one that is trained: it is what either file holds."""
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model = peft.get_peft_model(model, lora(modules_to_save=["spatial_tokens"])).eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "modules_to_save" in name:
                each.add_(0.1)
            elif "lora" in name:
                each.zero_()
    batch = batch_of(processor)
    logits = model(**batch).logits
    base, plain = llava()
    if saved_by == "peft":
        model.save_pretrained(tmp_path)
        attach(base, plain, **FIELDS)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    else:
        save_adapter(model, tmp_path)
        loaded, _ = load_adapter(base, tmp_path, plain)
    assert torch.equal(loaded(**batch).logits, logits)


def test_lora_of_the_head_and_the_embeddings():
    """Wrapped after attach: the reserved token is still no word of the model's, and never made."""
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    token = model._spatial_attachment.token_id
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    batch = batch_of(processor)
    assert model(**batch).logits.shape[-1] == token
    made = model.generate(**{name: each for name, each in batch.items() if name != "labels"}, max_new_tokens=3)
    assert not (made[:, batch["input_ids"].shape[1] :] == token).any()


# What would be lost


def given_by(call):
    """The warnings of spatial tokens."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in found if "spatial" in str(each.message)]


def two_steps(model, batch):
    """Of training with the labels given, then without, as losses of one's own are."""
    model.train()
    without = {name: each for name, each in batch.items() if name != "labels"}
    model(**batch).loss.backward()
    model(**without).logits.mean().backward()


def all_linear(**options):
    return peft.LoraConfig(r=2, target_modules="all-linear", **options)


EXCLUDED = {"exclude_modules": PEFT_EXCLUDE_MODULES}


@pytest.mark.parametrize("mode", ["own", "image"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (all_linear(), [WRAPPED]),
        (all_linear(**EXCLUDED), [FROZEN]),
        (all_linear(**EXCLUDED, modules_to_save=["spatial_tokens"]), []),
    ],
    ids=["wrapped", "frozen", "saved"],
)
def test_warned_of_once(config, expected, mode):
    model, processor = attach(*llava(), mode=mode, **FIELDS)
    model = peft.get_peft_model(model, config)
    model.enable_input_require_grads()
    for warned_of in (expected, []):
        assert given_by(lambda: model.eval()(**batch_of(processor))) == []
        assert given_by(lambda: two_steps(model, batch_of(processor))) == warned_of


@pytest.mark.parametrize("how", ["load_adapter", "load_state_dict", "trained before", "modules_to_save"])
def test_trained_tokens_that_are_frozen_on_purpose(tmp_path, how):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    batch = batch_of(processor)
    if how == "trained before":
        optimizer = torch.optim.AdamW(model.spatial_tokens.parameters(), lr=1e-3)
        model.train()(**batch).loss.backward()
        optimizer.step()
    elif how == "load_adapter":
        save_adapter(model, tmp_path)
        model, _ = load_adapter(detach(model), tmp_path, plain)
    elif how == "load_state_dict":
        trained = {name: each + 0.01 for name, each in model.spatial_tokens.state_dict().items()}
        model.spatial_tokens.load_state_dict(trained)
    else:
        peft.get_peft_model(model, lora(modules_to_save=["spatial_tokens"])).save_pretrained(tmp_path)
        base, plain = llava()
        model, _ = attach(base, plain, **FIELDS)
        model = peft.PeftModel.from_pretrained(model, tmp_path)
    model.requires_grad_(False)
    if how != "modules_to_save":
        model = peft.get_peft_model(model, lora())
    model.enable_input_require_grads()
    assert given_by(lambda: two_steps(model, batch)) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_warns_once_and_does_not_train_what_cannot_be_saved(tmp_path, smoothing):
    """With label smoothing the model is not given labels."""
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=1, report_to=[], remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True, use_cpu=True, label_smoothing_factor=smoothing,
    )  # fmt: skip

    def trainer(config, **options):
        model, processor = attach(*llava(), **FIELDS)
        rows = [batch_of(processor)] * 3
        return transformers.Trainer(
            model=peft.get_peft_model(model, config), args=arguments, train_dataset=rows, data_collator=lambda found: found[0],
            **options,
        )  # fmt: skip

    assert given_by(trainer(lora()).train) == [FROZEN]
    with pytest.raises(SpatialTokensError, match="if a part is wrapped, merge or unload it first"):
        trainer(all_linear(), callbacks=[trainer_callback()]).train()


@pytest.mark.parametrize("loaded_by", ["peft", "the base of peft", "transformers", "load_adapter"])
def test_spatial_tokens_of_peft_on_a_base_that_has_none(tmp_path, loaded_by):
    """PEFT leaves them out without a word; attach does not."""
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    save_adapter(model, tmp_path / "ours")
    peft.get_peft_model(model, lora(modules_to_save=["spatial_tokens"])).save_pretrained(tmp_path / "peft")
    base, plain = llava()
    if loaded_by == "transformers":
        base.load_adapter(tmp_path / "peft")
        model = base
    else:
        model = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        model = base if loaded_by == "the base of peft" else model
    again = load_adapter if loaded_by == "load_adapter" else attach
    options = {"directory": tmp_path / "ours"} if again is load_adapter else FIELDS
    with pytest.raises(SpatialTokensError, match=r"'default' has 'spatial_tokens' among its modules_to_save.* to the base first"):
        again(model, processor=plain, **options)


def test_a_folder_of_ours_given_to_peft_and_transformers(tmp_path):
    base, plain = llava()
    model, _ = attach(base, plain, **FIELDS)
    save_adapter(model, tmp_path)
    detach(model)
    for load in (lambda: peft.PeftModel.from_pretrained(base, tmp_path), lambda: base.load_adapter(tmp_path)):
        with pytest.raises(KeyError, match=r"load with spatial_tokens\.adapters\.huggingface\.load_adapter"):
            load()
    model, _ = load_adapter(base, tmp_path, plain)
