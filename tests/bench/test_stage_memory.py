"""The computed memory of the two stages: its sizes are those of the real modules, its bytes those of ZeRO's stage 2."""

import pytest
import torch

from benchmarks import stage_memory
from benchmarks.stage_memory import memory
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING

PROJECTOR = 1_000_000


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_models_have_the_sizes_that_they_are_counted_with():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        vision = transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        )
        assert size(transformers.CLIPVisionModel(vision)) == stage_memory.encoder()
        vicuna = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # whose defaults are the 7B's
    assert size(vicuna) == stage_memory.language_model()
    linear = [module for module in vicuna.model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(8 * (layer.in_features + layer.out_features) for layer in linear) == stage_memory.lora(8)


def test_bytes_of_each_gpu():
    frozen = stage_memory.language_model() + stage_memory.encoder()
    first, second = memory(ALIGNMENT, PROJECTOR, gpus=8), memory(INSTRUCTION_TUNING, PROJECTOR, gpus=8)
    assert first.trained == PROJECTOR
    assert second.trained == PROJECTOR + stage_memory.lora(128)
    for found in (first, second):
        assert found.weights == 2 * (frozen + found.trained)
        assert found.gradients == found.trained / 4
        assert found.optimizer == found.trained * 1.5
    alone = memory(ALIGNMENT, PROJECTOR, gpus=1)
    assert alone.total == 2 * frozen + 16 * PROJECTOR  # ZeRO's 16 bytes for a parameter that trains


def test_a_line_for_each_stage_and_projector():
    lines = stage_memory.lines()
    assert [line[:2] for line in lines] == [(stage, name) for stage in "12" for name in ("LLaVA-1.5's MLP", "dense", "factorized")]
    assert all(len(line) == len(stage_memory.COLUMNS) for line in lines)
