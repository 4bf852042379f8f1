"""Quantized bases are attached, trained, saved and loaded as others; and models that are quantized with their spatial tokens."""

import copy
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING
from spatial_tokens.training.prepare import prepare_model, save_trained
from spatial_tokens.visualize import sample_picture
from tests.tolerances import assert_close, rounding

SKIPPED = ["model.multi_modal_projector", "lm_head"]
MLP = "model.multi_modal_projector"
ROUNDING = rounding(torch.bfloat16, 16)  # bitsandbytes packs 4 bits again after a save, with scales that it has rounded


def torchao(make):
    def config(skipped):
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(make(quantization), modules_to_not_convert=skipped)

    return config


def bitsandbytes(**options):
    def config(skipped):
        pytest.importorskip("bitsandbytes")
        return transformers.BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options)

    return config


QUANTIZED = {
    "torchao, int8": torchao(lambda quantization: quantization.Int8WeightOnlyConfig()),
    "torchao, int4": torchao(lambda quantization: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))),
    "torchao, float8": torchao(lambda quantization: quantization.Float8WeightOnlyConfig()),
    "bitsandbytes, int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes, nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}
cases = pytest.mark.parametrize("config", QUANTIZED.values(), ids=list(QUANTIZED))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base in bfloat16 on disk, and its processor."""
    torch.manual_seed(0)
    model, processor = tiny_llava()
    folder = tmp_path_factory.mktemp("base")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, processor


def loaded(saved, config, skipped=SKIPPED):
    found = LlavaForConditionalGeneration.from_pretrained(saved[0], quantization_config=config(skipped), dtype=torch.bfloat16)
    return found.eval()


def asked(processor, text, **images):
    return processor(text=text, return_tensors="pt", **images).to(torch.bfloat16)


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@cases
@torch.no_grad()
def test_attach_and_detach(config, saved, tmp_path):
    model = loaded(saved, config)
    words = asked(saved[1], "only words")
    before = model(**words).logits
    model.save_pretrained(tmp_path / "before")
    attach(model, None, spatial_hidden_size=8)
    assert_close(model(**words).logits, before, ROUNDING)
    model.save_pretrained(tmp_path / "attached")
    assert names_in(tmp_path / "attached") == names_in(tmp_path / "before")
    assert any(name.startswith("spatial_tokens.") for name in model.state_dict())
    assert_close(detach(model)(**words).logits, before, ROUNDING)


@cases
def test_a_lora_and_spatial_tokens_train_on_it(config, saved, tmp_path):
    torch.manual_seed(1)
    model, processor = attach(loaded(saved, config), saved[1], spatial_hidden_size=8)
    batch = asked(processor, "<image> What is this?", images=sample_picture())
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= model.config.image_token_id, -100)
    model = prepare_model(model, INSTRUCTION_TUNING)
    trained = [each for each in model.parameters() if each.requires_grad]
    packed = {name: each.clone() for name, each in model.state_dict().items() if "base_layer.weight" in name}
    assert packed
    optimizer, losses = torch.optim.AdamW(trained, 1e-3), []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        assert all(each.grad.isfinite().all() for each in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(same(each, packed[name]) for name, each in model.state_dict().items() if name in packed)
    save_trained(model, tmp_path)
    again, _ = load_adapter(loaded(saved, config), tmp_path / "spatial_tokens", saved[1])
    again = PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    kept = dict(again.named_parameters())
    for name, each in model.named_parameters():
        if "lora_" in name or "spatial_tokens" in name:
            assert torch.equal(kept[name].to(each), each), name
    with torch.no_grad():
        assert_close(again(**batch).logits, model.eval()(**batch).logits, ROUNDING)  # its MLP has the base's dtype again


def same(one, other):
    values = (each.dequantize() if hasattr(each, "tensor_data_names") else each for each in (one, other))
    return torch.equal(*values)


@cases
def test_the_mlp_of_the_patches_must_not_be_quantized(config, saved, tmp_path):
    plain, _ = attach(LlavaForConditionalGeneration.from_pretrained(saved[0]), None, spatial_hidden_size=8)
    save_adapter(prepare_model(plain, ALIGNMENT), tmp_path)
    model = loaded(saved, config, ["lm_head"])
    with pytest.raises(SpatialTokensError, match=rf"weights for {MLP}.linear_1.weight, which is quantized; load the base without"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "spatial_tokens")
    with pytest.raises(SpatialTokensError, match=r"multi_modal_projector.linear_1.weight is quantized and cannot be trained"):
        prepare_model(attach(model, None, spatial_hidden_size=8)[0], ALIGNMENT)


def tuned_llava():
    torch.manual_seed(2)
    model, processor = attach(*tiny_llava(), spatial_hidden_size=8)
    model = prepare_model(model, ALIGNMENT)
    own = {name: each.clone() for name, each in model.get_submodule(MLP).state_dict().items()}
    with torch.no_grad():
        for each in model.get_submodule(MLP).parameters():
            each.mul_(2)
    return model, processor, own


def test_quantized_with_its_spatial_tokens(tmp_path):
    """int8 is saved, and its values come back; other formats are refused, before a file is written."""
    torchao = pytest.importorskip("torchao.quantization")
    model, _, _ = tuned_llava()
    small = copy.deepcopy(model)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    save_adapter(small, tmp_path / "int8")
    again, _ = load_adapter(tiny_llava()[0], tmp_path / "int8")
    for path in (MLP, "spatial_tokens"):
        for name, each in small.get_submodule(path).named_parameters():
            assert same(again.get_submodule(path).get_parameter(name), each)
    other = copy.deepcopy(model)
    torchao.quantize_(other.get_submodule(MLP), torchao.Float8WeightOnlyConfig())
    with pytest.raises(SpatialTokensError, match=rf"{MLP}.linear_1.weight is quantized \(a Float8Tensor\), only torchao's Int8"):
        save_adapter(other, tmp_path / "float8")
    assert not os.path.exists(tmp_path / "float8") or not os.listdir(tmp_path / "float8")


def test_detach_gives_a_module_its_own_weights_back_or_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model, _, own = tuned_llava()
    small = copy.deepcopy(model)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    hooks = len(small.model._forward_pre_hooks)
    for _ in range(2):
        with pytest.raises(SpatialTokensError, match=rf"{MLP}.linear_1.weight was quantized after attach.* detach first"):
            detach(small)
        assert hasattr(small, "spatial_tokens")
        assert len(small.model._forward_pre_hooks) == hooks > 0
    assert all(torch.equal(each, own[name]) for name, each in detach(model).get_submodule(MLP).state_dict().items())


def test_detach_of_a_quantized_model_that_did_not_train():
    torchao = pytest.importorskip("torchao.quantization")
    model, processor = tiny_llava()
    plain = copy.deepcopy(model)
    for each in (plain, attach(model, None, spatial_hidden_size=8)[0]):
        torchao.quantize_(each, torchao.Int8WeightOnlyConfig())
    words = processor(text="only words", return_tensors="pt")
    assert torch.equal(detach(model)(**words).logits, plain(**words).logits)
    assert not any("spatial_tokens" in name for name, _ in model.named_modules())
