"""The examples, on tiny models."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from spatial_tokens.visualize import sample_picture

pytest.importorskip("transformers")

from spatial_tokens.demo_model import tiny_llava

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def llava():
    torch.manual_seed(0)
    model, processor = tiny_llava()
    return model.eval(), processor


def test_attach_llava(llava):
    answer, again = example("attach_llava").main(*llava, sample_picture(), "What is this?", spatial_hidden_size=16)
    assert answer == again
    assert "<|spatial|>" * 6 + "<image>" in answer[0].replace("> <", "><")


def test_pipeline(llava):
    answer = example("pipeline").main(*llava, sample_picture(), "What is this?", spatial_hidden_size=16)
    assert "What is this?" in answer
    assert len(answer) > len("<image> What is this?")


def test_finetune_trainer_lora(llava, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    rows = [{"image": sample_picture(), "question": "What?", "answer": answer} for answer in ("a circle", "a square")]
    model, processor = llava
    losses = example("finetune_trainer_lora").main(model, processor, rows, str(tmp_path), steps=6, batch=2, spatial_hidden_size=16)
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "spatial" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPATIAL_TOKENS"
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "attach_llava", "attach_qwen_vl", "finetune_trainer_lora", "pipeline",
    }  # fmt: skip
