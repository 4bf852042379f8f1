"""Folders in the released layout, end to end: beside what they become, their parts are run one by one, on plain tensors."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.func import functional_call

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

from spatial_tokens import SpatialTokensError, SPProjectorConfig
from spatial_tokens.adapters.huggingface import attach, load_adapter
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.checkpoint import from_released, llava_from_parts
from spatial_tokens.checkpoint import released_folder as released_module
from spatial_tokens.checkpoint.released_folder import convert_released
from spatial_tokens.cli import main
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING
from spatial_tokens.training.conversations import parse, render
from spatial_tokens.training.prepare import prepare_model
from tests.adapters.huggingface.models import pictures
from tests.checkpoint.test_llava_sp import Payload, released, run_released, without
from tests.tolerances import assert_close

C, S, D = 16, 4, 32
SIZES = {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8
KERNELS = (2, 4, 6, 8)
VARIANTS = {"cropping": ("cropping", KERNELS, 4, True), "pooling": ("pooling", KERNELS, None, False)}
TRAINED = "non_lora_trainables.bin"
PREFIX = "base_model.model."
TEXT = "what is <image> this? "


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The base (in float64) with its tokenizer, a whole CLIP with its image processor, and a LoRA as PEFT writes it, twice."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = tiny_llava()[1].tokenizer
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters(tokenizer), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    plain.save_pretrained(folder / "base")
    config = transformers.LlamaConfig(
        hidden_size=D, vocab_size=len(plain), max_position_embeddings=256, initializer_range=0.2, **SIZES
    )
    llama = transformers.LlamaForCausalLM(config).double()
    llama.save_pretrained(folder / "base")

    vision = {"hidden_size": C, "image_size": 16, "patch_size": 2, **SIZES}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config={"hidden_size": 8, "vocab_size": 9, **SIZES})
    )
    clip.save_pretrained(folder / "clip")
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "clip"
    )

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.05, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(llama, lora)
    for name, each in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(each, std=0.2)
    tuned.save_pretrained(folder / "lora")
    torch.save(load_file(folder / "lora" / "adapter_model.safetensors"), folder / "lora" / "adapter_model.bin")
    return folder


def letters(tokenizer):
    """Its model, without tokens for images and padding."""
    from tokenizers import Tokenizer

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["added_tokens"] = [each for each in values["added_tokens"] if each["content"] not in ("<image>", "<pad>")]
    values["model"]["vocab"]["<nothing>"] = values["model"]["vocab"].pop("<pad>")
    return Tokenizer.from_str(json.dumps(values))


def projector_tensors(variant="cropping"):
    """Under the released names, small enough that the language model's norms do not drown the text."""
    kind, kernels, detail, bias = VARIANTS[variant]
    torch.manual_seed(1)
    return {name: 0.1 * each for name, each in released(kind, kernels, detail, widths=(C, S, D), bias=bias).items()}


def settings(parts, **changes):
    """A released config.json."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_size": D, "hidden_act": "silu", **SIZES,
        "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float64", "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None, "mm_hidden_size": C, "mm_patch_merge_type": "flat", "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": str(parts / "clip"), "tokenizer_padding_side": "right",
        "use_mm_proj": True, **changes,
    }  # fmt: skip


def write_folder(folder, parts, *, tensors=None, weights="adapter_model.safetensors", **changes):
    """A LoRA's folder in the released layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings(parts, **changes)))
    for name in ("adapter_config.json", weights):
        shutil.copy(parts / "lora" / name, folder / name)
    tensors = projector_tensors() if tensors is None else tensors
    torch.save({f"{PREFIX}model.{name}": each for name, each in tensors.items()}, folder / TRAINED)
    return folder


@pytest.fixture
def folder(parts, tmp_path):
    return write_folder(tmp_path / "llava-sp-lora", parts)


def inputs_for(processor, text=TEXT):
    return processor(images=pictures(1, (40, 24))[0], text=text, return_tensors="pt")


def merged(parts):
    """The base's tensors plus `alpha / r * B A`, in float64."""
    lora = load_file(parts / "lora" / "adapter_model.safetensors")
    tensors = {name: each.double() for name, each in load_file(parts / "base" / "model.safetensors").items()}
    for name in [name for name in lora if "lora_A" in name]:
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        tensors[name.removeprefix(PREFIX).replace("lora_A.", "")] += ALPHA / RANK * b @ a
    return tensors


def logits_of_the_parts(parts, tensors, variant, pixel_values, *, llama_tensors=None, layer=-2, text=TEXT):
    """Vision tower, the released convolutions, language model on its own embeddings: nothing of this library."""
    tower = transformers.CLIPVisionModel.from_pretrained(parts / "clip").double()
    patches = tower(pixel_values.double(), output_hidden_states=True).hidden_states[layer][:, 1:]
    kind, kernels, _, _ = VARIANTS[variant]
    image = run_released({name: each.double() for name, each in tensors.items()}, kind, kernels, patches)

    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "base")
    llama = transformers.LlamaForCausalLM.from_pretrained(parts / "base").double()
    llama_tensors = merged(parts) if llama_tensors is None else llama_tensors
    before, after = (
        llama_tensors["model.embed_tokens.weight"][tokenizer(piece, return_tensors="pt")["input_ids"]]
        for piece in text.split("<image>")
    )
    sequence = torch.cat([before, image, after], dim=1)
    return functional_call(llama, llama_tensors, kwargs={"inputs_embeds": sequence}).logits


def out_of(call, *args, **kwargs):
    with torch.no_grad():
        return call(*args, **kwargs)


# What it computes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_logits_are_those_of_the_parts(parts, tmp_path, variant, weights):
    tensors = projector_tensors(variant)
    folder = write_folder(tmp_path / "released", parts, tensors=tensors, weights=weights)
    model, processor = from_released(folder, parts / "base")
    inputs = inputs_for(processor)
    logits = out_of(model, **inputs).logits
    expected = out_of(logits_of_the_parts, parts, tensors, variant, inputs["pixel_values"])
    assert logits.shape[1] == len(TEXT) - len("<image>") + 4 + 64
    assert_close(logits[..., :99], expected)


@pytest.mark.parametrize("layer", [-1, 1])
def test_other_layers_of_the_tower(parts, tmp_path, layer):
    folder = write_folder(tmp_path / "released", parts, mm_vision_select_layer=layer)
    model, processor = from_released(folder, parts / "base")
    inputs = inputs_for(processor)
    expected = out_of(logits_of_the_parts, parts, projector_tensors(), "cropping", inputs["pixel_values"], layer=layer)
    assert_close(out_of(model, **inputs).logits[..., :99], expected)


def test_a_projector_on_a_base_without_lora(parts, tmp_path):
    """Stage 1: `mm_projector.bin` beside a config."""
    tensors = projector_tensors("pooling")
    (tmp_path / "config.json").write_text(json.dumps(settings(parts)))
    torch.save({f"model.{name}": each for name, each in tensors.items()}, tmp_path / "mm_projector.bin")
    model, processor = from_released(tmp_path, parts / "base")
    inputs = inputs_for(processor)
    base = {name: each.double() for name, each in load_file(parts / "base" / "model.safetensors").items()}
    expected = out_of(logits_of_the_parts, parts, tensors, "pooling", inputs["pixel_values"], llama_tensors=base)
    assert_close(out_of(model, **inputs).logits[..., :99], expected)


def write_whole(folder, parts, *, tower=None, shards=2, **changes):
    """A whole model in the released layout: merged, in shards, its tokenizer beside it."""
    folder.mkdir()
    tensors = merged(parts)
    tensors |= {f"model.{name}": each for name, each in projector_tensors().items()}
    tensors |= {f"model.vision_tower.vision_tower.vision_model.{name}": each for name, each in (tower or {}).items()}
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        held = {name: each for name, each in tensors.items() if weight_map[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(settings(parts, **changes)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parts / "base" / name, folder / name)
    return folder


@pytest.mark.parametrize("with_tower", [False, True])
def test_a_whole_model_is_its_own_base(parts, tmp_path, with_tower):
    tower = transformers.CLIPVisionModel.from_pretrained(parts / "clip")
    held = {name.removeprefix("vision_model."): each.detach().clone() for name, each in tower.named_parameters()}
    if with_tower:
        held["post_layernorm.bias"] += 1  # one that no logit shows
    kind = "llava" if with_tower else "llava_llama"  # of older and newer versions
    folder = write_whole(tmp_path / "whole", parts, tower=held if with_tower else None, model_type=kind)
    model, processor = from_released(folder, folder)
    inputs = inputs_for(processor)
    expected = out_of(logits_of_the_parts, parts, projector_tensors(), "cropping", inputs["pixel_values"])
    assert_close(out_of(model, **inputs).logits[..., :99], expected)
    given = {name.removeprefix("vision_model."): each for name, each in model.model.vision_tower.named_parameters()}
    assert all(torch.equal(each, given[name]) for name, each in held.items())
    assert not any(name.startswith("mm_") for name in model.config.text_config.to_dict())
    assert model.config.text_config.architectures is None


def test_the_lora_is_what_peft_computes(parts, folder):
    model, _ = from_released(folder, parts / "base")
    llama = transformers.LlamaForCausalLM.from_pretrained(parts / "base")
    tuned = peft.PeftModel.from_pretrained(llama, parts / "lora").eval()
    ids = torch.arange(20)[None]
    assert_close(out_of(model, input_ids=ids).logits[..., :99], out_of(tuned, input_ids=ids).logits)


def test_the_bases_dtype_stays_and_the_sum_is_rounded_once(parts, folder, tmp_path):
    base = tmp_path / "half"
    shutil.copytree(parts / "base", base)
    transformers.LlamaForCausalLM.from_pretrained(parts / "base", dtype=torch.bfloat16).save_pretrained(base)
    model, _ = from_released(folder, base)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj."
    lora = load_file(folder / "adapter_model.safetensors")
    a, b = (lora[f"{PREFIX}{name}lora_{part}.weight"] for part in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}weight"]
    given = model.model.language_model.layers[1].mlp.down_proj.weight
    assert torch.equal(given, (weight.float() + ALPHA / RANK * (b @ a)).bfloat16())


def test_a_projector_of_several_dtypes(parts, tmp_path):
    tensors = {name: each.bfloat16() if "mm_projector" in name else each for name, each in projector_tensors().items()}
    model, processor = from_released(write_folder(tmp_path / "released", parts, tensors=tensors), parts / "base")
    inputs = inputs_for(processor)
    expected = out_of(logits_of_the_parts, parts, tensors, "cropping", inputs["pixel_values"])
    assert_close(out_of(model, **inputs).logits[..., :99], expected)


def test_it_generates_with_its_tokens(parts, folder, tmp_path):
    model, processor = from_released(folder, parts / "base")
    inputs = inputs_for(processor)
    made = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape == (1, inputs["input_ids"].shape[1] + 5)
    other = projector_tensors()
    other["conv_4.weight"] = -other["conv_4.weight"]
    changed, _ = from_released(write_folder(tmp_path / "other", parts, tensors=other), parts / "base")
    assert not torch.allclose(out_of(model, **inputs).logits, out_of(changed, **inputs).logits, atol=1e-3)


def test_the_new_tokens(parts, folder):
    model, processor = from_released(folder, parts / "base")
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<image>", "<|spatial|>"]) == [99, 100]
    assert (model.config.image_token_id, model.config.image_seq_length, tokenizer.padding_side) == (99, 64, "left")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.unk_token_id
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert not any(module.training for module in model.modules())
    logits = out_of(model, **inputs_for(processor)).logits.double()
    assert_close(logits[..., 99], logits[..., :99].mean(-1))


def test_a_base_without_padding_gets_a_token_for_it(parts, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(parts / "base", base)
    values = json.loads((base / "tokenizer_config.json").read_text())
    values.pop("pad_token")
    (base / "tokenizer_config.json").write_text(json.dumps(values))
    model, processor = from_released(folder, base)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "<|spatial|>"]) == [99, 100, 101]
    assert model.generation_config.pad_token_id == 100
    embeddings = model.get_input_embeddings().weight
    assert not torch.equal(embeddings[99], embeddings[100])
    texts = [TEXT, f"a longer one: {TEXT}"]
    images = pictures(2, (40, 24))
    batch = out_of(model, **processor(images=images, text=texts, padding=True, return_tensors="pt")).logits[0, -1]
    alone = out_of(model, **processor(images=images[0], text=TEXT, return_tensors="pt")).logits[0, -1]
    assert_close(batch, alone)


def test_tied_embeddings(parts, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(parts / "base", base)
    config = transformers.LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).double().save_pretrained(base)
    convert_released(folder, base, tmp_path / "out")
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert torch.equal(plain.lm_head.weight[:99], load_file(base / "model.safetensors")["model.embed_tokens.weight"])

    lora = load_file(folder / "adapter_model.safetensors")
    lora |= {f"{PREFIX}lm_head.lora_A.weight": torch.ones(RANK, D), f"{PREFIX}lm_head.lora_B.weight": torch.ones(99, RANK)}
    save_file(lora, folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "target_modules": [*TARGETS, "lm_head"]}))
    refused("unexpected: base_model.model.lm_head.lora_A.weight, base_model.model.lm_head.lora_B.weight$", folder, base)


# Pictures and prompts


@pytest.mark.parametrize("size", [(40, 24), (24, 41), (16, 16)])
def test_pictures_are_padded_to_squares_of_the_mean_color(parts, folder, size):
    _, processor = from_released(folder, parts / "base")
    picture = pictures(1, size)[0]
    clip = transformers.CLIPImageProcessor.from_pretrained(parts / "clip")
    square = Image.new("RGB", (max(size),) * 2, tuple(int(255 * mean) for mean in clip.image_mean))
    square.paste(picture, tuple((max(size) - side) // 2 for side in size))
    expected = clip(images=square, return_tensors="pt")["pixel_values"]
    assert_close(processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("ratio", ["square", None])
def test_pictures_are_cropped_as_clip_does(parts, tmp_path, ratio):
    _, processor = from_released(write_folder(tmp_path / "released", parts, image_aspect_ratio=ratio), parts / "base")
    picture = pictures(1, (40, 24))[0]
    expected = transformers.CLIPImageProcessor.from_pretrained(parts / "clip")(images=picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"], expected)


def test_the_chat_template_is_what_it_was_trained_on(parts, folder):
    _, processor = from_released(folder, parts / "base")
    record = {
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A circle."},
            {"from": "human", "value": "And left of it?"},
            {"from": "gpt", "value": "A square."},
        ],
    }
    sample = parse(record, 0)
    assert render(sample, "chat", processor) == render(sample, "vicuna", processor)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
    ]
    given = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert given == "Be brief. USER: <image>\nWhat? ASSISTANT:"


# On disk


def test_what_was_written_computes_the_same_bit_for_bit(parts, folder, tmp_path):
    model, processor = from_released(folder, parts / "base")
    inputs = inputs_for(processor)
    logits = out_of(model, **inputs).logits
    config = convert_released(folder, parts / "base", tmp_path / "out")
    assert config.kernel_sizes == (2, 4, 6, 8)
    plain, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    loaded, again = load_adapter(plain, tmp_path / "out" / "spatial_tokens", again)
    assert torch.equal(inputs_for(again)["input_ids"], inputs["input_ids"])
    assert again.image_processor.do_pad
    assert again.chat_template == processor.chat_template
    assert torch.equal(out_of(loaded, **inputs).logits, logits)
    assert torch.equal(
        loaded.generate(**inputs, max_new_tokens=4, do_sample=False), model.generate(**inputs, max_new_tokens=4, do_sample=False)
    )


def test_what_was_written_is_a_plain_llava(parts, folder, tmp_path):
    convert_released(folder, parts / "base", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out" / "spatial_tokens")) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert len(plain.get_input_embeddings().weight) == 100
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert len(processor.tokenizer) == 100
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True)
    inputs = inputs_for(processor, text)
    assert (inputs["input_ids"] == 99).sum() == 64
    assert out_of(plain, **inputs).logits.isfinite().all()


def test_an_earlier_conversion_is_replaced_when_the_new_one_is_whole(parts, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert_released(folder, parts / "base", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    torch.save({**torch.load(folder / TRAINED), f"{PREFIX}model.conv_linear.1.bias": torch.ones(D)}, folder / TRAINED)
    with monkeypatch.context() as patch:
        patch.setattr("spatial_tokens.checkpoint.released_folder.save_adapter", full_disk)
        with pytest.raises(SpatialTokensError, match=r"cannot write .*out: No space left on device"):
            convert_released(folder, parts / "base", out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    convert_released(folder, parts / "base", out)
    assert torch.equal(load_file(out / "spatial_tokens" / "adapter_model.safetensors")["spatial_head.fc.bias"], torch.ones(D))
    assert sorted(os.listdir(tmp_path)) == ["llava-sp-lora", "out"]


def test_two_conversions_are_the_same(parts, folder, tmp_path):
    for name in ("a", "b"):
        torch.rand(1)
        convert_released(folder, parts / "base", tmp_path / name)
    for name in ("model.safetensors", "spatial_tokens/adapter_model.safetensors"):
        first, second = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(each, second[key]) for key, each in first.items())


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_the_earlier_conversion_comes_back_if_the_new_one_cannot_take_its_place(parts, folder, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    convert_released(folder, parts / "base", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fails(source, target):
        if str(source).endswith("new") and str(target) == str(out):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr("spatial_tokens.storage.directories._exchange", lambda *_: False)
    with pytest.raises(SpatialTokensError, match=r"cannot write .*out: Permission denied"):
        convert_released(folder, parts / "base", out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path)) == ["llava-sp-lora", "out"]


def test_other_files_are_named_and_never_deleted(parts, folder, tmp_path):
    out = tmp_path / "out"
    convert_released(folder, parts / "base", out)
    for name in ("notes.txt", "checkpoint-12/", "spatial_tokens/notes.txt", "model.bin", "tokenizer.json.bak"):
        other = out / name
        other.mkdir() if name.endswith("/") else other.write_text("precious")
        before = sorted(out.rglob("*"))
        expected = f"out is not replaced: it holds files that a conversion does not write, {name.removesuffix('/')}; move them away"
        with pytest.raises(SpatialTokensError, match=expected):
            convert_released(folder, parts / "base", out)
        assert sorted(out.rglob("*")) == before
        other.rmdir() if name.endswith("/") else other.unlink()


def test_files_that_come_while_a_conversion_runs_are_not_deleted(parts, folder, tmp_path, monkeypatch):
    out, saving = tmp_path / "out", released_module.save_adapter
    convert_released(folder, parts / "base", out)

    def save(model, directory):
        saving(model, directory)
        (out / "notes.txt").write_text("precious")

    monkeypatch.setattr(released_module, "save_adapter", save)
    with pytest.raises(SpatialTokensError, match=r"does not write, notes\.txt;"):
        convert_released(folder, parts / "base", out)
    assert (out / "notes.txt").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["llava-sp-lora", "out"]


def test_other_folders_are_not_replaced(parts, folder, tmp_path):
    base = shutil.copytree(parts / "base", tmp_path / "base")
    for out, message in [
        (folder, "adapter_config.json, adapter_model.safetensors, non_lora_trainables.bin; move them away"),
        (tmp_path, "does not write, base, llava-sp-lora;"),
        (base, "base is not replaced: it is not a conversion, which has a config.json and spatial_tokens/"),
        (folder / "config.json", "config.json is there already and is not a folder"),
    ]:
        before = sorted(out.rglob("*"))
        with pytest.raises(SpatialTokensError, match=message):
            convert_released(folder, parts / "base", out)
        assert sorted(out.rglob("*")) == before
    with pytest.raises(SpatialTokensError, match=r"cannot write .*: No such file or directory"):
        convert_released(folder, parts / "base", tmp_path / "no" / "out")
    with pytest.raises(SpatialTokensError, match=r"a file or directory must be a path, got None"):
        convert_released(folder, parts / "base", None)
    for arguments in ((None, parts / "base"), (folder, None)):
        with pytest.raises(SpatialTokensError, match=r"a file or directory must be a path, got None"):
            from_released(*arguments)


# Training goes on


def test_a_step_lowers_the_loss(parts, folder, tmp_path):
    convert_released(folder, parts / "base", tmp_path / "out")
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    model, processor = load_adapter(plain, tmp_path / "out" / "spatial_tokens", processor)
    model = prepare_model(model, INSTRUCTION_TUNING).train()
    inputs = inputs_for(processor)
    labels = inputs["input_ids"].clone()
    labels[:, :-10] = -100
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    torch.manual_seed(0)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    tokens = dict(model.get_base_model().spatial_tokens.named_parameters())
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in tokens.values())
    optimizer.step()
    torch.manual_seed(0)
    assert model(**inputs, labels=labels).loss < loss


# What is refused


def refused(message, *args, **kwargs):
    with pytest.raises(SpatialTokensError, match=message) as caught:
        from_released(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["config.json", "adapter_config.json", "adapter_model.safetensors", TRAINED])
def test_a_missing_file_is_named(parts, folder, lost):
    (folder / lost).unlink()
    refused(f"cannot read .*{lost}|is incomplete: missing .*{lost}", folder, parts / "base")


def test_folders_of_something_else(parts, tmp_path):
    refused("config.json: No such file", tmp_path, parts / "base")
    refused("config.json is not of a LLaVA of the authors' code: it names no mm_vision_tower", parts / "base", parts / "base")
    (tmp_path / "config.json").write_text(json.dumps(settings(parts)))
    refused(f"no weights in {tmp_path}; looked for", tmp_path, parts / "base")
    (tmp_path / "config.json").write_text("[]")
    refused("config.json must hold an object", tmp_path, parts / "base")
    (tmp_path / "config.json").write_text("{")
    refused("config.json is not valid JSON", tmp_path, parts / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature in .* must be 'patch', got 'cls_patch'"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer in .* must be one layer's number, got \[-2, -5\]"),
        ({"mm_vision_select_layer": -5}, "mm_vision_select_layer is -5, but .*clip has 3 layers"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio in .* must be 'pad' or 'square', got 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type in .* must be 'flat', got 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end in .* must be False, got True"),
        ({"mm_vision_tower": None}, "it names no mm_vision_tower"),
        ({"num_hidden_layers": 32}, "base is not the language model of .*: it has num_hidden_layers 3, not 32"),
        ({"intermediate_size": 1, "vocab_size": 5}, "it has intermediate_size 48, not 1; vocab_size 99, not 5"),
        ({"mm_vision_tower": "/none"}, r"cannot load the vision tower /none \(vision= or --vision gives another\): "),
    ],
)
def test_settings_that_do_not_go(parts, tmp_path, changes, message):
    refused(message, write_folder(tmp_path / "released", parts, **changes), parts / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type in .* must be 'LORA', got 'IA3'"),
        ({"bias": "all"}, "bias in .* must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights in .* must be True or False or 'gaussian', got 'pissa'"),
        ({"use_rslora": True}, "is not of a plain LoRA, .*: it has use_rslora=True; merge it with the authors' code"),
        ({"use_dora": True, "new": 1}, "it has use_dora=True, new=1;"),
        ({"alpha_pattern": {"q_proj": 3}}, "it has alpha_pattern="),
        ({"target_modules": "all-linear"}, "target_modules in .* must be a list of names, got 'all-linear'"),
        ({"r": 0}, "r in .* must be a positive integer and lora_alpha a number, got 0 and 8"),
        (
            {"r": 5},
            r"wrongly shaped: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight \(4, 32\) instead of \(5, 32\)",
        ),
        ({"target_modules": TARGETS[1:]}, "unexpected: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, "),
        ({"target_modules": [*TARGETS, "lm_head"]}, "missing: base_model.model.lm_head.lora_A.weight, "),
    ],
)
def test_loras_that_do_not_go(parts, folder, changes, message):
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **changes}))
    refused(message, folder, parts / "base")


def test_a_lora_that_lacks_a_layer(parts, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.2.mlp.up_proj.lora_B.weight"
    save_file(without(tensors, name), folder / "adapter_model.safetensors")
    refused(f"missing: {name}$", folder, parts / "base")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(projector_tensors(), "conv_linear.1.weight"), "missing: conv_linear.1.weight$"),
        (
            released("cropping", KERNELS, 4, widths=(C, S, 33)),
            "base is not the language model of .*: it has hidden_size 32, not 33",
        ),
        (released("cropping", KERNELS, 4, widths=(15, S, D)), "clip is not the vision tower of .*: it has hidden_size 16, not 15"),
        (
            released("cropping", (4, 10), 4, widths=(C, S, D)),
            "has the kernels 4, 10 on a grid of 8 x 8: no released model has these",
        ),
        (
            {**projector_tensors(), "layers.0.mlp.up_proj.weight": torch.ones(2)},
            "holds 1 tensors of the language model itself, such as .*up_proj.weight; only a LoRA can be merged into a base",
        ),
        (
            {**projector_tensors(), "vision_tower.vision_tower.vision_model.pre_layrnorm.bias": torch.ones(C)},
            "the tensors of the vision tower in .* do not fit: missing: ",
        ),
    ],
)
def test_projectors_that_do_not_go(parts, tmp_path, tensors, message):
    refused(message, write_folder(tmp_path / "released", parts, tensors=tensors), parts / "base")


def test_a_config_says_what_the_projector_must_be(parts, folder):
    config = SPProjectorConfig.from_preset("llava-sp-pooling")
    refused("missing: conv_4.1.weight", folder, parts / "base", config=config)


def test_a_config_without_a_patch_head_is_refused(parts, folder):
    config = SPProjectorConfig.from_preset("llava-sp-cropping", patch_head=None)
    refused("the released names hold .* patch_head='mlp', got .* patch_head=None", folder, parts / "base", config=config)


def test_bases_that_do_not_go(parts, folder, tmp_path):
    refused("cannot load the language model /none: ", folder, "/none")
    refused("clip must be a Llama, such as Vicuna, got a clip; give the language model alone", folder, parts / "clip")
    refused("is itself an adapter; give the language model that it was trained on", folder, folder)
    base = tmp_path / "base"
    shutil.copytree(parts / "base", base)
    tensors = load_file(base / "model.safetensors")
    save_file(without(tensors, "model.norm.weight") | {"model.extra": torch.ones(1)}, base / "model.safetensors", {"format": "pt"})
    refused("the tensors of .*base are not a Llama's: missing: model.norm.weight; unexpected: model.extra$", folder, base)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    refused("cannot load the tokenizer of .*base: ", folder, base)
    (base / "model.safetensors").unlink()
    refused("cannot load the language model .*base: ", folder, base)


def test_a_whole_model_on_another_base(parts, tmp_path):
    folder = write_whole(tmp_path / "whole", parts)
    refused(
        "of the language model itself, such as .*; it is a whole model, so give .*whole as its base too", folder, parts / "base"
    )


def test_vision_towers_that_do_not_go(parts, folder, tmp_path):
    refused(
        r"cannot load the vision tower .*base .*: it must be a CLIP, got a llama", folder, parts / "base", vision=parts / "base"
    )
    vision = tmp_path / "clip"
    shutil.copytree(parts / "clip", vision)
    (vision / "preprocessor_config.json").unlink()
    refused("cannot load the image processor of .*clip: ", folder, parts / "base", vision=vision)
    tensors = load_file(vision / "model.safetensors")
    lost = next(name for name in tensors if name.startswith("vision_model.") and name.endswith("fc1.bias"))
    save_file(without(tensors, lost), vision / "model.safetensors", {"format": "pt"})
    refused("cannot load the vision tower .*clip .*: missing: .*fc1.bias$", folder, parts / "base", vision=vision)


@pytest.mark.parametrize("name", [TRAINED, "adapter_model.bin"])
def test_code_in_a_folder_is_not_run(parts, tmp_path, name):
    folder, trace = write_folder(tmp_path / "released", parts, weights="adapter_model.bin"), tmp_path / "trace"
    torch.save({**torch.load(folder / name), "payload": Payload(trace)}, folder / name)
    refused(f"{name} is not a complete PyTorch file of tensors alone", folder, parts / "base")
    assert not trace.exists()


def test_code_in_a_base_is_not_run(parts, folder, tmp_path):
    base, trace = tmp_path / "base", tmp_path / "trace"
    shutil.copytree(parts / "base", base)
    torch.save({**load_file(base / "model.safetensors"), "payload": Payload(trace)}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused("cannot load the language model", folder, base)
    assert not trace.exists()


# The command


def command(capsys, *arguments, code=0):
    given = main([str(argument) for argument in ("convert", *arguments)])
    printed = capsys.readouterr()
    assert given == code, printed.err
    if code:
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("spatial-tokens convert: error: ")
    return printed.err if code else printed.out


def test_the_command_says_how_to_load_what_it_wrote(capsys, parts, folder, tmp_path):
    out = tmp_path / "out"
    printed = command(capsys, folder, out, "--base", parts / "base")
    assert printed.startswith(f"wrote {out}: vision_hidden_size=16, ")
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    names = {"LlavaForConditionalGeneration": transformers.LlavaForConditionalGeneration, "load_adapter": load_adapter}
    names["AutoProcessor"] = transformers.AutoProcessor
    exec("\n".join(lines), names)
    assert len(lines) == 3
    inputs = inputs_for(names["processor"])
    model, _ = from_released(folder, parts / "base")
    assert torch.equal(out_of(names["model"], **inputs).logits, out_of(model, **inputs).logits)
    assert f"--model {out} --start_from {out}" in printed


def test_the_commands_options(capsys, parts, tmp_path):
    folder, out = write_folder(tmp_path / "released", parts, mm_vision_tower="/gone"), tmp_path / "out"
    assert "--vision gives another" in command(capsys, folder, out, "--base", parts / "base", code=2)
    told = json.loads(command(capsys, folder, out, "--base", parts / "base", "--vision", parts / "clip", "--json"))
    assert told["output"] == str(out)
    assert told["config"]["kernel_sizes"] == [2, 4, 6, 8]
    assert "is already there" in command(capsys, folder, out, "--base", parts / "base", code=2)
    options = ("--base", parts / "base", "--vision", parts / "clip", "--overwrite")
    command(capsys, folder, out, *options)
    assert "IN and OUT are both" in command(capsys, folder, folder, *options, code=2)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    told = command(capsys, folder, mine, *options, code=2)
    assert "is not replaced: it holds files that a conversion does not write, notes.txt" in told
    assert "--vision needs --base" in command(capsys, folder, tmp_path / "other", "--vision", parts / "clip", code=2)
    wrong = command(capsys, folder, tmp_path / "other", *options, "--config", "llava-sp-pooling", code=2)
    assert "missing: conv_4.1.weight" in wrong
    assert sorted(os.listdir(tmp_path)) == ["mine", "out", "released"]
    assert os.listdir(mine) == ["notes.txt"]


@pytest.mark.parametrize("failing", ["processor", "model", "adapter"])
def test_nothing_is_left_after_a_failure(capsys, parts, folder, tmp_path, monkeypatch, failing):
    names = {
        "processor": "transformers.LlavaProcessor.save_pretrained",
        "model": "transformers.LlavaForConditionalGeneration.save_pretrained",
        "adapter": "spatial_tokens.checkpoint.released_folder.save_adapter",
    }
    monkeypatch.setattr(names[failing], full_disk)
    out = tmp_path / "out"
    assert f"cannot write {out}: No space left on device" in command(capsys, folder, out, "--base", parts / "base", code=2)
    assert os.listdir(tmp_path) == ["llava-sp-lora"]


def test_an_interrupt_leaves_nothing(capsys, parts, folder, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spatial_tokens.checkpoint.released_folder.save_adapter", interrupt)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--base", str(parts / "base")]) == 130
    assert os.listdir(tmp_path) == ["llava-sp-lora"]


def test_without_transformers(capsys, parts, folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'spatial-tokens[hf]'" in command(capsys, folder, tmp_path / "out", "--base", parts / "base", code=2)
    assert not (tmp_path / "out").exists()


# A LLaVA of its parts, before any training


def test_a_new_llava_is_its_parts(parts):
    torch.manual_seed(0)
    model, _ = llava_from_parts(parts / "base", parts / "clip")
    llama = transformers.LlamaForCausalLM.from_pretrained(parts / "base")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert_close(logits[..., : llama.config.vocab_size], llama(ids).logits)
        clip = transformers.CLIPVisionModel.from_pretrained(parts / "clip")
        pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
        patches = clip.double()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        mlp = model.model.multi_modal_projector
        expected = mlp.linear_2(torch.nn.functional.gelu(mlp.linear_1(patches)))
        found = model.get_image_features(pixels)
        assert_close(torch.stack(list(getattr(found, "pooler_output", found))), expected)
    torch.manual_seed(0)
    again, _ = llava_from_parts(parts / "base", parts / "clip")
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in model.state_dict().items())


def test_a_new_llava_takes_spatial_tokens_and_trains(parts):
    model, processor = llava_from_parts(parts / "base", parts / "clip")
    model, processor = attach(model.float(), processor, kernel_sizes=KERNELS, detail_kernel_size=4, spatial_hidden_size=S)
    inputs = processor(images=pictures(1), text="USER: <image>\nWhat? ASSISTANT: that", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    model = prepare_model(model.train(), ALIGNMENT)
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_new_llava_needs_both_parts(parts, tmp_path):
    with pytest.raises(SpatialTokensError, match="must be a Llama"):
        llava_from_parts(parts / "clip", parts / "clip")
    with pytest.raises(SpatialTokensError, match="must be a CLIP"):
        llava_from_parts(parts / "base", parts / "base")
    with pytest.raises(SpatialTokensError, match="got no model"):
        llava_from_parts(tmp_path, parts / "clip")
