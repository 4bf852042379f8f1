"""The examples, as somebody runs them: without arguments, on tiny models; and on models that are given."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_tokens.visualize import sample_picture

pytest.importorskip("transformers")

from spatial_tokens.adapters.huggingface.ready import tiny_llava, tiny_qwen_vl

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = [{"image": sample_picture(), "question": "What?", "answer": answer} for answer in ("a circle", "a square")]


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, name, *arguments):
    """As a script, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    example(name).command_line()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["own_loop", "finetune_llava", "finetune_qwen_vl"])
def test_without_arguments_they_train_a_tiny_model(monkeypatch, capsys, tmp_path, name):
    if name != "own_loop":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, name, "--steps", "10")
    printed = capsys.readouterr().out
    assert "trainable params: " in printed
    assert "question: What is this?  expected: a house" in printed
    first, last = printed.split("loss: ")[-1].split(" in 10 steps")[0].split(" to ")
    assert float(last) < float(first)
    assert "answer before training: " in printed
    assert "answer after training: " in printed
    assert "next: " in printed
    (folder,) = tmp_path.iterdir()
    folder = folder if name == "own_loop" else folder / "spatial"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"].startswith("SPATIAL_TOKENS")


def test_pipeline(monkeypatch, capsys):
    run(monkeypatch, "pipeline")
    printed = capsys.readouterr().out
    assert "answer without spatial tokens:  no\n" in printed
    assert "answer with trained ones:  yes\n" in printed


@pytest.mark.parametrize("name", ["own_loop", "finetune_llava", "finetune_qwen_vl", "pipeline", "tiny_data", "train"])
def test_help(name):
    told = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: ")
    assert f"python examples/{name}.py" in told


def test_own_loop_loads_what_it_saved_and_leaves_the_rest_alone(tmp_path):
    model, processor = tiny_llava()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, answers = example("own_loop").main(
        model, processor, ROWS[:1], tmp_path, steps=6, learning_rate=1e-2, spatial_hidden_size=16
    )
    assert losses[-1] < losses[0]
    assert answers[1] == answers[2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


@pytest.mark.parametrize("name", ["finetune_llava", "finetune_qwen_vl"])
def test_spatial_tokens_and_lora_train_in_float32_and_nothing_else_does(tmp_path, name):
    pytest.importorskip("peft")
    model, processor = tiny_llava() if name == "finetune_llava" else tiny_qwen_vl()
    losses, _ = example(name).main(
        model.to(torch.bfloat16), processor, ROWS, str(tmp_path), steps=5, batch=2, learning_rate=1e-2, spatial_hidden_size=16
    )
    assert losses[-1] < losses[0]
    trained = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert {"spatial_tokens" in name or "lora_" in name for name in trained} == {True}
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_the_qwen_example_uses_the_models_chat_template():
    _, processor = tiny_qwen_vl()
    text = example("finetune_qwen_vl").prompt_of(processor, ROWS[0])
    assert text == "user\n<|vision_start|><|image_pad|><|vision_end|>What?\nassistant\n"


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "finetune_llava", "finetune_qwen_vl", "own_loop", "pipeline",
        "tiny_data", "train",  # tests/training/test_train.py
    }  # fmt: skip
