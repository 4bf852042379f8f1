"""The examples, on tiny models."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from spatial_tokens.visualize import sample_picture

pytest.importorskip("transformers")

from spatial_tokens.adapters.huggingface.ready import tiny_llava

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


def tiny_qwen():
    """A Qwen2.5-VL of random weights, and a processor with a vocabulary of a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "What", "is", "this", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
    }  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096),
        tokenizer, transformers.Qwen2VLVideoProcessor(patch_size=4),
    )  # fmt: skip
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
        "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_start_id"], vision_end_token_id=ids["vision_end_id"],
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def test_attach_qwen_vl():
    torch.manual_seed(0)
    (answer,) = example("attach_qwen_vl").main(*tiny_qwen(), sample_picture(), "What is this?", spatial_hidden_size=8)
    assert "<|spatial|>" * 6 + "<|vision_start|><|image_pad|>" in answer.replace("> <", "><")


def test_pipeline(llava):
    answer = example("pipeline").main(*llava, sample_picture(), "What is this?", spatial_hidden_size=16)
    assert "What is this?" in answer
    assert len(answer) > len("<image> What is this?")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finetune_trainer_lora(llava, tmp_path, dtype):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    rows = [{"image": sample_picture(), "question": "What?", "answer": answer} for answer in ("a circle", "a square")]
    model, processor = llava
    losses = example("finetune_trainer_lora").main(
        model.to(dtype), processor, rows, str(tmp_path), steps=6, batch=2, spatial_hidden_size=16
    )
    assert losses[-1] < losses[0]
    trained = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert {"spatial_tokens" in name or "lora_" in name for name in trained} == {True}
    config = json.loads((tmp_path / "spatial" / "adapter_config.json").read_text())
    assert config["peft_type"].startswith("SPATIAL_TOKENS")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "attach_llava", "attach_qwen_vl", "finetune_trainer_lora", "pipeline",
        "tiny_data", "train",  # tests/training/test_train.py
    }  # fmt: skip
