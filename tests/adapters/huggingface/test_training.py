"""Training attached models: gradients, text without images, checkpointing, autocast, compile, Trainer, PEFT, DDP, FSDP."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

import transformers

from spatial_tokens.adapters.huggingface import attach, detach, insert_slots, load_adapter, save_adapter, trainer_callback
from tests.adapters.huggingface.models import FIELDS, llava, pictures


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


def test_text_alone_gives_gradients_of_zero(ready):
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    model(**batch_of(processor, with_image=False)).loss.backward()
    assert all(each.grad is not None and not each.grad.any() for each in model.spatial_tokens.parameters())


def test_text_alone_is_what_it_was_before(ready):
    base, plain = llava()
    batch = batch_of(plain, with_image=False)
    outputs = base(**batch)
    expected, base_loss = outputs.logits, outputs.loss
    model, _ = attach(base, plain, **FIELDS)
    for training in (False, True):
        found = model.train(training)(**batch)
        assert torch.equal(found.logits[..., :-1], expected)
        torch.testing.assert_close(found.loss, base_loss, rtol=1e-6, atol=0)  # the reserved token takes no share of it


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


@pytest.mark.parametrize("order", ["attach first", "peft first", "modules_to_save"])
def test_lora_of_the_language_model(order):
    peft = pytest.importorskip("peft")
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


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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


def test_slots_of_labels(ready):
    """The loss of a batch with slots is that of the words alone: slots are no targets."""
    model, processor = ready
    plain = copy.copy(processor)
    made = batch_of(processor)
    slots = made["input_ids"] == model._spatial_attachment.token_id
    bare = {"input_ids": made["input_ids"][~slots][None], "labels": made["labels"][~slots][None]}
    again = insert_slots(model, {**bare, "attention_mask": torch.ones_like(bare["labels"])})
    assert torch.equal(again["labels"], made["labels"])
    assert torch.equal(again["input_ids"], made["input_ids"])
    assert plain is not processor
