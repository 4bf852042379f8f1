"""What `attach` says of what it added, and what trains."""

import logging

import pytest

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, print_trainable_parameters
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from tests.adapters.huggingface.models import FIELDS, llava, qwen


@pytest.mark.parametrize(
    ("make", "preset", "options", "said"),
    [
        (llava, "llava-sp-cropping", {}, "patch grid 24 x 24; they go before each image, marked by <|spatial|> (id 100)"),
        (llava, "llava-sp-cropping", {"mode": "image"}, "marked by the model's image token (id 99)"),
        (qwen, "factorized-cropping", {}, "patch grid any; they go before each image, marked by <|spatial|> (id 104)"),
    ],
)
def test_what_was_added_is_logged(caplog, make, preset, options, said):
    with caplog.at_level(logging.INFO, logger="spatial_tokens"):
        model, _ = attach(*make(), preset, **options, **FIELDS)
    (record,) = (each for each in caplog.records if each.name.startswith("spatial_tokens"))
    count = sum(parameter.numel() for parameter in model.spatial_tokens.parameters())
    assert record.getMessage().startswith(f"attached 6 spatial tokens to {model.config.model_type}: {count:,} parameters (")
    assert f"({4 * count / 2**20:.1f} MiB in float32)" in record.getMessage()
    assert said in record.getMessage()


def test_nothing_is_printed_unless_the_caller_turns_logging_on(capsys):
    attach(*llava(), **FIELDS)
    printed = capsys.readouterr()
    assert not printed.out
    assert "attached" not in printed.err


def test_what_trains_is_printed_by_group(capsys):
    peft = pytest.importorskip("peft")
    model, _ = attach(*llava(), **FIELDS)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    model.base_model.model.spatial_tokens.requires_grad_(True)
    print_trainable_parameters(model)
    own = sum(parameter.numel() for parameter in model.base_model.model.spatial_tokens.parameters())
    lora = 2 * 2 * (64 + 64)  # two layers of 64 x 64, of rank 2
    total = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out.splitlines() == [
        f"trainable params: {own + lora:,} || all params: {total:,} || trainable%: {100 * (own + lora) / total:.4f}",
        f"  spatial tokens: {own:,} of {own:,} train",
        f"  rest of the model: {lora:,} of {total - own:,} train",
    ]


def test_a_model_without_spatial_tokens_is_refused():
    with pytest.raises(SpatialTokensError, match="the model has no spatial tokens"):
        print_trainable_parameters(tiny_llava()[0])


def test_tiny_models_leave_transformers_logging_as_it_was():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        tiny_llava()
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)
