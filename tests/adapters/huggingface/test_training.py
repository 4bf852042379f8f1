"""Training attached models: gradients, text without images, checkpointing, autocast, compile, Trainer, PEFT, DDP, FSDP."""

import copy
import io
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

import transformers

from spatial_tokens.adapters.huggingface import attach, detach, insert_placeholders, load_adapter, save_adapter, trainer_callback
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen
from tests.processes import free_port


@pytest.fixture(scope="module")
def ready():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    return model, processor


def batch_of(processor, with_image=True):
    made = dict(
        processor(images=pictures(1) if with_image else None, text="<image> a b" if with_image else "a b c", return_tensors="pt")
    )
    return {**made, "labels": made["input_ids"].masked_fill(made["input_ids"] > 98, -100)}


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def test_gradients_reach_every_spatial_parameter(ready):
    model, processor = copy.deepcopy(ready[0]), ready[1]
    model.requires_grad_(False)
    model.spatial_tokens.requires_grad_(True)
    model(**batch_of(processor)).loss.backward()
    found = gradients(model)
    assert set(found) == {f"spatial_tokens.{name}" for name, _ in model.spatial_tokens.named_parameters()}
    unseen = ("key_projector.0.bias", "key_projector.1.bias")  # softmax does not see a shift of all scores
    assert all(grad.abs().sum() > 0 for name, grad in found.items() if not name.endswith(unseen))


@pytest.mark.parametrize("mode", ["own", "image"])
def test_text_alone_gives_gradients_of_zero(mode):
    base, plain = llava()
    model, processor = attach(base, plain, mode=mode, **FIELDS)
    model.train()(**batch_of(processor, with_image=False)).loss.backward()
    assert all(each.grad is not None and not each.grad.any() for each in model.spatial_tokens.parameters())
    model.zero_grad()
    model(**batch_of(processor)).loss.backward()
    assert all(each.grad is not None for each in model.spatial_tokens.parameters())
    assert any(each.grad.any() for each in model.spatial_tokens.parameters())


def test_text_alone_is_what_it_was_before(ready):
    base, plain = llava()
    batch = batch_of(plain, with_image=False)
    outputs = base(**batch)
    expected, base_loss = outputs.logits, outputs.loss
    model, _ = attach(base, plain, **FIELDS)
    for training in (False, True):
        found = model.train(training)(**batch)
        assert torch.equal(found.logits, expected)
        assert torch.equal(found.loss, base_loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_with_spatial_tokens_alone_trained(ready, reentrant):
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    model.requires_grad_(False)
    model.spatial_tokens.requires_grad_(True)
    batches = [batch_of(processor), batch_of(processor, with_image=False)]

    def of_each_batch():
        found = []
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            found.append(gradients(model))
        return found

    expected = of_each_batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, before in zip(of_each_batch(), expected, strict=True):
        assert found.keys() == before.keys()
        assert all(torch.equal(grad, before[name]) for name, grad in found.items())
    assert not any(grad.any() for grad in expected[1].values())


def test_checkpointed_gradients_are_equal(ready):
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    model(**batch_of(processor)).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch_of(processor)).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_autocast(ready):
    model, processor = ready
    expected = model(**batch_of(processor)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch_of(processor)).loss
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_gradients_under_autocast(ready):
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    for with_image in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch_of(processor, with_image)).loss
        loss.backward()
        found = [each.grad for each in model.spatial_tokens.parameters()]
        assert all(each.isfinite().all() for each in found)
        assert any(each.any() for each in found) == with_image


@pytest.mark.parametrize("of_ours", [torch.bfloat16, torch.float32])
def test_in_bfloat16(of_ours):
    """The model in half precision; the spatial tokens in it too, or with weights that small steps still move."""
    base, plain = llava()
    model, processor = attach(base.to(torch.bfloat16), plain, **FIELDS)
    model.spatial_tokens.to(of_ours)
    model.train()
    for with_image in (True, False):
        model.zero_grad()
        batch = batch_of(processor, with_image)
        if with_image:
            batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        model(**batch).loss.backward()
        found = [each.grad for each in model.spatial_tokens.parameters()]
        assert {each.dtype for each in found} == {of_ours}
        assert any(each.any() for each in found) == with_image


@pytest.fixture(scope="module")
def whole():
    """Whether the model without spatial tokens compiles in one graph; it does not with every torch and transformers."""
    base, plain = llava()
    try:
        torch.compile(base, backend="eager", fullgraph=True)(**batch_of(plain))
    except Exception:  # whatever the compiler raises
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(ready, whole, backend):
    model, processor = copy.deepcopy(ready[0]), ready[1]
    batch = batch_of(processor)
    expected = model(**batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=whole)
    found = compiled(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_with_and_without_images(ready):
    """One compiled model, now with an image and now without, gives what the model gives; and its gradients."""
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for with_image in (True, False, True):
        batch, found = batch_of(processor, with_image), []
        for each in (model, compiled):
            model.zero_grad()
            outputs = each(**batch)
            outputs.loss.backward()
            found.append((outputs.logits, gradients(model)))
        (expected, of_model), (logits, of_compiled) = found
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert of_compiled.keys() == of_model.keys()
        for name, grad in of_model.items():
            torch.testing.assert_close(of_compiled[name], grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_compiled_qwen():
    model, processor = attach(*qwen(), resize="pool", **FIELDS)
    text = ["<|vision_start|><|image_pad|><|vision_end|> What is this"]
    inputs = processor(images=pictures(1, (48, 32)), text=text, return_tensors="pt")
    expected = model(**inputs).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_without_a_place_for_an_image(ready):
    model, processor = copy.deepcopy(ready[0]), ready[1]
    batch = batch_of(processor)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model._spatial_attachment.token_id, 5)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="not as many places for spatial tokens"):
        torch.compile(model, backend="eager")(**batch)
    torch._dynamo.reset()


def test_a_deep_copy_is_independent(ready):
    model, processor = ready
    batch = batch_of(processor)
    expected = model(**batch).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch).logits, expected)
    with torch.no_grad():
        for each in other.spatial_tokens.parameters():
            each.zero_()
    assert not torch.equal(other(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_pickle(family):
    """A model that has been called holds a hook of transformers' own, which cannot be pickled; one that has not can be."""
    base, plain = llava() if family == "llava" else qwen()
    model, processor = attach(base, plain, resize=None if family == "llava" else "pool", **FIELDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    place = "<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor(images=pictures(1), text=[f"{place} is"], return_tensors="pt")
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    with torch.no_grad():
        next(other.spatial_tokens.parameters()).add_(1)
    assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert not hasattr(detach(other), "spatial_tokens")


@pytest.mark.parametrize("trained", ["spatial tokens", "all"])
def test_trainer_with_padded_batches(tmp_path, trained):
    """A row with an image beside a row of text; in half precision and checkpointed; the checkpoint's base is the base's."""
    pytest.importorskip("accelerate")
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    if trained == "spatial tokens":
        model.requires_grad_(False)
        model.spatial_tokens.requires_grad_(True)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rows = [("<image> a b", pictures(1)), ("a b c d", [])] * 2

    def collate(found):
        texts, images = zip(*found, strict=True)
        made = dict(processor(text=list(texts), images=list(images), return_tensors="pt", padding=True))
        return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, report_to=[],
        remove_unused_columns=False, save_steps=3, disable_tqdm=True, use_cpu=True, bf16=True, gradient_checkpointing=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > losses[1] > losses[2]
    changed = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert any(name.startswith("spatial_tokens.") for name in changed)
    assert any(not name.startswith("spatial_tokens.") for name in changed) == (trained == "all")
    loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight.shape[0] == 100


def test_trainer(tmp_path):
    """Rows with and without images, taken one by one; the adapter of what was trained gives the same logits."""
    pytest.importorskip("accelerate")
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    rows = [batch_of(processor), batch_of(processor, with_image=False)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=2, report_to=[],
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    before = {name: each.clone() for name, each in model.spatial_tokens.state_dict().items()}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda found: found[0])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(each, before[name]) for name, each in model.spatial_tokens.state_dict().items())
    model.eval()
    expected = model(**rows[0]).logits
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    loaded, _ = load_adapter(again, tmp_path / "adapter", plain)
    torch.testing.assert_close(loaded(**rows[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_trainer_resumes_from_its_checkpoint(tmp_path):
    """Two steps and two more are four steps."""
    pytest.importorskip("accelerate")
    options = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 1, "learning_rate": 1e-3, "report_to": [], "save_steps": 2,
        "remove_unused_columns": False, "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", "max_steps": 4,
    }  # fmt: skip

    def trained(model, processor, checkpoint=None):
        model.requires_grad_(False)
        model.spatial_tokens.requires_grad_(True)
        trainer = transformers.Trainer(
            model=model, args=transformers.TrainingArguments(**options), train_dataset=[batch_of(processor)] * 4,
            data_collator=lambda found: found[0], callbacks=[trainer_callback()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return {name: each.clone() for name, each in model.spatial_tokens.state_dict().items()}

    base, plain = llava()
    expected = trained(*attach(base, plain, **FIELDS))
    detach(base)
    checkpoint = tmp_path / "checkpoint-2"
    found = trained(*load_adapter(base, checkpoint / "spatial_tokens", plain), str(checkpoint))
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-6)


# Several processes


def one_of_two(rank, port, results):
    """A step of DDP in which the second process has no image."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model.train().requires_grad_(False)
    model.spatial_tokens.requires_grad_(True)
    parallel = DistributedDataParallel(model)
    parallel(**batch_of(processor, with_image=rank == 0)).loss.backward()
    results[rank] = gradients(model)
    dist.destroy_process_group()


def test_ddp_with_text_alone_on_one_rank():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model.train().requires_grad_(False)
    model.spatial_tokens.requires_grad_(True)
    model(**batch_of(processor)).loss.backward()
    expected = gradients(model)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_of_two, (free_port(), results), nprocs=2)
        for rank in range(2):
            assert results[rank].keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(results[rank][name], grad / 2, rtol=1e-4, atol=1e-6)


def test_labels_left_at_slots_are_no_targets(ready):
    model, processor = ready
    batch = batch_of(processor)
    careless = batch["labels"].masked_fill(
        batch["input_ids"] == model._spatial_attachment.token_id, model._spatial_attachment.token_id
    )
    assert torch.equal(model(**{**batch, "labels": careless}).loss, model(**batch).loss)


def sharded(rank, port, results):
    """A step of FSDP2 with an image and one with text alone, in a single process."""
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=1)
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model.train()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.model.language_model.layers, model.spatial_tokens, model):
        fully_shard(part, mesh=mesh)
    for with_image in (True, False):
        model.zero_grad()
        model(**batch_of(processor, with_image)).loss.backward()
        results[with_image] = {
            name: each.grad.full_tensor() for name, each in model.named_parameters() if name.startswith("spatial_tokens.")
        }
    dist.destroy_process_group()


def test_fsdp():
    pytest.importorskip("torch.distributed.fsdp", reason="no FSDP2")
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    model.train()(**batch_of(processor)).loss.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(sharded, (free_port(), results), nprocs=1)
        for name, grad in gradients(model).items():
            if name.startswith("spatial_tokens."):
                torch.testing.assert_close(results[True][name], grad, rtol=1e-4, atol=1e-6)
                assert not results[False][name].any()


def test_slots_of_labels(ready):
    """The loss of a batch with slots is that of the words alone: slots are no targets."""
    model, processor = ready
    plain = copy.copy(processor)
    made = batch_of(processor)
    slots = made["input_ids"] == model._spatial_attachment.token_id
    bare = {"input_ids": made["input_ids"][~slots][None], "labels": made["labels"][~slots][None]}
    again = insert_placeholders(model, {**bare, "attention_mask": torch.ones_like(bare["labels"])})
    assert torch.equal(again["labels"], made["labels"])
    assert torch.equal(again["input_ids"], made["input_ids"])
    assert plain is not processor
