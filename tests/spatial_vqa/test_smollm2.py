"""SmolLM2 as it is installed: what is read of its file speaks, and reads the benchmark's text."""

import pytest
import torch

pytest.importorskip("torch", minversion="2.9")  # Muon
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gguf")

from transformers import LlamaForCausalLM

from benchmarks.spatial_vqa.smollm2 import SmolLM2
from benchmarks.spatial_vqa.splits import examples
from spatial_tokens import SpatialTokensError


@pytest.fixture(scope="module")
def smollm2():
    try:
        return SmolLM2().load()
    except SpatialTokensError as error:
        pytest.skip(str(error))


def test_it_speaks(smollm2):
    model = LlamaForCausalLM(smollm2.config).eval()
    model.load_state_dict(smollm2.weights)
    ids = torch.tensor([smollm2.tokens.encode("The capital of France is")])
    assert model(ids).logits[0, -1].argmax() == smollm2.tokens.encode(" Paris")[0]


def test_its_tokens_of_a_question_and_an_answer_are_those_of_both(smollm2):
    tokens = smollm2.tokens
    for example in examples("hard", 20):
        for each in example.questions:
            whole = tokens.encode(f"{each.text} {each.answer}")
            assert [*tokens.encode(each.text), *tokens.encode(f" {each.answer}")] == whole
            assert not {tokens.image, tokens.end, smollm2.config.bos_token_id} & set(whole)
