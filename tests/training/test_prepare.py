"""Preparing models for a stage, and the data of other families, on tiny models."""

import dataclasses
import json
from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from PIL import Image
from safetensors.torch import load_file, save_file

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.ready import tiny_llava, tiny_qwen_vl
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING, LoRA, parameter_groups
from spatial_tokens.training.dataset import Collator, ConversationDataset
from spatial_tokens.training.prepare import load_trained, parts_of, prepare_model, save_trained
from tests.adapters.huggingface.test_processing import FAMILIES, GRID_OF_4, gemma3, idefics3, internvl, llava_next
from tests.tolerances import assert_close, rounding

STAGES = [ALIGNMENT, INSTRUCTION_TUNING]


def made(stage, dtype=torch.float32):
    torch.manual_seed(0)
    base, processor = tiny_llava()
    model, processor = attach(base.to(dtype), processor, spatial_hidden_size=8)
    return prepare_model(model, stage), processor


def trained(model):
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_trained_parameter_is_in_a_group(stage):
    model, _ = made(stage, torch.bfloat16)
    grouped = [id(each) for group in parameter_groups(parts_of(model), stage) for each in group["params"]]
    assert sorted(grouped) == sorted(id(each) for each in trained(model).values())
    assert {each.dtype for each in trained(model).values()} == {torch.float32}
    assert {each.dtype for each in model.parameters() if not each.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_kernels_are_the_extractors_and_the_detail_maps(stage):
    model, _ = made(stage)
    stage = dataclasses.replace(stage, kernel_learning_rate=1e-5)
    names = {id(each): name for name, each in model.named_parameters()}
    groups = parameter_groups(parts_of(model), stage)
    (kernels,) = ({names[id(each)] for each in group["params"]} for group in groups if group["name"] == "kernels")
    assert kernels == {name for name in names.values() if ".extractor." in name or ".detail_kernel." in name}
    assert len(kernels) == 7


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """An image, a question and an answer."""
    folder = tmp_path_factory.mktemp("batch")
    Image.effect_noise((50, 40), 90).convert("RGB").save(folder / "1.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    (folder / "data.json").write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))
    _, processor = made(ALIGNMENT)
    return Collator(0)([ConversationDataset(folder / "data.json", folder, processor)[0]])


def same_values(model):
    """Large enough for gradients of every part, the same in each model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for each in trained(model).values():
            each.copy_(0.05 * torch.randn(each.shape))
    return model


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "stage",
    [ALIGNMENT, dataclasses.replace(INSTRUCTION_TUNING, lora=LoRA(rank=4, alpha=8, dropout=0.0))],
    ids=lambda stage: stage.name,
)
def test_a_bfloat16_model_learns_in_float32(stage, batch, autocast):
    """With gradients that are those of float32, but for the rounding of the frozen parts; with autocast and without."""
    model, expected = (same_values(made(stage, torch.bfloat16)[0]) for _ in range(2))
    expected.float()(**batch).loss.backward()
    before = {name: each.detach().clone() for name, each in trained(model).items()}
    optimizer = torch.optim.AdamW(parameter_groups(parts_of(model), stage))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    given, wanted = (torch.cat([each.grad.flatten() for each in trained(m).values()]) for m in (model, expected))
    assert given.dtype == torch.float32
    assert (given - wanted).norm() <= rounding(torch.bfloat16, operations=5) * wanted.norm()
    optimizer.step()
    moved = {name for name, each in trained(model).items() if not torch.equal(each, before[name])}
    assert len(moved) > len(before) // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mlp_takes_and_returns_the_bases_dtype(dtype):
    model, _ = made(ALIGNMENT, dtype)
    mlp, patches = model.model.multi_modal_projector, torch.randn(1, 3, 64).to(dtype)
    first, second = mlp.linear_1, mlp.linear_2
    hidden = torch.nn.functional.gelu(patches.float() @ first.weight.T + first.bias)
    expected = (hidden @ second.weight.T + second.bias).to(dtype)
    assert mlp(patches).dtype == mlp(image_features=patches).dtype == dtype
    assert_close(mlp(patches), expected, rounding(dtype, operations=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detaching_restores_the_mlp(dtype):
    torch.manual_seed(0)
    base, processor = tiny_llava()
    base.to(dtype)
    mlp = base.model.multi_modal_projector
    own = {name: each.clone() for name, each in mlp.state_dict().items()}
    hooks = len(mlp._forward_hooks), len(mlp._forward_pre_hooks)
    model = same_values(prepare_model(attach(base, processor, spatial_hidden_size=8)[0], ALIGNMENT))
    copied = deepcopy(prepare_model(model, ALIGNMENT))  # once more, which changes nothing
    for each in (copied, model):
        for weight in each.model.multi_modal_projector.parameters():
            weight.grad = torch.ones_like(weight)
        mlp = detach(each).model.multi_modal_projector
        assert all(weight.grad is None for weight in mlp.parameters())
        assert (len(mlp._forward_hooks), len(mlp._forward_pre_hooks)) == hooks
        for name, tensor in mlp.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, own[name])
    assert mlp(torch.randn(1, 3, 64, dtype=dtype)).dtype == dtype


def test_a_quantized_mlp_is_refused_and_the_model_stays_as_it_was():
    model, _ = attach(*tiny_llava(), spatial_hidden_size=8)
    layer = model.model.multi_modal_projector.linear_2
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)
    before = {name: (each.dtype, each.requires_grad) for name, each in model.named_parameters()}
    said = (
        r"^model.multi_modal_projector.linear_2.weight is quantized .*skip_modules=\['model.multi_modal_projector', 'lm_head'\]\)$"
    )
    with pytest.raises(SpatialTokensError, match=said):
        prepare_model(model, INSTRUCTION_TUNING)
    assert {name: (each.dtype, each.requires_grad) for name, each in model.named_parameters()} == before
    layer.weight = torch.nn.Parameter(torch.ones(64, 64))
    assert prepare_model(model, ALIGNMENT) is model


def test_a_stage_is_expected():
    with pytest.raises(SpatialTokensError, match="stage must be a Stage, such as ALIGNMENT, got 'alignment'"):
        prepare_model(attach(*tiny_llava(), spatial_hidden_size=8)[0], "alignment")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_text_alone_gives_every_trained_parameter_a_gradient(stage):
    """Of zeros: the other processes wait for it."""
    model, processor = made(stage)
    batch = processor(text="only words", return_tensors="pt")
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for name, each in trained(model).items():
        assert each.grad is not None, name
        assert "lora_" in name or not each.grad.any(), name


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_save_and_load_in_place(stage, tmp_path):
    model, _ = made(stage)
    with torch.no_grad():
        for each in trained(model).values():
            each.normal_()
    save_trained(model, tmp_path)
    other, _ = made(stage)
    load_trained(other, tmp_path)
    assert trained(other).keys() == trained(model).keys()
    assert all(torch.equal(each, trained(model)[name]) for name, each in trained(other).items())


def test_load_refuses_what_is_not_the_models(tmp_path):
    model, _ = made(INSTRUCTION_TUNING)
    with pytest.raises(SpatialTokensError, match="does not exist"):
        load_trained(model, tmp_path)
    save_trained(made(ALIGNMENT)[0], tmp_path)
    with pytest.raises(SpatialTokensError, match="lora"):
        load_trained(model, tmp_path)
    other, _ = attach(*tiny_llava(), spatial_hidden_size=16)
    save_trained(prepare_model(other, ALIGNMENT), tmp_path)
    with pytest.raises(SpatialTokensError, match="wrongly shaped"):
        load_trained(made(ALIGNMENT)[0], tmp_path)


def test_preparing_twice_changes_nothing():
    model, _ = made(INSTRUCTION_TUNING)
    names = list(trained(model))
    assert prepare_model(model, INSTRUCTION_TUNING) is model
    assert list(trained(model)) == names


def test_a_model_without_spatial_tokens():
    with pytest.raises(SpatialTokensError, match="attach"):
        prepare_model(tiny_llava()[0], ALIGNMENT)


def test_an_adapter_brings_the_trained_mlp_and_detaching_takes_it_away(tmp_path):
    model, _ = made(ALIGNMENT)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    base, processor = tiny_llava()
    own = base.model.multi_modal_projector.linear_1.weight.clone()
    base, _ = load_adapter(base, tmp_path, processor)
    assert torch.equal(base.model.multi_modal_projector.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)
    save_adapter(base, tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    detach(base)
    assert torch.equal(base.model.multi_modal_projector.linear_1.weight, own)
    base, _ = load_adapter(base.bfloat16(), tmp_path, processor)
    detach(same_values(prepare_model(base, ALIGNMENT)))  # after which what was loaded is neither
    assert torch.equal(base.model.multi_modal_projector.linear_1.weight, own.bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda v: v.update(modules_to_save="all"), "modules_to_save .* must be a list of names"),
     (lambda v: v.update(modules_to_save=["model.nothing"]), "weights of modules that the model does not have"),
     (lambda v: v.update(modules_to_save=[]), "do not fit: unexpected: model.multi_modal_projector")],
)  # fmt: skip
def test_an_adapter_of_other_modules_is_refused(tmp_path, change, said):
    model, _ = made(ALIGNMENT)
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    change(values)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    base, processor = tiny_llava()
    with pytest.raises(SpatialTokensError, match=said):
        load_adapter(base, tmp_path, processor)
    assert not hasattr(base, "spatial_tokens")


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'image' %}PLACE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def qwen():
    base, processor = tiny_qwen_vl()
    return base, processor, "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("family", [*FAMILIES, qwen], ids=lambda family: family.__name__)
def test_other_families(family, tmp_path):
    """Two images in a row of turns, and text alone: loss on the answers alone, and a step on the batch of both."""
    torch.manual_seed(0)
    base, plain, place = family()
    options = {"resize": "pool", "spatial_hidden_size": 8} if family is qwen else GRID_OF_4
    model, processor = attach(base, plain, **options)
    processor.chat_template = TEMPLATE.replace("PLACE", place)
    for name, size in (("a.png", (128, 80)), ("b.png", (64, 64))):
        Image.effect_noise(size, 90).save(tmp_path / name)
    word = "this" if family is qwen else "dog"
    turns = [f"<image>\nWhat is {word}?", f"{word} is", f"What <image> {word}", word, "What ?", f"{word} What"]
    samples = [
        {
            "image": ["a.png", "b.png"],
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)],
        },
        {"conversations": [{"from": "human", "value": "What ?"}, {"from": "gpt", "value": word}]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    data = ConversationDataset(tmp_path / "data.json", tmp_path, processor, template="chat")
    items = [data[0], data[1]]
    for item, answers in zip(items, ([turns[1], turns[3], turns[5]], [word]), strict=True):
        shown = item["labels"] != -100
        assert torch.equal(item["labels"][shown], item["input_ids"][shown])
        expected = [each for answer in answers for each in processor.tokenizer(answer, add_special_tokens=False)["input_ids"]]
        end = processor.tokenizer.eos_token_id
        assert [each for each in item["labels"][shown].tolist() if each != end] == expected
        assert (item["labels"] == end).sum() == len(answers)
    model = prepare_model(model.train(), ALIGNMENT)
    loss = model(**Collator(processor.tokenizer.pad_token_id)(items)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(each.grad is not None for each in model.spatial_tokens.parameters())


def test_families_are_those_of_the_processors():
    assert {idefics3, gemma3, internvl, llava_next} == set(FAMILIES)
