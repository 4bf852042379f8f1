"""TRL's trainers on an attached model: SFT, DPO and GRPO, with pictures."""

import copy
import math

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from spatial_tokens.adapters.huggingface import PEFT_EXCLUDE_MODULES, attach, load_adapter, save_adapter, trainer_callback
from spatial_tokens.adapters.huggingface.api import attachment_of, unwrapped
from tests.adapters.huggingface.models import FIELDS, llava, pictures

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
IMAGES = [[each] for each in pictures(2, (40, 30))]
PROMPTS = [[{"role": "user", "content": text}] for text in (" What?", " And this?")]


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.fixture
def ready(tmp_path):
    base, processor = llava()
    processor.chat_template = TEMPLATE
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    return attach(base, processor, **FIELDS)


def options(folder):
    return {
        "output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True,
        "logging_nan_inf_filter": False, "seed": 1,
    }  # fmt: skip


def lora():
    return LoraConfig(
        r=4,
        target_modules="all-linear",
        exclude_modules=PEFT_EXCLUDE_MODULES,
        modules_to_save=["spatial_tokens"],
        task_type="CAUSAL_LM",
    )


def tokens_of(model):
    """The spatial tokens' weights: PEFT's copy of them, where it trains one."""
    found = unwrapped(model).spatial_tokens
    found = found.modules_to_save["default"] if hasattr(found, "modules_to_save") else found
    return {name: each.detach().clone() for name, each in found.named_parameters()}


def trains(trainer):
    """Steps change the spatial tokens, and every loss is finite."""
    before = tokens_of(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    after = tokens_of(trainer.model)
    assert any(not torch.equal(after[name], each) for name, each in before.items())
    assert all(each.isfinite().all() for each in after.values())
    return losses


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "LoRA"])
def test_sft(ready, tmp_path, peft):
    model, processor = ready
    rows = Dataset.from_dict({"images": IMAGES, "prompt": PROMPTS, "completion": answers("red", "blue")})
    trainer = SFTTrainer(
        model, SFTConfig(**options(tmp_path), max_length=None), train_dataset=rows, processing_class=processor,
        peft_config=lora() if peft else None, callbacks=[trainer_callback()],
    )  # fmt: skip
    trains(trainer)
    if not peft:
        save_adapter(trainer.model, tmp_path / "adapter")
        again, _ = load_adapter(llava()[0], tmp_path / "adapter")
        assert all(torch.equal(each, tokens_of(model)[name]) for name, each in tokens_of(again).items())


def preferences():
    chosen, rejected = answers("red", "blue"), answers("dog", "cat")
    return Dataset.from_dict({"images": IMAGES, "prompt": PROMPTS, "chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("reference", ["a copy", "without the LoRA"])
def test_dpo(ready, tmp_path, reference):
    model, processor = ready
    given = {"ref_model": copy.deepcopy(model)} if reference == "a copy" else {"peft_config": lora()}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path), max_length=None),
        train_dataset=preferences(),
        processing_class=processor,
        **given,
    )
    losses = trains(trainer)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)  # the model is its reference yet
    assert losses[1] != pytest.approx(math.log(2), rel=1e-6)


def test_dpos_own_reference_has_no_spatial_tokens(ready, tmp_path):
    """TRL loads it from the base's folder: what the guide says of it holds."""
    model, processor = ready
    trainer = DPOTrainer(
        model, args=DPOConfig(**options(tmp_path), max_length=None), train_dataset=preferences(), processing_class=processor
    )
    assert not hasattr(trainer.ref_model, "spatial_tokens")
    with pytest.raises(IndexError, match="index out of range"):
        trainer.train()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(ready, tmp_path, beta):
    model, processor = ready
    reserved = attachment_of(model).token_id
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = GRPOConfig(**options(tmp_path), num_generations=2, max_completion_length=5, beta=beta)
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict({"images": IMAGES, "prompt": PROMPTS}),
        processing_class=processor, peft_config=lora(),
    )  # fmt: skip
    trains(trainer)
    assert seen
    assert all(reserved not in ids for ids in seen)
