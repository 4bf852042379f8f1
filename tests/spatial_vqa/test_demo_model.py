"""How the demo's model is trained and measured: rows without spatial tokens are those of the base."""

from statistics import mean

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("timm")

from benchmarks.spatial_vqa import demo_files
from benchmarks.spatial_vqa.demo_model import count_right, distilled, hide_spatial_tokens
from benchmarks.spatial_vqa.designs import MLP
from benchmarks.spatial_vqa.encoder import as_pixels
from benchmarks.spatial_vqa.estimates import accuracy
from benchmarks.spatial_vqa.language_model import inputs_of
from benchmarks.spatial_vqa.plans import LONGER
from benchmarks.spatial_vqa.results import committed
from benchmarks.spatial_vqa.splits import examples, pictures
from benchmarks.spatial_vqa.training import prefix_of
from benchmarks.spatial_vqa.words import IGNORED, pack, questions_of
from spatial_tokens.adapters.huggingface import load_adapter
from spatial_tokens.adapters.huggingface.ready import TRAINED_ADAPTER, trained_llava
from spatial_tokens.cli.demo import TRAINED_WITHOUT
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def asked():
    found = examples("test", 6)
    return as_pixels(torch.from_numpy(pictures(found))), [questions_of(each.questions) for each in found]


@torch.inference_mode()
def test_hidden_spatial_tokens_are_as_if_they_were_not_there(asked):
    pixels, questions = asked
    base, _ = trained_llava(attn_implementation="eager")
    rows = pack([prefix_of(base)] * len(questions), questions)
    expected = base(**inputs_of(rows), pixel_values=pixels).logits[rows.labels != IGNORED]
    model, _ = load_adapter(base, TRAINED_ADAPTER)
    model.float()
    whole = pack([prefix_of(model)] * len(questions), questions)
    rows = hide_spatial_tokens(whole, 4)
    logits, where = model(**inputs_of(rows), pixel_values=pixels).logits, rows.labels != IGNORED
    of_hidden = sum(len(each) for each in questions[:4])
    assert_close(logits[where][:of_hidden], expected[:of_hidden])
    assert not torch.allclose(logits[where][of_hidden:], expected[of_hidden:], atol=0.1)


def test_the_files_answer_as_they_were_measured_to(asked):
    model, _ = load_adapter(trained_llava(attn_implementation="eager")[0], TRAINED_ADAPTER)
    model.float()
    right = {spatial: count_right(model, *asked, spatial) for spatial in (False, True)}
    position = {spatial: sum(counts[kind][0] for kind in ("quadrant", "third")) for spatial, counts in right.items()}
    assert position[True] >= 9  # of 12
    assert position[True] > position[False]


def test_distilled(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("benchmarks.spatial_vqa.demo_model.DISTILLATION", 60)
    wide = type(trained_llava()[0].model.multi_modal_projector)(demo_files.llava_config())
    narrow, missed = distilled(wide, torch.randn(40, 60, 128))
    assert narrow is not wide
    assert 0 < missed < 0.5


def test_the_demo_compares_with_the_evidence():
    runs = committed("full").runs(MLP.name, rolled=True, tuning=LONGER.steps[1]).values()
    assert len(runs) == 5
    assert round(mean(accuracy(run["test"], "position") for run in runs)) == TRAINED_WITHOUT
